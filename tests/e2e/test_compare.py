"""The comparison: every technique on the same rows; killed anywhere it comes to the same table; failures take a row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tailor.artifacts.artifact import every, find
from tailor.data.readers import read_records
from tailor.data.records import completion_of, prompt_of
from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError
from tailor.inference.load import load
from tailor.recipes import compare_measure
from tailor.recipes.compare import CompareResult, compare, redraw, resume_comparison
from tailor.recipes.compare_settings import CompareRecipe
from tailor.recipes.tune import BaseSettings
from tailor.techniques import TECHNIQUES

ALL = list(TECHNIQUES)
COLOURS = ("red", "green", "blue", "white")
STEPS = {"num_steps": 6, "batch_size": 4, "eval_every": 3, "learning_rate": 0.01}


def recipe(base: Path, rows: Path, **more: Any) -> CompareRecipe:
    small: dict[str, Any] = {"num_virtual_tokens": 4}
    entries = [{"type": name, **(small if name == "prompt_tuning" else {})} for name in more.pop("techniques", ALL)]
    return CompareRecipe.model_validate(
        {
            "name": "mine",
            "base": str(base),
            "data": {"train": str(rows)},
            "techniques": entries,
            "train": STEPS,
            "evaluation": {"sampling": {"max_new_tokens": 4}},
            **more,
        }
    )


def scores(result: CompareResult) -> list[tuple[Any, ...]]:
    """Everything in the table that does not depend on the clock."""
    return [
        (row["id"], row["status"], row["metrics"], row["per_seed"], row["num_parameters"], row["rows_used"])
        for row in result.report["rows"]
    ] + [(curve["id"], [(p["size"], p["mean"]) for p in curve["points"]]) for curve in result.report["curves"]]


def outcomes(folder: Path) -> dict[str, list[Any]]:
    cells = {path.name: json.loads(path.read_text()) for path in (folder / "cells").glob("*.json")}
    return {name: cell["outcomes"] for name, cell in cells.items()}


def row_of(result: CompareResult, name: str) -> dict[str, Any]:
    return next(row for row in result.report["rows"] if row["name"] == name)


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], CompareResult]:
    """A comparison of everything at two sizes, made once; nobody may change it."""
    home = tmp_path_factory.mktemp("finished")
    rows = home / "rows.jsonl"
    lines = [{"prompt": f"thing number {k}?", "completion": COLOURS[k % 4]} for k in range(40)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(home))
        result = compare(recipe(tiny_folder, rows, sizes=[8, "all"]), command="tailor compare rows.jsonl")
    return lambda: result


def test_every_technique_is_measured_on_the_same_rows(finished: Callable[[], CompareResult]) -> None:
    result = finished()
    named = {row["name"]: row for row in result.report["rows"]}
    assert {"base", "majority", "nearest neighbour", "tf-idf + logistic regression", *ALL} == set(named)
    assert {row["status"] for row in named.values()} == {"ok"}
    references = {tuple(o["source"] for o in rows) for rows in outcomes(result.folder).values()}
    assert len(references) == 1
    test = read_records(result.folder / "data" / "test.jsonl").records
    learned = read_records(result.folder / "data" / "train.jsonl").records
    assert len(test) == 8
    assert not {prompt_of(r) for r in test} & {prompt_of(r) for r in learned}
    assert result.report["data"]["num_test"] == 8
    assert [completion_of(r) for r in test] == [o["reference"] for o in next(iter(outcomes(result.folder).values()))]


def test_every_column_of_the_table_is_measured(finished: Callable[[], CompareResult]) -> None:
    report = finished().report
    for name in ALL:
        row = row_of(finished(), name)
        assert row["inference"]["ratio"]["time_to_first_token"] > 0
        assert row["forgetting"]["ratio"] > 0
        assert row["artifact_bytes"] > 0
        assert row["training"] is None if name == "prompting" else row["training"]["num_tokens"] > 0
    assert row_of(finished(), "prompting")["inference"]["ratio"]["prompt_tokens"] > 2
    assert row_of(finished(), "lora")["inference"]["merged_ratio"]["flops_per_request"] == pytest.approx(1.0)
    assert {name: row_of(finished(), name)["mixed_batch"]["passed"] for name in ALL if name != "full"} == {
        name: True for name in ALL if name != "full"
    }
    assert len(report["claims"]) == 9
    assert [len(c["points"]) for c in report["curves"] if c["id"].endswith("/lora")] == [2]


def test_what_shares_a_pass_is_said(finished: Callable[[], CompareResult]) -> None:
    assert row_of(finished(), "lora")["training"]["shared_with"] == ["prompt_tuning"]
    assert row_of(finished(), "full")["training"]["shared_with"] == []


def test_the_winners_are_kept_as_artifacts(
    finished: Callable[[], CompareResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished().folder
    monkeypatch.setenv("TAILOR_HOME", str(folder.parents[1]))
    assert [artifact.name for artifact in every()] == ["mine-full", "mine-lora", "mine-prompt-tuning", "mine-prompting"]
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


STOPS = (
    "baselines",
    "{base}/base/29/0: generate",
    "train {base}: prompt_tuning, lora (8 rows, seed 0)",
    "{base}/lora/8/0: generate",
    "train {base}: full (29 rows, seed 0)",
    "{base}/full/29/0: perplexity",
    "probes",
)


@pytest.mark.parametrize("stop", STOPS)
def test_killed_anywhere_it_comes_to_the_same_table(
    stop: str, finished: Callable[[], CompareResult], tiny_folder: Path, rows: Path
) -> None:
    """A KeyboardInterrupt that nobody handles leaves the disk as a kill does."""
    wanted = stop.format(base=tiny_folder)
    asked: list[str] = []

    def strike(stage: str, done: int, total: int) -> None:
        asked.append(stage)
        if stage == wanted:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recipe(tiny_folder, rows, sizes=[8, "all"]), progress=strike)
    assert wanted in asked
    result = resume_comparison("mine")
    assert scores(result) == scores(finished())
    assert outcomes(result.folder).keys() == outcomes(finished().folder).keys()


def test_the_same_command_prints_a_finished_comparison_without_work(tiny_folder: Path, rows: Path) -> None:
    one = recipe(tiny_folder, rows, techniques=["lora"])
    first = compare(one)
    stages: list[str] = []
    second = compare(one, progress=lambda stage, done, total: stages.append(stage))
    assert stages == []
    assert second.report == first.report


def test_other_settings_under_the_same_name_are_a_conflict(tiny_folder: Path, rows: Path) -> None:
    compare(recipe(tiny_folder, rows, techniques=["lora"]))
    other = recipe(tiny_folder, rows, techniques=["prompting"])
    with pytest.raises(ConflictError, match="other settings"):
        compare(other)
    assert row_of(compare(other, force=True), "prompting")["status"] == "ok"


def test_changed_rows_are_a_conflict(tiny_folder: Path, rows: Path) -> None:
    compare(recipe(tiny_folder, rows, techniques=["prompting"]))
    rows.write_text(rows.read_text().replace("red", "grey"))
    with pytest.raises(ConflictError, match="have changed"):
        compare(recipe(tiny_folder, rows, techniques=["prompting"]))


def test_an_artifact_of_somebody_else_is_not_replaced(tiny_folder: Path, rows: Path, own_home: Path) -> None:
    taken = own_home / "artifacts" / "mine-lora"
    taken.mkdir(parents=True)
    with pytest.raises(ConflictError, match="mine-lora"):
        compare(recipe(tiny_folder, rows, techniques=["lora"]))
    assert list(taken.iterdir()) == []


def test_a_technique_that_fails_takes_its_row_and_can_be_tried_again(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = TECHNIQUES["lora"].attach

    def broken(self: Any, slot: Any) -> None:
        raise ConfigError("no linear layer matches")

    both = recipe(tiny_folder, rows, techniques=["prompt_tuning", "lora"])
    monkeypatch.setattr(TECHNIQUES["lora"], "attach", broken)
    result = compare(both)
    assert row_of(result, "lora")["status"] == "failed"
    assert row_of(result, "lora")["error"]["message"] == "no linear layer matches"
    assert row_of(result, "prompt_tuning")["status"] == "ok"
    assert result.report["failures"][0]["id"].endswith("/lora")
    monkeypatch.setattr(TECHNIQUES["lora"], "attach", healthy)
    assert row_of(compare(both), "lora")["status"] == "failed"
    assert row_of(compare(both, retry=True), "lora")["status"] == "ok"


def test_a_pass_that_fails_together_is_tried_one_by_one(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare_measure.train_together

    def crowded(comparison: Any, base: Any, trials: Any, key: str) -> None:
        if len(trials) > 1:
            raise MemoryError("too many")
        original(comparison, base, trials, key)

    monkeypatch.setattr(compare_measure, "train_together", crowded)
    result = compare(recipe(tiny_folder, rows, techniques=["prompt_tuning", "lora"]))
    assert row_of(result, "lora")["training"]["shared_with"] == []
    assert row_of(result, "prompt_tuning")["status"] == "ok"


def test_a_diverging_technique_fails_alone(tiny_folder: Path, rows: Path) -> None:
    entries = [
        {"name": "wild", "technique": "lora", "train": {"learning_rate": 1e30}},
        {"name": "calm", "technique": "lora"},
    ]
    result = compare(recipe(tiny_folder, rows).model_copy(update={"techniques": entries_of(entries)}))
    assert row_of(result, "wild")["status"] == "failed"
    assert "infinite or NaN" in row_of(result, "wild")["error"]["message"]
    assert row_of(result, "calm")["status"] == "ok"


def entries_of(entries: list[dict[str, Any]]) -> Any:
    return CompareRecipe(name="x", data={"train": "x"}, techniques=entries).techniques  # type: ignore[arg-type]


def test_every_technique_gets_the_same_budget(tiny_folder: Path, rows: Path) -> None:
    result = compare(recipe(tiny_folder, rows, tune=True, trials=3))
    for name in ALL:
        trials = row_of(result, name)["trials"]
        assert len(trials) == 3
        assert [t["chosen"] for t in trials].count(True) == 1
        losses = [t["validation_loss"] for t in trials]
        assert losses[[t["chosen"] for t in trials].index(True)] == min(losses)


def test_seeds_repeat_the_measurement(tiny_folder: Path, rows: Path) -> None:
    result = compare(recipe(tiny_folder, rows, techniques=["lora"], seeds=2, sizes=[8]))
    assert len(row_of(result, "lora")["per_seed"]) == 2
    drawn = [json.loads(p.read_text())["rows"]["train"] for p in (result.folder / "cells").glob("lora-*.json")]
    assert drawn == [8, 8]


def test_text_tasks_and_conversations(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    turns = [
        [
            {"role": "user", "content": f"say {k}"},
            {"role": "assistant", "content": f"number {k} is what you want"},
            {"role": "user", "content": f"and {k + 1}"},
            {"role": "assistant", "content": f"that would be {k + 1} of course"},
        ]
        for k in range(24)
    ]
    path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    result = compare(recipe(tiny_folder, path, techniques=["prompting", "lora"]))
    assert result.report["metric"]["name"] == "rougeL"
    assert {row["name"] for row in result.report["rows"]} == {"base", "nearest neighbour", "prompting", "lora"}
    assert {row["status"] for row in result.report["rows"]} == {"ok"}


def test_shots_that_do_not_fit_are_reduced_and_it_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    context = load(tiny_folder).base.max_seq_len
    lines = [{"prompt": "word " * (context // 12) + str(k), "completion": ("a", "b")[k % 2]} for k in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = row_of(compare(recipe(tiny_folder, path, techniques=["prompting"])), "prompting")
    assert row["status"] == "ok"
    assert any("reduced to shots" in note for note in row["notes"])


def test_two_bases_stand_side_by_side(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    other = tmp_path / "other-base"
    shutil.copytree(tiny_folder, other)
    bases = tuple(BaseSettings(name=str(folder)) for folder in (tiny_folder, other))
    result = compare(recipe(tiny_folder, rows, techniques=["lora"]).model_copy(update={"base": bases}))
    assert {row["base"] for row in result.report["rows"]} == {None, str(tiny_folder), str(other)}
    assert [artifact.name for artifact in every()] == ["mine-base1-lora", "mine-base2-lora"]


def test_preferences_are_refused_with_a_way_on(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"p{k}", "chosen": "good", "rejected": "bad"} for k in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="Comparison"):
        compare(recipe(tiny_folder, path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"techniques": ["lora", "lora"]}, "called 'lora'"),
        ({"metric": "macro_f1"}, "no score per row"),
        ({"metric": "rougeL"}, "not among those measured"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    changes: dict[str, Any], message: str, tiny_folder: Path, rows: Path, own_home: Path
) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        compare(recipe(tiny_folder, rows, **changes))
    assert not (own_home / "comparisons" / "mine" / "cells").exists()


def test_unknown_names_are_told(own_home: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no comparison"):
        resume_comparison("nothing")
    with pytest.raises(NotFoundError, match="there is no report"):
        redraw("nothing")
