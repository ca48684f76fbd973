from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from test_likelihood import by_logits

from tailor.data.examples import Example
from tailor.data.records import Conversation, PromptCompletion, Record, Source
from tailor.errors import ConfigError, DataError, MissingDependencyError, NotFoundError, QualityError
from tailor.evaluation.evaluate import EvalSettings, Evaluation, evaluate, evaluate_answers
from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.models.base import Base
from tailor.techniques import Prompting
from tailor.text.messages import assistant, user
from tiny_models import tiny_base

QUEUE = r"^Queue: (\w+)"


class Scripted(LocalBackend):
    """A real base that scores, with answers from a function of the last turn; keeps what it was asked."""

    def __init__(self, base: Base, script: Callable[[str], str] = lambda prompt: "") -> None:
        super().__init__(base)
        self.script = script
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        self.requests += requests
        texts = [self.script(request.messages[-1].content) for request in requests]
        return [Completion(text, (), (), "stop", 0, text) for text in texts]


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny_base()


def rows(completions: Sequence[str]) -> list[Record]:
    return [
        PromptCompletion(prompt=f"ask {k}", completion=text, source=Source("d.jsonl", k + 1))
        for k, text in enumerate(completions)
    ]


def test_a_label_task_by_generation_and_by_scoring(base: Base) -> None:
    records = rows(["billing", "sales"] * 4)
    backend = Scripted(
        base, lambda prompt: {"ask 0": " billing\n", "ask 1": "sales", "ask 2": "nothing"}.get(prompt, "sales")
    )
    found = evaluate(backend, None, records, labels=["tech"])
    assert found.kind == "labels"
    assert list(found.metrics) == ["accuracy", "macro_f1", "label_accuracy", "perplexity"]
    assert found.metrics["accuracy"].mean == 5 / 8  # 0, 1, 3, 5, 7
    assert [row.scores["accuracy"] for row in found.rows] == [1, 1, 0, 1, 0, 1, 0, 1]
    best = []
    for row in range(8):
        prompt = user(f"ask {row}")
        rendered = [base.renderer.example([prompt, assistant(label)]) for label in ("billing", "sales", "tech")]
        sums = [float(by_logits(base, Example(r.token_ids, r.loss_mask)).double().sum()) for r in rendered]
        best.append(("billing", "sales", "tech")[max(range(3), key=sums.__getitem__)])
    assert [row.scores["label_accuracy"] for row in found.rows] == [
        float(label == right) for label, right in zip(best, ["billing", "sales"] * 4, strict=True)
    ]


def test_perplexity_is_the_closed_form_over_completions_only(base: Base) -> None:
    records: list[Record] = [
        PromptCompletion(prompt="hello", completion="there"),
        Conversation(messages=(user("a"), assistant("first"), user("b"), assistant("second answer"))),
    ]
    found = evaluate(Scripted(base), None, records, settings=EvalSettings(metrics=("perplexity",)))
    last_only = base.renderer.example(records[1].messages, trained_turns="last")  # type: ignore[attr-defined]
    first = base.renderer.example([user("hello"), assistant("there")])
    per_row = [by_logits(base, example) for example in (first, last_only)]  # type: ignore[arg-type]
    expected = math.exp(-float(torch.cat(per_row).double().mean()))
    assert found.metrics["perplexity"].mean == pytest.approx(expected, rel=1e-5)
    assert found.rows[0].scores["perplexity"] == pytest.approx(math.exp(-float(per_row[0].mean())), rel=1e-5)
    assert (found.rows[0].completion, found.rows[0].finish_reason) == (None, None)


def test_a_pattern_scores_the_label_and_the_whole_text(base: Base) -> None:
    texts = [f"Queue: {queue}\nReply: number {k}" for k, queue in enumerate(["billing", "sales"] * 3)]
    answers = {f"ask {k}": text for k, text in enumerate(texts)}
    answers["ask 0"] = "Queue: billing\nReply: something else"
    answers["ask 1"] = "sales, I think"
    backend = Scripted(base, answers.__getitem__)
    found = evaluate(
        backend, None, rows(texts), settings=EvalSettings(answer_pattern=QUEUE), labels=[texts[0], "hello"]
    )
    assert found.kind == "labels and text"
    assert [row.answer for row in found.rows[:3]] == ["billing", None, "billing"]
    assert found.metrics["accuracy"].mean == 5 / 6
    assert found.metrics["exact_match"].mean == 4 / 6
    assert {"label_accuracy", "bleu", "chrf", "rougeL", "perplexity"} <= set(found.metrics)
    assert "1 of 2 known completions do not match the answer pattern" in found.notes
    assert any(note.startswith("bleu: nrefs:1") for note in found.notes)


def test_free_text_gets_text_metrics(base: Base) -> None:
    texts = ["the quick brown fox", "jumps over it", "a lazy dog"]
    backend = Scripted(base, lambda prompt: texts[int(prompt[-1])])
    found = evaluate(backend, None, rows(texts))
    expected = ["exact_match", "token_f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf", "perplexity"]
    assert (found.kind, list(found.metrics)) == ("text", expected)
    assert found.metrics["rouge1"].mean == 1.0


def test_answers_that_do_not_repeat_are_compared_but_not_averaged_over_labels(base: Base) -> None:
    texts = [f"{k} + {k} is {2 * k}" for k in range(3)]
    settings = EvalSettings(answer_pattern=r"is (\d+)")
    found = evaluate(Scripted(base, lambda prompt: "it is 2"), None, rows(texts), settings=settings)
    assert found.kind == "answers and text"
    assert found.metrics["accuracy"].mean == pytest.approx(1 / 3)
    assert not {"macro_f1", "label_accuracy"} & set(found.metrics)


def test_real_generation_is_bounded_by_the_references(base: Base) -> None:
    seen: list[tuple[str, int, int]] = []
    found = evaluate(LocalBackend(base), None, rows(["fox", "dog"] * 2), progress=lambda *told: seen.append(told))
    longest = len(base.tokenizer.encode("fox")) + 1  # and the end of the turn
    limit = math.ceil(1.5 * longest) + 8
    assert all(row.completion is not None and len(row.completion) > 0 for row in found.rows)
    assert any(f"were cut at {limit} tokens" in note for note in found.notes)
    assert {row.finish_reason for row in found.rows} == {"length"}
    for stage in ("generate", "score labels", "perplexity"):
        assert (stage, 4, 4) in seen


def test_given_sampling_is_used_as_it_is(base: Base) -> None:
    backend = Scripted(base)
    sampling = SamplingParams(max_new_tokens=3, temperature=0.5)
    evaluate(backend, None, rows(["a", "b"]), settings=EvalSettings(metrics=("exact_match",), sampling=sampling))
    assert [request.sampling for request in backend.requests] == [sampling] * 2


def test_a_reasoning_slot_gets_room_and_no_label_scores() -> None:
    base = tiny_base()
    backend = Scripted(base, lambda prompt: "so the answer is fox")
    backend.slots["cot"] = base.host.attach([Prompting(shots=0, reasoning=True)])
    found = evaluate(backend, "cot", rows(["fox", "dog"] * 2))
    assert backend.requests[0].sampling.max_new_tokens == 256
    assert "label_accuracy" not in found.metrics
    assert any("reasons before it answers" in note for note in found.notes)


def test_max_rows_draws_the_same_rows_in_order(base: Base) -> None:
    settings = EvalSettings(metrics=("exact_match",), max_rows=5, seed=3)
    backend = Scripted(base, lambda prompt: prompt)
    runs = [evaluate(backend, None, rows(["x"] * 20), settings=settings) for _ in range(2)]
    sources = [row.source for row in runs[0].rows]
    assert sources == [row.source for row in runs[1].rows]
    assert len(set(sources)) == 5
    assert sources == sorted(sources, key=lambda source: int(source.partition(":")[2]))
    assert "5 of 20 rows, drawn with seed 3" in runs[0].notes


def test_rows_are_written_as_json_lines(base: Base, tmp_path: Path) -> None:
    found = evaluate(Scripted(base, lambda prompt: "héllo \ud800"), None, rows(["a", "b"]))
    found.write(tmp_path / "rows.jsonl")
    read = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert [row["source"] for row in read] == ["d.jsonl:1", "d.jsonl:2"]
    assert read[0]["prompt"] == "ask 0"
    assert read[0]["completion"] == "héllo \ud800"
    assert read[0]["scores"]["exact_match"] == 0.0
    assert json.loads(json.dumps(found.to_dict()))["metrics"]["exact_match"]["n"] == 2


def test_metrics_that_cannot_be_had_are_refused_when_asked_for_and_noted_otherwise(base: Base) -> None:
    backend = Scripted(base)
    many = rows([f"answer {k}" for k in range(201)])
    with pytest.raises(ConfigError, match="201 labels"):
        evaluate(backend, None, many, settings=EvalSettings(metrics=("label_accuracy",)))
    differing = ["Queue: a, yes", "Queue: b. no"] * 2
    found = evaluate(backend, None, rows(differing), settings=EvalSettings(answer_pattern=QUEUE))
    assert "label_accuracy" not in found.metrics
    assert any("no label_accuracy: the references write different texts" in note for note in found.notes)


def test_without_sacrebleu_auto_says_so_and_a_request_fails_at_once(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    backend = Scripted(base)
    texts = rows(["one text", "another text", "a third"])
    found = evaluate(backend, None, texts)
    assert not {"bleu", "chrf"} & set(found.metrics)
    assert any("no bleu" in note and "tailor-llm[eval]" in note for note in found.notes)
    asked = len(backend.requests)
    with pytest.raises(MissingDependencyError):
        evaluate(backend, None, texts, settings=EvalSettings(metrics=("bleu",)))
    assert len(backend.requests) == asked


def test_settings_refuse_unknown_metrics_and_broken_patterns() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rougeL'"):
        EvalSettings(metrics=("rougel",))
    with pytest.raises(ConfigError, match="at least one metric"):
        EvalSettings(metrics=())
    with pytest.raises(ConfigError, match="not a regular expression"):
        EvalSettings(answer_pattern="(")


def test_rows_that_do_not_fit_and_unknown_customizations_are_refused_before_any_pass(base: Base) -> None:
    backend = Scripted(base)
    with pytest.raises(DataError, match=r"d\.jsonl:2"):
        evaluate(backend, None, rows(["fine", "long " * 300]))
    with pytest.raises(NotFoundError):
        evaluate(backend, "nobody", rows(["a", "b"]))
    assert backend.requests == []


def by_answers(found: Evaluation) -> tuple[dict[str, object], list[tuple[object, ...]]]:
    """What answers alone decide of an evaluation: those metrics, and every row's part of them."""
    keep = [name for name in found.metrics if name not in ("label_accuracy", "perplexity")]
    rows = [
        (
            row.source,
            row.prompt,
            row.reference,
            row.completion,
            row.answer,
            {n: row.scores[n] for n in keep if n in row.scores},
        )
        for row in found.rows
    ]
    return {name: found.metrics[name] for name in keep}, rows


@pytest.mark.parametrize("max_rows", [None, 5])
@pytest.mark.parametrize("pattern", [None, QUEUE])
def test_given_answers_are_scored_like_generated_ones(base: Base, pattern: str | None, max_rows: int | None) -> None:
    texts = [f"Queue: {queue}\nReply: number {k % 3}" for k, queue in enumerate(["billing", "sales"] * 6)]
    records = rows(texts if pattern else ["billing", "sales"] * 6)
    given = [f" {texts[(5 * k) % 12] if pattern else ('sales', 'tech', 'billing ')[k % 3]}\n" for k in range(12)]
    settings = EvalSettings(answer_pattern=pattern, max_rows=max_rows, seed=2)
    backend = Scripted(base, lambda prompt: given[int(prompt.split()[-1])])
    generated = evaluate(backend, None, records, settings=settings, labels=["tech", texts[0]])
    found = evaluate_answers(given, records, settings=settings, labels=["tech", texts[0]], name="by hand")
    assert by_answers(found) == by_answers(generated)
    assert (found.kind, found.reason, found.num_rows) == (generated.kind, generated.reason, max_rows or 12)
    assert found.artifact == found.to_dict()["artifact"] == "by hand"
    assert not {"label_accuracy", "perplexity"} & set(found.metrics)
    assert found.notes == [note for note in generated.notes if "label_accuracy" not in note]


def test_answers_have_no_likelihood_and_there_is_one_for_each_row(base: Base) -> None:
    records = rows(["one text", "another text", "a third"])
    found = evaluate_answers(["one text", "", "third"], records)
    assert found.metrics["exact_match"].mean == pytest.approx(1 / 3)
    assert found.rows[1].completion == ""
    assert not any("perplexity" in note for note in found.notes)
    for name in ("perplexity", "label_accuracy"):
        with pytest.raises(ConfigError, match=f"{name} cannot be computed here: it asks the model"):
            evaluate_answers(["x"] * 3, records, settings=EvalSettings(metrics=(name,)))
    with pytest.raises(DataError, match="2 answers cannot be compared with 3 rows"):
        evaluate_answers(["x"] * 2, records)


def test_a_broken_model_is_named() -> None:
    base = tiny_base()
    with torch.no_grad():
        base.model.get_output_embeddings().weight[5] = float("nan")  # type: ignore[operator]
    with pytest.raises(QualityError, match="the base gives logprobs that are NaN"):
        evaluate(Scripted(base), None, rows(["a", "b"]), settings=EvalSettings(metrics=("perplexity",)))


def test_tools_reach_the_prompt(base: Base) -> None:
    record = Conversation(messages=(user("a"), assistant("b")), tools=({"type": "function"},))
    backend = Scripted(base)
    evaluate(backend, None, [record, *rows(["c"])], settings=EvalSettings(metrics=("exact_match",)))
    assert [request.tools for request in backend.requests] == [({"type": "function"},), ()]
