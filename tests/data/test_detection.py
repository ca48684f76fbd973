"""Detection decides by fixed rules, says why, and refuses to guess."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tailor.data.detect import SAMPLED
from tailor.data.readers import detect_format, read_records
from tailor.data.records import Document, PromptCompletion
from tailor.errors import ConfigError, DataError

SHARED = Path(__file__).parents[2] / "../shared/data"
PAIR = {"prompt": "q", "completion": "a"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write(tmp_path: Path, *rows: Mapping[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(path: Path, **options: Any) -> tuple[str, str]:
    with pytest.raises(DataError) as caught:
        read_records(path, **options)
    return caught.value.message, caught.value.hint or ""


def test_evidence_is_spelled_out(tmp_path: Path) -> None:
    detection = detect_format(write(tmp_path, PAIR, {**PAIR, "split": "train"}))
    assert detection.format == "prompt_completion"
    assert detection.evidence == (
        "JSONL, 2 rows, 2 looked at",
        "prompt_completion: one prompt, one completion (the home format)",
        "2 of 2 rows have prompt: text, completion: text",
        "other columns, kept in meta: split",
    )


def test_a_format_that_uses_more_fields_wins(tmp_path: Path) -> None:
    assert detect_format(write(tmp_path, {**PAIR, "label": True})).format == "kto"
    assert detect_format(write(tmp_path, {**PAIR, "label": "spam"})).format == "prompt_completion"
    scores = {"helpfulness": 1, "correctness": 2, "coherence": 3}
    assert detect_format(write(tmp_path, {"prompt": "q", "response": "a", **scores})).format == "helpsteer"


def test_plain_text_gives_way_to_every_other_format(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "i", "output": "o", "text": "### Instruction: i"})
    reading = read_records(path)
    assert reading.detection.format == "alpaca"
    assert reading.records[0].meta == {"text": "### Instruction: i"}


def test_value_types_count_not_names(tmp_path: Path) -> None:
    message, _ = refusal(write(tmp_path, {"prompt": 1, "completion": ["a"]}))
    assert "is in no known format (columns: prompt, completion)" in message


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({**PAIR, **CHAT}, ["prompt_completion", "openai_chat"]),
        ({**PAIR, "instruction": "i", "output": "o"}, ["prompt_completion", "alpaca"]),
        ({"prompt": "p", "chosen": "c", "rejected": "r", **CHAT}, ["openai_chat", "preference"]),
    ],
)
def test_two_readings_are_both_named(tmp_path: Path, row: Mapping[str, Any], names: Sequence[str]) -> None:
    path = write(tmp_path, row, row)
    message, hint = refusal(path)
    assert "can be read in 2 ways" in message
    for name in names:
        assert name in message
        assert f'format="{name}" (--format {name})' in hint
        assert read_records(path, format=name).detection.format == name


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}),
        ({"query": "q", "response": "a"}, {"prompt": "query", "completion": "response"}),
        ({"input": "q", "output": "a"}, {"prompt": "input", "completion": "output"}),
        ({"input": "q", "target": "a"}, {"prompt": "input", "completion": "target"}),
        ({"prompt": "q", "label": "a"}, {"completion": "label"}),
        ({"question": "q", "completion": "a"}, {"prompt": "question"}),
    ],
)
def test_synonyms_are_proposed_never_taken(tmp_path: Path, row: Mapping[str, Any], columns: dict[str, str]) -> None:
    path = write(tmp_path, row)
    message, hint = refusal(path)
    assert "probably" in message
    assert "columns={" + ", ".join(f'"{ours}": "{theirs}"' for ours, theirs in columns.items()) + "}" in hint
    assert " ".join(f"--columns {ours}={theirs}" for ours, theirs in columns.items()) in hint
    assert isinstance(read_records(path, columns=columns).records[0], PromptCompletion)


@pytest.mark.parametrize("other", ["category", "label", "answer"])
def test_text_beside_a_label_is_not_silently_documents(tmp_path: Path, other: str) -> None:
    path = write(tmp_path, {"text": "my card?", other: "card"})
    message, hint = refusal(path)
    assert "text (documents) or prompt/completion" in message
    assert f'columns={{"prompt": "text", "completion": "{other}"}}' in hint
    assert f"--columns prompt=text --columns completion={other}" in hint
    assert "--format text" in hint
    assert isinstance(read_records(path, format="text").records[0], Document)


def test_mixed_formats_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, PAIR, PAIR, PAIR, CHAT, {"what": 1})
    message, hint = refusal(path)
    assert "prompt_completion 3 rows (first at " in message
    assert f"openai_chat 1 rows (first at {path}:4)" in message
    assert "no known format 1 rows" in message
    assert "--format" in hint
    reading = read_records(path, format="prompt_completion", skip_bad_rows=True)
    assert (len(reading.records), [bad.line for bad in reading.bad_rows]) == (3, [4, 5])
    assert reading.detection.confidence == 0.6


def test_the_sample_covers_all_of_a_long_file(tmp_path: Path) -> None:
    half = 3 * SAMPLED
    path = write(tmp_path, *[PAIR] * half, *[CHAT] * half)
    message, _ = refusal(path)
    assert "mixes formats" in message
    assert f"(first at {path}:{half + 1})" in message
    path = write(tmp_path, *[PAIR] * (2 * half - 10), *[CHAT] * 10)
    message, _ = refusal(path)  # 10 of 6000 do not make the file mixed, but every one of them is reported
    assert f"10 of {2 * half} rows cannot be read as prompt_completion" in message


def test_a_small_file_with_one_bad_row_is_still_detected(tmp_path: Path) -> None:
    message, _ = refusal(path := write(tmp_path, PAIR, PAIR, {"prompt": "q", "compeltion": "a"}))
    assert f"{path}:3: field 'completion' is missing; did you mean 'compeltion'?" in message


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "t", "category": "c"})
    with pytest.raises(ConfigError, match=r"no data format 'shargpt'; did you mean 'sharegpt'"):
        read_records(path, format="shargpt")
    with pytest.raises(ConfigError, match=r"'promt' is not a field of any format; did you mean 'prompt'"):
        read_records(path, columns={"promt": "text"})
    with pytest.raises(DataError, match=r"maps 'completion' to 'categry', but no row has .*did you mean 'category'"):
        read_records(path, columns={"prompt": "text", "completion": "categry"})


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("banking77/train.jsonl.gz", 'columns={"prompt": "text", "completion": "category"}'),
        ("gsm8k/train.jsonl.gz", 'columns={"prompt": "question", "completion": "answer"}'),
        ("e2e/devset.jsonl.gz", "--columns prompt="),
    ],
)
def test_real_files_without_a_known_format_are_refused_with_the_remedy(name: str, what: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared data sets are not here")
    _, hint = refusal(path)
    assert what in hint


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("glaive-toolcall/conversations.jsonl.gz", "sharegpt"),
        ("instruct-tasks/common_gen.jsonl.gz", "prompt_completion"),
    ],
)
def test_real_files_in_a_known_format(name: str, expected: str) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared data sets are not here")
    reading = read_records(path)
    assert (reading.detection.format, reading.bad_rows) == (expected, ())
