"""`tailor recommend`: the ladder, what overrules it, and the facts it stands on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailor.errors import ConfigError, DataError
from tailor.recipes.recommend import recommend
from tailor.recipes.recommend_evidence import Evidence, evidence, measured, rank, similar
from tailor.recipes.recommend_rule import CHECKS, LADDER, SHOTS, Facts, Standing, by_ladder, step_of
from tailor.techniques import TECHNIQUES
from tailor.techniques.prompting import Prompting
from tiny_models import tiny_model, tiny_tokenizer

GIB = 2**30
TRAITS = {name: TECHNIQUES[name].traits for name in ("prompting", "prompt_tuning", "lora", "full")}
SMALL = Facts(rows=1000, kind="labels", labels=10, base_parameters=7_000_000, context=1024, memory=24 * GIB)
LARGE = replace(SMALL, base="seven-b", base_parameters=7_000_000_000, context=8192, memory=80 * GIB, gpu=True)


def order(facts: Facts, *pieces: Evidence, objectives: tuple[str, ...] = ("sft",)) -> list[str]:
    return [choice.name for choice in rank(facts, TRAITS, objectives, pieces).choices]


def standings(facts: Facts) -> dict[str, Standing | None]:
    return {choice.name: choice.standing for choice in by_ladder(facts, TRAITS)}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (5, ["prompting", "lora", "prompt_tuning", "full"]),  # prompts first, then what lacks fewest rows
        (60, ["prompting", "lora", "prompt_tuning", "full"]),
        (250, ["lora", "prompting", "full", "prompt_tuning"]),  # enough: lora, prompting; few: full, prompt tuning
        (400, ["lora", "prompt_tuning", "prompting", "full"]),
        (5000, ["full", "lora", "prompt_tuning", "prompting"]),  # the whole ladder, from the top
    ],
)
def test_the_ladder_is_climbed_as_far_as_the_rows_carry(rows: int, expected: list[str]) -> None:
    roomy = replace(LARGE, rows=rows, memory=1000 * GIB)
    assert order(roomy) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (32, ["lora", "full", "prompt_tuning", "prompting"]),
        (60, ["lora", "full", "prompt_tuning", "prompting"]),
        (300, ["full", "lora", "prompt_tuning", "prompting"]),
        (9000, ["full", "lora", "prompt_tuning", "prompting"]),
    ],
)
def test_a_small_base_is_trained_and_not_talked_to(rows: int, expected: list[str]) -> None:
    assert order(replace(SMALL, rows=rows)) == expected


def test_what_does_not_fit_comes_last_and_says_so_in_numbers() -> None:
    # 7e9 weights × 16 bytes × 1.25 = 130 GiB beyond 80 GiB; the frozen base takes 7e9 × 2 × 1.25 = 16 GiB
    facts = replace(LARGE, rows=5000)
    assert order(facts)[-1] == "full"
    full = by_ladder(facts, TRAITS)[-1]
    assert full.standing == Standing.EXCLUDED
    assert "130 GiB" in full.reasons[0]
    assert "80 GiB" in full.reasons[0]
    assert standings(facts)["lora"] == Standing.ENOUGH
    assert set(standings(replace(facts, memory=8 * GIB)).values()) == {Standing.EXCLUDED}
    assert standings(replace(facts, memory=None))["full"] == Standing.ENOUGH


def test_customizations_side_by_side_put_what_cannot_share_a_batch_behind() -> None:
    assert order(replace(SMALL, customizations=3))[:2] == ["lora", "full"]
    assert standings(replace(SMALL, customizations=3))["full"] == Standing.APART
    assert standings(SMALL)["full"] == Standing.ENOUGH


def test_examples_that_do_not_fit_into_the_context_hold_prompting_back() -> None:
    assert Prompting().shots == SHOTS
    long = replace(LARGE, rows=60, context=1000, prompt_tokens=190.0, completion_tokens=11.0)  # 5 × 201 tokens
    assert standings(long)["prompting"] == Standing.WEAK
    assert standings(replace(long, prompt_tokens=189.0))["prompting"] == Standing.ENOUGH


def test_every_registered_technique_has_a_place_and_a_reason() -> None:
    traits = {name: one.traits for name, one in TECHNIQUES.items()}
    choices = by_ladder(SMALL, traits)
    assert {choice.name for choice in choices} == set(TECHNIQUES)
    assert all(choice.reasons for choice in choices)
    assert [LADDER[step_of(TRAITS[name])].family for name in TRAITS] == [
        "prompt engineering",
        "prompt learning",
        "parameter-efficient fine-tuning",
        "full fine-tuning",
    ]
    assert len(CHECKS) == 5


def test_knowledge_that_changes_asks_for_retrieval() -> None:
    assert order(replace(SMALL, changes="daily"))[0] == "rag"
    assert order(replace(SMALL, changes="monthly"))[-1] == "rag"
    assert "rag" not in order(SMALL)
    daily = rank(replace(SMALL, changes="daily"), TRAITS, ("sft",))
    assert not daily.choices[0].available
    assert daily.first_technique == "full"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (Facts(comparisons=700), ["dpo", "rlhf"]),
        (Facts(judged=50), ["kto"]),
        (Facts(rated=90, attributes=("helpfulness", "humor")), ["steerlm"]),
        (Facts(documents=12), ["rag", "pretraining"]),
        (Facts(retrievals=12), ["rag"]),
    ],
)
def test_rows_without_completions_ask_for_something_else(facts: Facts, expected: list[str]) -> None:
    ranking = rank(facts, TRAITS, ("sft",))
    assert [choice.name for choice in ranking.choices] == expected
    assert not any(choice.available for choice in ranking.choices)
    assert ranking.first_technique is None


def test_an_objective_that_is_registered_can_be_used() -> None:
    choices = rank(Facts(comparisons=700), TRAITS, ("sft", "dpo")).choices
    assert [(choice.name, choice.available) for choice in choices] == [("dpo", True), ("rlhf", False)]


def piece(**changes: Any) -> Evidence:
    standard: dict[str, Any] = {
        "comparison": "other",
        "same_rows": False,
        "kind": "labels",
        "base": "tailor-nano",
        "base_parameters": 7_000_000,
        "size": 1000,
        "metric": "accuracy",
        "higher_is_better": True,
        "scores": {"lora": 0.8, "full": 0.6, "prompting": 0.1},
    }
    return Evidence(**{**standard, **changes})


def test_what_was_measured_on_similar_rows_moves_the_best_to_the_front() -> None:
    ranking = rank(SMALL, TRAITS, ("sft",), [piece()])
    assert ranking.decided_by == "similar rows"
    assert [choice.name for choice in ranking.choices] == ["lora", "full", "prompt_tuning", "prompting"]
    assert "put before full" in ranking.choices[0].reasons[0]
    # shares of the best: lora 0.8 / 0.8, full 0.6 / 0.8, prompting 0.1 / 0.8
    assert "other (labels, 1,000 rows)" in ranking.measured[0]
    assert "lora 100 %, full 75 %, prompting 12 %" in ranking.measured[0]


def test_a_small_lead_in_similar_comparisons_moves_nothing_but_is_told() -> None:
    ranking = rank(SMALL, TRAITS, ("sft",), [piece(scores={"lora": 0.80, "full": 0.79})])
    assert (ranking.decided_by, ranking.first_technique) == ("rule", "full")
    assert "lora 100 %, full 99 %" in ranking.measured[0]


def test_a_lead_within_the_noise_moves_nothing() -> None:
    # full trails by 0.2 / 0.8 = 0.25 of the best score; two half-widths of h make a noise of √2·h / 0.8
    noisy, clear = dict.fromkeys(("lora", "full"), 0.15), dict.fromkeys(("lora", "full"), 0.13)
    assert piece(errors=noisy).lead("lora", "full") == pytest.approx((0.25, 2**0.5 * 0.15 / 0.8))
    assert order(SMALL, piece(errors=noisy))[0] == "full"
    assert order(SMALL, piece(errors=clear))[0] == "lora"
    # the mean of two such comparisons is less noisy by √2
    assert order(SMALL, piece(errors=noisy), piece(comparison="second", errors=noisy))[0] == "lora"


def test_several_similar_comparisons_are_averaged() -> None:
    ahead, behind = piece(comparison="a"), piece(comparison="b", scores={"lora": 0.1, "full": 0.9})
    assert rank(SMALL, TRAITS, ("sft",), [ahead, behind]).first_technique == "full"  # 1 - 0.75 against 1 - 0.11
    assert rank(SMALL, TRAITS, ("sft",), [ahead, piece(comparison="b")]).first_technique == "lora"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "text"},
        {"size": 200},
        {"size": 4100},
        {"base_parameters": 70_000_000},
        {"scores": {"lora": 0.0, "full": 0.0}},
    ],
)
def test_what_is_not_similar_is_no_evidence(change: dict[str, Any]) -> None:
    assert similar(SMALL, [piece(**change)]) == []
    assert order(SMALL, piece(**change))[0] == "full"


def test_of_one_comparison_the_closest_size_counts() -> None:
    pieces = [piece(size=300), piece(size=900), piece(size=3000)]
    assert [one.size for one in similar(SMALL, pieces)] == [900]


def test_lower_is_better_is_read_the_other_way_round() -> None:
    one = piece(metric="perplexity", higher_is_better=False, scores={"lora": 2.0, "full": 4.0})
    assert one.shares == {"lora": 1.0, "full": 0.5}
    assert order(SMALL, one)[0] == "lora"


def test_what_was_measured_on_the_same_rows_decides() -> None:
    own = piece(same_rows=True, comparison="mine", pick="prompting", headline="Prompting is enough.")
    ranking = rank(SMALL, TRAITS, ("sft",), [own])
    assert ranking.decided_by == "same rows"
    assert [choice.name for choice in ranking.choices] == ["prompting", "lora", "full", "prompt_tuning"]
    assert ranking.choices[1].reasons[0] == "measured on these rows: accuracy 0.800"
    assert ranking.measured == ("mine measured these rows, with 1,000 to learn from: Prompting is enough.",)


def test_a_verdict_for_what_needs_no_training_stands_first() -> None:
    own = piece(same_rows=True, untrained="tf-idf (no language model)", headline="No model is needed.")
    ranking = rank(SMALL, TRAITS, ("sft",), [own])
    assert [choice.name for choice in ranking.choices[:2]] == ["tf-idf (no language model)", "lora"]
    assert ranking.first_technique == "lora"


def test_a_verdict_does_not_lift_what_cannot_be_served_side_by_side() -> None:
    own = piece(same_rows=True, pick="full", scores={"lora": 0.5, "full": 0.9})
    assert order(replace(SMALL, customizations=4), own)[0] == "lora"
    assert order(SMALL, own)[0] == "full"


def test_the_same_rows_on_another_base_are_told_only() -> None:
    own = piece(same_rows=True, base="big", base_parameters=7_000_000_000, pick="lora", headline="LoRA wins.")
    ranking = rank(SMALL, TRAITS, ("sft",), [own])
    assert ranking.decided_by == "rule"
    assert ranking.measured == ("other measured these rows on big: LoRA wins.",)


def report(content_hash: str = "abc", pick: str = "tailor-nano/full") -> dict[str, Any]:
    def row(name: str, kind: str = "technique", base: str | None = "tailor-nano") -> dict[str, Any]:
        settings = [{"type": name.split("-")[0]}] if kind == "technique" else []
        parameters = None if base is None else 7_000_000
        return {
            "id": f"{base or 'baseline'}/{name}",
            "base": base,
            "name": name,
            "kind": kind,
            "settings": settings,
            "base_parameters": parameters,
        }

    def curve(name: str, *means: float | None) -> dict[str, Any]:
        points = [
            {"size": size, "mean": mean, "low": mean and mean - 0.02, "high": mean and mean + 0.06}
            for size, mean in zip((100, 1000), means, strict=True)
        ]
        return {"id": name, "points": points}

    both = {**row("both"), "settings": [{"type": "lora"}, {"type": "prompting"}]}
    return {
        "name": "mine",
        "created": "2026-01-01T00:00:00+00:00",
        "data": {"content_hash": content_hash, "kind": "labels"},
        "metric": {"name": "accuracy", "higher_is_better": True},
        "rows": [
            row("majority", "baseline", None),
            row("base", "base"),
            row("lora-8"),
            row("lora-64"),
            row("full"),
            row("prompting"),
            both,
        ],
        "curves": [
            curve("baseline/majority", 0.2, 0.2),
            curve("tailor-nano/base", 0.0, 0.0),
            curve("tailor-nano/lora-8", 0.5, 0.6),
            curve("tailor-nano/lora-64", 0.4, 0.7),
            curve("tailor-nano/full", 0.3, 0.8),
            curve("tailor-nano/prompting", None, 0.1),
            curve("tailor-nano/both", 0.9, 0.9),
        ],
        "verdict": {"pick": pick, "sentences": ["Full fine-tuning is best."]},
    }


def test_a_report_becomes_one_piece_of_evidence_per_size() -> None:
    few, many = evidence(report())
    assert (few.size, few.scores, few.pick) == (100, {"lora": 0.5, "full": 0.3}, None)
    assert (many.size, many.scores, many.pick) == (1000, {"lora": 0.7, "full": 0.8, "prompting": 0.1}, "full")
    assert many.errors == pytest.approx({"lora": 0.04, "full": 0.04, "prompting": 0.04})
    assert (many.kind, many.base, many.base_parameters, many.same_rows) == ("labels", "tailor-nano", 7_000_000, False)


@pytest.mark.parametrize(
    ("pick", "expected"),
    [("tailor-nano/base", "the plain base"), ("baseline/majority", "majority (no language model)")],
)
def test_a_verdict_for_what_trains_nothing_is_kept(pick: str, expected: str) -> None:
    assert [one.untrained for one in evidence(report(pick=pick))] == [None, expected]


@pytest.mark.parametrize(("found", "same"), [("abc", True), ("abc+test", True), ("abcd", False)])
def test_the_same_rows_are_known_by_the_training_file(found: str, same: bool) -> None:
    assert {one.same_rows for one in evidence(report(found), "abc")} == {same}


def test_damaged_reports_are_named_and_left_aside(tmp_path: Path) -> None:
    for name, text in (("good", json.dumps(report())), ("torn", '{"name": '), ("alien", "[1]"), ("old", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(text)
    found, unread = measured(tmp_path)
    assert len(found) == 2
    assert len(unread) == 3
    assert all("not a report of a comparison" in note for note in unread)
    assert measured(tmp_path / "nothing") == ([], [])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path / "home"))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tickets(here: Path, number: int = 300) -> Path:
    queues = ("billing", "delivery", "returns")
    return write(here / "t.jsonl", [{"prompt": f"ticket {k}", "completion": queues[k % 3]} for k in range(number)])


def test_facts_of_a_label_set(here: Path) -> None:
    found = recommend(tickets(here))
    facts = found.facts
    assert (facts.rows, facts.kind, facts.labels) == (300, "labels", 3)
    assert (facts.base, facts.context) == ("tailor-nano", 1024)
    assert 6e6 < facts.base_parameters < 8e6
    assert 0 < facts.completion_tokens < facts.prompt_tokens <= facts.longest_row < 20
    assert found.ranking.first_technique == "full"
    assert found.commands == (
        f"tailor compare {found.path} --techniques full,lora,ia3",
        f"tailor tune {found.path} --technique full",
    )
    assert any("no language model" in note for note in found.notes)


def test_a_finished_comparison_of_the_file_is_quoted_and_not_asked_for_again(here: Path) -> None:
    path = tickets(here)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = here / "home" / "comparisons" / "mine"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(report(f"{digest}+0", pick="tailor-nano/lora-64")))
    found = recommend(path)
    assert found.ranking.decided_by == "same rows"
    assert found.ranking.first_technique == "lora"
    assert found.ranking.measured[0].endswith("Full fine-tuning is best.")
    assert found.commands == (f"tailor tune {path} --technique lora",)


def test_a_comparison_on_a_local_base_is_found_by_its_relative_path(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, base = tickets(here), here / "tiny"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().hf.save_pretrained(base)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = here / "home" / "comparisons" / "mine"
    folder.mkdir(parents=True)
    text = json.dumps(report(f"{digest}+0")).replace("tailor-nano", str(base))
    (folder / "report.json").write_text(text)
    monkeypatch.chdir(here)
    found = recommend(path, base="tiny")
    assert (found.facts.base, found.ranking.decided_by) == (str(base), "same rows")
    assert "--base tiny" in found.commands[-1]


def test_lora_is_always_among_those_to_compare_and_flags_travel(here: Path) -> None:
    rows = [{"text": f"How many is {k} and {k}?", "out": f"twice\n#### {2 * k}"} for k in range(12)]
    path = write(here / "sums of two.jsonl", rows)
    found = recommend(path, columns={"prompt": "text", "completion": "out"}, answer_pattern="#### (.*)")
    assert found.facts.kind == "answers and text"
    compare, tune = found.commands
    assert compare == (
        f"tailor compare '{path}' --techniques lora,ia3,adapter --answer-pattern '#### (.*)' "
        "--columns prompt=text --columns completion=out"
    )
    assert tune.startswith(f"tailor tune '{path}' --technique lora --columns")


def test_an_answer_pattern_that_matches_nothing_is_an_error(here: Path) -> None:
    with pytest.raises(DataError, match="matches nothing"):
        recommend(tickets(here, 12), answer_pattern="#### (.*)")


def test_preferences_are_recognised(here: Path) -> None:
    rows = [{"prompt": f"q{k}", "chosen": "yes", "rejected": "no"} for k in range(5)]
    found = recommend(write(here / "p.jsonl", rows))
    assert (found.facts.rows, found.facts.comparisons, found.facts.kind) == (0, 5, None)
    assert [choice.name for choice in found.ranking.choices] == ["dpo", "rlhf"]
    assert found.to_dict()["first_technique"] is None


def test_documents_are_recognised(here: Path) -> None:
    found = recommend(write(here / "d.jsonl", [{"text": f"Page {k} of the manual."} for k in range(5)]))
    assert (found.facts.rows, found.facts.documents) == (0, 5)
    assert found.ranking.choices[0].name == "rag"
    assert found.commands == ()


def test_labels_with_few_rows_and_rows_beyond_the_context_are_noted(here: Path) -> None:
    rows = [{"prompt": f"case {k}", "completion": f"label {k % 10}"} for k in range(30)]
    notes = recommend(write(here / "few.jsonl", rows)).notes
    assert any(note.startswith("10 labels with 3 rows each on average") for note in notes)
    long = [{"prompt": "word " * 3000, "completion": "one"}, {"prompt": "x", "completion": "two"}]
    found = recommend(write(here / "long.jsonl", long))
    assert found.facts.longest_row > 1024
    assert any("`data.truncation`" in note for note in found.notes)


def test_rows_that_cannot_be_used_are_counted(here: Path) -> None:
    path = tickets(here, 12)
    path.write_text(path.read_text() + '{"prompt": "no answer"}\n')
    with pytest.raises(DataError, match="1 of 13 rows"):
        recommend(path)
    found = recommend(path, skip_bad_rows=True)
    assert found.facts.rows == 12
    assert "rows that cannot be used were left out: 1" in found.notes
    assert all(command.endswith("data.skip_bad_rows=true") for command in found.commands)


def test_when_nothing_suits_it_is_said(here: Path) -> None:
    assert any("no technique has the rows" in note for note in recommend(tickets(here, 12)).notes)
    assert not any("no technique has the rows" in note for note in recommend(tickets(here)).notes)


def test_chats_and_ratings_are_recognised(here: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert recommend(write(here / "chat.jsonl", [{"messages": turns}] * 3)).facts.rows == 3
    scores = {"helpfulness": 3, "correctness": 2, "coherence": 4, "complexity": 1, "verbosity": 0}
    found = recommend(write(here / "rated.jsonl", [{"prompt": "q", "response": "a", **scores}]))
    assert (found.facts.rated, found.facts.attributes) == (1, tuple(scores))
    assert [choice.name for choice in found.ranking.choices] == ["steerlm"]


def test_customizations_must_be_positive(here: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        recommend(tickets(here, 12), customizations=0)
