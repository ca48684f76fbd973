"""What `check` finds in files made for it, against what was put there."""

from __future__ import annotations

import json
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import pytest

from tailor.errors import ConfigError, DataError, NotFoundError
from tailor.recipes.check import CheckReport, check
from tailor.recipes.check_findings import Finding, bin_edges
from tailor.recipes.check_rows import hash64, repeated
from tiny_models import tiny_model, tiny_tokenizer


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def pc(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def found(report: CheckReport, code: str) -> Finding:
    hits = [finding for finding in report.findings if finding.code == code]
    assert len(hits) == 1, [finding.code for finding in report.findings]
    return hits[0]


def codes(report: CheckReport) -> set[str]:
    return {finding.code for finding in report.findings}


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny base on disk whose tokenizer has no chat template."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat=False).hf.save_pretrained(folder)
    return str(folder)


def test_a_good_file_has_no_errors_or_warnings(tmp_path: Path) -> None:
    rows = [pc(f"ask number {k}", f"an answer that only fits question {k}") for k in range(10)]
    report = check(write(tmp_path / "good.jsonl", *rows))
    assert [finding for finding in report.findings if finding.severity != "info"] == []
    assert report.train.num_rows == report.train.tally.num_rows == 10
    assert report.train.detection is not None
    assert report.train.detection.format == "prompt_completion"
    assert report.train.detection.confidence == 1.0
    assert report.num_errors == 0
    assert report.labels is None
    assert report.max_seq_len == 1024


def test_the_first_row_shows_its_tokens_and_mask(tmp_path: Path) -> None:
    report = check(write(tmp_path / "rows.jsonl", pc("hello", "hi"), pc("bye", "no")))
    row = report.first_row
    assert row is not None
    assert "".join(row.texts) == "<|bos|><|user|>hello<|end|><|assistant|>hi<|end|>"
    counted = [text for text, mask in zip(row.texts, row.loss_mask, strict=True) if mask]
    assert "".join(counted) == "hi<|end|>"
    assert report.end_of_turn_in_loss is True
    tokens = report.to_dict()["first_row"]["tokens"]
    assert [token["in_loss"] for token in tokens] == [bool(mask) for mask in row.loss_mask]


def test_lengths_agree_with_the_renderer(tmp_path: Path) -> None:
    report = check(write(tmp_path / "rows.jsonl", pc("hello", "hi"), pc("hello there you", "hi to you too")))
    tally = report.train.tally
    for k, (prompt, completion) in enumerate([("hello", "hi"), ("hello there you", "hi to you too")]):
        encode = tally.tokenizer.encode
        assert tally.prompt_tokens[k] == len(encode(f"<|bos|><|user|>{prompt}<|end|><|assistant|>"))
        assert tally.completion_tokens[k] == len(encode(completion)) + 1
        assert tally.total_tokens[k] == tally.prompt_tokens[k] + tally.completion_tokens[k]
    spread = report.lengths["total"]
    assert (spread.min, spread.max) == (min(tally.total_tokens), max(tally.total_tokens))
    assert sum(count for _, count in spread.bins) == spread.num_rows == 2


def test_bins_are_powers_of_two_that_hold_everything() -> None:
    assert bin_edges(1) == [1, 2]
    assert bin_edges(16) == [1, 2, 4, 8, 16]
    assert bin_edges(17)[-1] == 32
    assert len(bin_edges(10**6)) == 10


def test_long_rows_are_named_with_their_share(tmp_path: Path) -> None:
    rows = [pc("short", "a b"), pc("word " * 60, "c d"), pc("e", "word " * 60), pc("f", "g")]
    report = check(write(tmp_path / "rows.jsonl", *rows), max_seq_len=32)
    finding = found(report, "too_long")
    assert finding.lines == (2, 3)
    assert finding.details["share"] == 0.5
    assert "2 rows (50.0%) exceed 32 tokens: they would be truncated or refused" in finding.message
    assert found(report, "completion_too_long").lines == (3,)
    with pytest.raises(ConfigError, match="beyond the base's context of 1024"):
        check(tmp_path / "rows.jsonl", max_seq_len=2048)


def test_duplicates_exact_and_normalised(tmp_path: Path) -> None:
    rows = [pc("q", "yes sir"), pc("r", "a"), pc("q", "yes sir"), pc(" Q", "Yes  sir"), pc("q", "yes sir")]
    report = check(write(tmp_path / "rows.jsonl", *rows))
    assert found(report, "duplicates").details["groups"] == [[1, 3, 5]]
    assert found(report, "duplicates").lines == (3, 5)
    assert found(report, "near_duplicates").lines == (4,)
    assert "same_prompt" not in codes(report)


def test_the_same_prompt_with_different_completions(tmp_path: Path) -> None:
    labels = [pc("q1", "yes"), pc("q2", "no"), pc("Q1 ", "no"), pc("q3", "yes")]
    finding = found(check(write(tmp_path / "labels.jsonl", *labels)), "same_prompt")
    assert (finding.severity, finding.lines) == ("warning", (1, 3))
    texts = [pc("q", f"a long and different answer {k}") for k in range(4)]
    assert found(check(write(tmp_path / "texts.jsonl", *texts)), "same_prompt").severity == "info"


def test_labels_are_counted(tmp_path: Path) -> None:
    rows = [pc(f"q{k}", "refund") for k in range(20)] + [pc("x", "card"), pc("y", "Refund"), pc("z", "card")]
    report = check(write(tmp_path / "rows.jsonl", *rows))
    assert report.labels is not None
    assert dict(report.labels.counts) == {"refund": 20, "card": 2, "Refund": 1}
    assert report.labels.ratio == 20.0
    assert found(report, "label_balance").severity == "warning"
    assert found(report, "single_row_labels").details["labels"] == ["Refund"]
    assert found(report, "label_spellings").details["groups"] == [["refund", "Refund"]]


def test_leakage_names_both_rows(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", pc("a", "one x"), pc("b", "two y"), pc("c", "three z"))
    aside = write(tmp_path / "dev.jsonl", pc("b", "other w"), pc("d", "four v"), pc(" A", "five u"))
    report = check(train, validation=aside)
    leaks = [finding for finding in report.findings if finding.code == "leakage"]
    assert [finding.details["pairs"] for finding in leaks] == [
        [{"validation": 1, "train": 2}],
        [{"validation": 3, "train": 1}],
    ]
    assert report.places(leaks[0]) == [f"{aside}:1"]


def test_a_validation_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", pc("a", "x"), pc("b", "y"))
    aside = write(tmp_path / "dev.jsonl", {"prompt": "a", "chosen": "x", "rejected": "y"})
    assert found(check(train, validation=aside), "kinds_differ").severity == "error"


def test_special_tokens_are_refused_rows(tmp_path: Path) -> None:
    report = check(write(tmp_path / "rows.jsonl", pc("a", "x"), pc("b <|end|> c", "y"), pc("c", "z")))
    finding = found(report, "special_token")
    assert (finding.severity, finding.lines) == ("error", (2,))
    assert "'<|end|>'" in finding.message
    assert report.lengths["total"].num_rows == 2


def test_bad_rows_are_errors_unless_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(pc('a', 'x'))}\n{{bad\n{json.dumps({'prompt': 'p'})}\n{json.dumps(pc('b', 'y'))}\n")
    report = check(path, format="prompt_completion")
    assert [bad.line for bad in report.train.bad_rows] == [2, 3]
    assert (found(report, "bad_rows").severity, found(report, "bad_rows").lines) == ("error", (2, 3))
    assert report.lengths["total"].num_rows == 2
    skipped = check(path, format="prompt_completion", skip_bad_rows=True)
    assert found(skipped, "bad_rows").severity == "warning"
    assert skipped.num_errors == 0
    assert [bad.line for bad in skipped.train.bad_rows] == [2, 3]


def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt"\n{"x": NaN}\n')
    report = check(path, skip_bad_rows=True)
    assert report.train.detection is None
    assert [bad.line for bad in report.train.bad_rows] == [1, 2]
    assert found(report, "bad_rows").severity == "error"
    assert report.first_row is None


@pytest.mark.parametrize(
    ("num_rows", "verdicts"),
    [
        (4, {"prompting": "few", "prompt_tuning": "too few", "lora": "too few", "full": "too few"}),
        (300, {"prompting": "enough", "prompt_tuning": "enough", "lora": "enough", "full": "few"}),
    ],
)
def test_rows_for_each_technique(tmp_path: Path, num_rows: int, verdicts: dict[str, str]) -> None:
    rows = [pc(f"q{k}", f"a different text {k}") for k in range(num_rows)]
    report = check(write(tmp_path / "rows.jsonl", *rows))
    by_name = {one.technique: one for one in report.techniques}
    assert {name: by_name[name].verdict for name in verdicts} == verdicts
    assert [by_name[name].scale for name in ("prompting", "lora", "full")] == ["single digits", "hundreds", "thousands"]


def test_a_chosen_technique_is_warned_about(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", pc("a", "x"), pc("b", "y"))
    finding = found(check(path, technique="lora"), "too_few_rows")
    assert finding.severity == "warning"
    assert "lora (hundreds: from 50, better 200)" in finding.message
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        check(path, technique="lroa")


def test_preferences_length_bias_and_pairs_that_hardly_differ(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{k}", "chosen": "a long good answer " * 3, "rejected": f"no {k}"} for k in range(19)]
    rows.append({"prompt": "last", "chosen": "Same text", "rejected": "same  text"})
    report = check(write(tmp_path / "rows.jsonl", *rows))
    assert report.train.tally.kinds == {"Comparison": 20}
    bias = found(report, "length_bias")
    assert bias.severity == "warning"
    assert bias.details["chosen_longer"] >= 0.95
    assert found(report, "identical_pair").lines == (20,)
    assert report.first_row is not None


@pytest.mark.parametrize(
    ("row", "kind", "sides"),
    [
        ({"text": "a document"}, "Document", {"total"}),
        ({"query": "q", "positive": "p", "negative": "n"}, "Retrieval", {"prompt", "completion"}),
        ({"prompt": "q", "completion": "a", "label": True}, "Judged", {"prompt", "completion", "total"}),
        (
            {"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 3, "coherence": 2},
            "Rated",
            {"prompt", "completion", "total"},
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "Conversation",
            {"prompt", "completion", "total"},
        ),
    ],
)
def test_every_kind_of_record(tmp_path: Path, row: dict[str, Any], kind: str, sides: set[str]) -> None:
    report = check(write(tmp_path / "rows.jsonl", row, row))
    assert report.train.tally.kinds == {kind: 2}
    assert set(report.lengths) == sides
    assert (report.first_row is None) == (kind in ("Document", "Retrieval"))
    assert (not report.techniques) == (kind in ("Document", "Retrieval"))
    assert found(report, "duplicates").lines == (2,)
    assert report.num_errors == 0
    json.dumps(report.to_dict())


def test_a_base_without_a_chat_template_gets_whitespace_hints(tmp_path: Path, plain_base: str) -> None:
    rows = [
        pc("question", "answer"),
        pc("question: ", "answer two"),
        pc("question three:\n", "answer"),
        pc("four:", " a \n"),
    ]
    report = check(write(tmp_path / "rows.jsonl", *rows), base=plain_base)
    assert found(report, "no_delimiter").lines == (1,)
    assert found(report, "prompt_space").lines == (2,)
    assert found(report, "completion_space").lines == (4,)
    assert report.end_of_turn == "<|eos|>"
    assert report.end_of_turn_in_loss is True
    assert {"no_delimiter", "prompt_space"}.isdisjoint(codes(check(tmp_path / "rows.jsonl")))


def test_a_base_without_a_chat_template_trains_the_last_turn_only(tmp_path: Path, plain_base: str) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    report = check(write(tmp_path / "rows.jsonl", {"messages": turns}, {"messages": turns[:2]}), base=plain_base)
    finding = found(report, "last_turn_only")
    assert (finding.severity, finding.lines) == ("warning", (1,))
    assert "data.trained_turns: last" in str(finding.hint)


def test_wrong_files_and_bases(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        check(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        check(tmp_path)
    with pytest.raises(NotFoundError, match="there is no base"):
        check(write(tmp_path / "rows.jsonl", pc("a", "b")), base="tailor-nanno")


def test_rows_are_not_kept(tmp_path: Path) -> None:
    small = write(tmp_path / "small.jsonl", {**pc("q", "a"), "other": "column"})
    large = write(tmp_path / "large.jsonl", *({**pc(f"q{k}", "a"), "other": f"{k} " * 10_000} for k in range(500)))
    check(small)  # imports, tokenizer and caches
    tracemalloc.start()
    assert check(large).train.num_rows == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < large.stat().st_size / 2


def test_repeated_finds_every_group() -> None:
    column = array("Q", [hash64(text) for text in "abcabca"])
    assert sorted(group.tolist() for group in repeated(column)) == [[0, 3, 6], [1, 4], [2, 5]]
    assert list(repeated(array("Q"))) == []
