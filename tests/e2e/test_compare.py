"""The comparison: every technique on the same rows, every column measured; what fails takes its row, not the run."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comparison_runs import ALL, SHARING, cells_of, quick, recipe, row_of
from mood_rows import write_lines
from tailor.artifacts.artifact import every, find
from tailor.data.readers import read_records
from tailor.data.records import completion_of, prompt_of
from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError
from tailor.inference.load import load
from tailor.recipes import compare_bases, compare_measure, compare_probes
from tailor.recipes.compare import CompareResult, compare, redraw, resume_comparison
from tailor.recipes.compare_settings import CompareRecipe


def test_every_technique_is_measured_on_the_same_rows(finished: Callable[[], CompareResult]) -> None:
    result = finished()
    named = {row["name"]: row for row in result.report["rows"]}
    assert {"base", "majority", "nearest neighbour", "tf-idf + logistic regression", *ALL} == set(named)
    assert {row["status"] for row in named.values()} == {"ok"}
    cells = cells_of(result).values()
    assert len({tuple(o["source"] for o in cell["outcomes"]) for cell in cells}) == 1
    test = read_records(result.folder / "data" / "test.jsonl").records
    learned = read_records(result.folder / "data" / "train.jsonl").records
    assert len(test) == 8
    assert not {prompt_of(r) for r in test} & {prompt_of(r) for r in learned}
    assert result.report["data"]["num_test"] == 8
    assert [completion_of(r) for r in test] == [o["reference"] for o in next(iter(cells))["outcomes"]]


def test_every_column_of_the_table_is_measured(finished: Callable[[], CompareResult]) -> None:
    report = finished().report
    for name in ALL:
        row = row_of(finished(), name)
        assert row["inference"]["ratio"]["time_to_first_token"] > 0
        assert row["forgetting"]["ratio"] > 0
        assert row["artifact_bytes"] > 0
        if name == "prompting":
            assert row["training"] is None
        else:
            assert row["training"]["num_tokens"] > 0
            assert row["training"]["peak_memory"] > 0
    assert row_of(finished(), "prompting")["inference"]["ratio"]["prompt_tokens"] > 2
    assert row_of(finished(), "lora")["inference"]["merged_ratio"]["flops_per_request"] == pytest.approx(1.0)
    assert {name: row_of(finished(), name)["mixed_batch"]["passed"] for name in ALL if name != "full"} == {
        name: True for name in ALL if name != "full"
    }
    assert len(report["claims"]) == 9
    assert [len(c["points"]) for c in report["curves"] if c["id"].endswith("/lora")] == [2]
    assert (report["machine"]["device"], report["machine"]["dtype"]) in {("cpu", "float32"), ("cuda", "bfloat16")}


def test_what_shares_a_pass_is_said(finished: Callable[[], CompareResult]) -> None:
    assert row_of(finished(), "lora")["training"]["shared_with"] == [name for name in SHARING if name != "lora"]
    assert row_of(finished(), "full")["training"]["shared_with"] == []


def test_the_winners_are_kept_as_artifacts(
    finished: Callable[[], CompareResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished().folder
    monkeypatch.setenv("TAILOR_HOME", str(folder.parents[1]))
    assert [artifact.name for artifact in every()] == sorted(f"mine-{name.replace('_', '-')}" for name in ALL)
    from tailor.recipes.verify import verify

    assert verify("mine-lora").passed
    assert load("mine-lora").generate("thing number 3?", max_new_tokens=3) is not None
    assert find("mine-lora").manifest["recipe"]["data"]["train"] == str(folder / "data" / "train.jsonl")


def test_the_report_is_drawn_again_from_its_json(finished: Callable[[], CompareResult], tmp_path: Path) -> None:
    shutil.copy(finished().folder / "report.json", tmp_path / "report.json")
    again = redraw(tmp_path / "report.json")
    assert again.report == json.loads((finished().folder / "report.json").read_text())
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_bytes() == (finished().folder / name).read_bytes()


def test_an_artifact_of_somebody_else_is_not_replaced(tiny_folder: Path, rows: Path, own_home: Path) -> None:
    taken = own_home / "artifacts" / "mine-lora"
    taken.mkdir(parents=True)
    with pytest.raises(ConflictError, match="mine-lora"):
        compare(recipe(tiny_folder, rows, techniques=["lora"]))
    assert list(taken.iterdir()) == []


def test_a_pass_that_fails_together_is_tried_one_by_one(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare_measure.train_together

    def crowded(comparison: Any, base: Any, trials: Any, cells: Any, key: str) -> None:
        if len(trials) > 1:
            raise MemoryError("too many")
        original(comparison, base, trials, cells, key)

    monkeypatch.setattr(compare_measure, "train_together", crowded)
    result = compare(quick(tiny_folder, rows, techniques=["prompt_tuning", "lora"]))
    assert row_of(result, "lora")["training"]["shared_with"] == []
    assert row_of(result, "prompt_tuning")["status"] == "ok"
    # a resumed comparison trains what is missing alone as well
    (groups,) = json.loads((result.folder / "groups.json").read_text()).values()
    assert sorted(groups) == [["lora"], ["prompt_tuning"]]


def test_a_diverging_technique_fails_alone(tiny_folder: Path, rows: Path) -> None:
    wild = {"name": "wild", "technique": "lora", "train": {"learning_rate": 1e30}}
    result = compare(quick(tiny_folder, rows, techniques=[wild, {"name": "calm", "technique": "lora"}]))
    assert row_of(result, "wild")["status"] == "failed"
    assert "infinite or NaN" in row_of(result, "wild")["error"]["message"]
    assert row_of(result, "calm")["status"] == "ok"


def test_what_cannot_be_rendered_leaves_nothing_on_the_base(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases: list[Any] = []
    original = compare_bases.load_base
    monkeypatch.setattr(compare_bases, "load_base", lambda *a: bases.append(original(*a)) or bases[-1])
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    lines = [{"messages": [{"role": r, "content": f"{t} {k}"} for r, t in turns]} for k in range(12)]
    # with chats of several turns the combination can be attached, but its rows cannot be rendered
    both = {"name": "both", "technique": [{"type": "prompting", "shots": 1}, "lora"]}
    chats = write_lines(tmp_path / "chats.jsonl", lines)
    result = compare(quick(tiny_folder, chats, techniques=[both], evaluation={"metrics": ["perplexity"]}))
    assert row_of(result, "both")["status"] == "failed"
    assert "trained_turns" in row_of(result, "both")["error"]["hint"]
    assert [base.host.slots for base in bases] == [{}]


def test_no_two_copies_of_a_base_are_held(tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[Any]] = []
    held: list[int] = []
    original = compare_bases.load_base

    def counted(*arguments: Any) -> Any:
        held.append(sum(model() is not None for model in models))
        base = original(*arguments)
        models.append(weakref.ref(base.model))
        return base

    monkeypatch.setattr(compare_bases, "load_base", counted)
    compare(quick(tiny_folder, rows, techniques=["full"], sizes=[8], tune=True, trials=3))
    assert len(held) >= 4
    assert set(held) == {0}


def test_each_is_timed_with_the_base_to_itself_against_a_plain_one(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str | None], list[int]]] = []
    original = compare_probes.latency

    def listening(own: Any, names: Any, prompts: Any, *, models: Any = None, **options: Any) -> Any:
        backends = [own, *(models or {}).values()]
        seen.append((list(names), [len(backend.base.host.slots) for backend in backends]))
        return original(own, names, prompts, models=models, repeats=1, **options)

    monkeypatch.setattr(compare_probes, "latency", listening)
    result = compare(recipe(tiny_folder, rows, techniques=["prompting", "lora", "full"], baselines=False))
    assert not (result.folder / "merged").exists()
    assert seen == [
        ([None], [0]),
        (["prompting"], [1, 0]),
        (["lora"], [1, 0]),
        ([None], [0, 0]),  # LoRA, merged
        ([None], [0, 0]),  # full, a model of its own
    ]


def test_every_technique_gets_the_same_budget(tiny_folder: Path, rows: Path) -> None:
    result = compare(quick(tiny_folder, rows, tune=True, trials=3))
    for name in ALL:
        trials = row_of(result, name)["trials"]
        assert len(trials) == 3
        assert [t["chosen"] for t in trials].count(True) == 1
        losses = [t["validation_loss"] for t in trials]
        assert losses[[t["chosen"] for t in trials].index(True)] == min(losses)


def test_seeds_repeat_the_measurement_from_the_seed_of_the_recipe(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    original = compare_measure.train_together

    def listening(comparison: Any, base: Any, trials: Any, cells: Any, key: str) -> None:
        seeds.extend(trial.run.settings.seed for trial in trials)
        original(comparison, base, trials, cells, key)

    monkeypatch.setattr(compare_measure, "train_together", listening)
    seeded = {"name": "seeded", "technique": "lora", "train": {"seed": 5}}
    result = compare(quick(tiny_folder, rows, techniques=["lora", seeded], seeds=2, sizes=[8]))
    assert seeds == [0, 5, 1, 6]
    assert len(row_of(result, "lora")["per_seed"]) == 2
    assert [cell["rows"]["train"] for cell in cells_of(result).values() if cell["name"] == "lora"] == [8, 8]


def test_text_tasks_and_conversations(tiny_folder: Path, tmp_path: Path) -> None:
    turns = [
        [
            {"role": "user", "content": f"say {k}"},
            {"role": "assistant", "content": f"number {k} is what you want"},
            {"role": "user", "content": f"and {k + 1}"},
            {"role": "assistant", "content": f"that would be {k + 1} of course"},
        ]
        for k in range(24)
    ]
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": t} for t in turns])
    result = compare(recipe(tiny_folder, path, techniques=["prompting", "lora"]))
    assert result.report["metric"]["name"] == "rougeL"
    assert {row["name"] for row in result.report["rows"]} == {"base", "nearest neighbour", "prompting", "lora"}
    assert {row["status"] for row in result.report["rows"]} == {"ok"}


def test_shots_are_reduced_to_what_fits_and_it_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    context = load(tiny_folder).base.max_seq_len
    words = "word " * (context // 12)
    long = write_lines(tmp_path / "a.jsonl", [{"prompt": f"{words}{k}", "completion": "ab"[k % 2]} for k in range(20)])
    row = row_of(compare(quick(tiny_folder, long, techniques=["prompting"])), "prompting")
    assert row["status"] == "ok"
    assert any("reduced to shots" in note and "fits into the context" in note for note in row["notes"])
    # a training row is never asked: with shots of its own it need not fit
    lines = [{"prompt": f"q {k}", "completion": "ab"[k % 2]} for k in range(20)]
    train = write_lines(tmp_path / "b.jsonl", [*lines, {"prompt": "word " * (context // 8), "completion": "a"}])
    sides = {"test": str(write_lines(tmp_path / "t.jsonl", lines[:4])), "validation": str(tmp_path / "t.jsonl")}
    fixed = {"type": "prompting", "selection": "fixed", "shots": 8}
    result = compare(quick(tiny_folder, train, name="asked", techniques=[fixed], data=sides))
    row = row_of(result, "prompting")
    assert (row["status"], row["settings"][0]["shots"], row["settings"][0]["examples"]) == ("ok", 8, [])
    leaks = "4 of 4 {} rows have a prompt that also stands in the {} rows"
    said = [("test", "training"), ("test", "validation"), ("validation", "training")]
    assert result.report["data"]["notes"][:3] == [leaks.format(*pair) for pair in said]


def test_fewer_rows_than_shots_are_shown_as_they_are(tiny_folder: Path, rows: Path) -> None:
    told: list[str] = []
    few = quick(tiny_folder, rows, techniques=["prompting"], sizes=[2], tune=True, trials=3)
    row = row_of(compare(few, say=told.append), "prompting")
    assert (row["status"], row["settings"][0]["shots"]) == ("ok", 2)
    assert any(note.startswith("reduced to shots 2") for note in row["notes"])
    assert [trial["error"] for trial in row["trials"]] == [None] * 3
    assert told == []


def test_two_bases_stand_side_by_side(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-base"
    shutil.copytree(tiny_folder, other)
    one = recipe(tiny_folder, rows, techniques=["lora"], baselines=False)
    bases = (*one.base, one.base[0].model_copy(update={"name": str(other)}))
    result = compare(one.model_copy(update={"base": bases}))
    assert {row["base"] for row in result.report["rows"]} == {str(tiny_folder), str(other)}
    assert [artifact.name for artifact in every()] == ["mine-base1-lora", "mine-base2-lora"]


def test_preferences_are_refused_with_a_way_on(tiny_folder: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"p{k}", "chosen": "good", "rejected": "bad"} for k in range(8)]
    with pytest.raises(DataError, match="Comparison"):
        compare(recipe(tiny_folder, write_lines(tmp_path / "pairs.jsonl", lines)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"techniques": ["lora", "lora"]}, "called 'lora'"),
        ({"techniques": [{"name": n, "technique": "lora"} for n in ("my lora", "my-lora")]}, "under the same name"),
        ({"techniques": [{"name": "x" * 60, "technique": "lora"}], "name": "y" * 60}, "artifact's name"),
        ({"metric": "macro_f1"}, "no score per row"),
        ({"metric": "rougeL"}, "not among those measured"),
        ({"evaluation": {"max_rows": 4}}, "data.max_test_rows"),
        ({"train": {"tensorboard": True}}, "tensorboard"),
        ({"data": {"max_seq_len": 5000}}, "beyond the context"),
        ({"general_text": "/nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    changes: dict[str, Any], message: str, tiny_folder: Path, rows: Path, own_home: Path
) -> None:
    with pytest.raises((ConfigError, DataError, ValueError), match=message):
        compare(recipe(tiny_folder, rows, **changes))
    assert not (own_home / "comparisons" / "mine" / "cells").exists()


def test_an_entry_may_count_its_steps_otherwise() -> None:
    one = CompareRecipe(
        name="x",
        data={"train": "x"},  # type: ignore[arg-type]
        train={"num_steps": 100, "batch_size": 4},  # type: ignore[arg-type]
        techniques=[{"technique": "lora", "train": {"num_epochs": 3}}, "full"],  # type: ignore[arg-type]
    )
    found = [one.train_of(entry) for entry in one.techniques]
    assert [(s.num_steps, s.num_epochs, s.batch_size) for s in found] == [(None, 3.0, 4), (100, None, 4)]
    again = CompareRecipe.model_validate(one.resolved())
    assert [again.train_of(entry) for entry in again.techniques] == found


def test_flags_that_look_like_yaml_stay_texts() -> None:
    from tailor.cli.compare import _as_overrides
    from tailor.config import load_recipe

    flags = {"name": "2024", "evaluation.answer_pattern": '[A-D] "é"', "sizes": [8, "all"], "seeds": None}
    found = load_recipe(None, CompareRecipe, _as_overrides(flags), {"data": {"train": "x"}}).recipe
    assert (found.name, found.evaluation.answer_pattern, found.sizes) == ("2024", '[A-D] "é"', (8, "all"))


def test_unknown_names_are_told(own_home: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no comparison"):
        resume_comparison("nothing")
    with pytest.raises(NotFoundError, match="there is no report"):
        redraw("nothing")


def test_every_technique_has_its_place() -> None:
    assert [entry.title for entry in CompareRecipe(name="x", data={"train": "x"}).techniques] == ALL  # type: ignore[arg-type]
