"""A comparison that was killed, interrupted, retried or forced: the same table in the end, and nothing lost."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from comparison_runs import SHARING, cells_of, quick, recipe, row_of, timeless
from tailor.artifacts import artifact as artifacts
from tailor.cli.main import run
from tailor.errors import ConfigError, ConflictError, InterruptedRunError
from tailor.recipes import compare as compare_module
from tailor.recipes import compare_measure
from tailor.recipes.compare import CompareResult, compare, resume_comparison, unfinished
from tailor.techniques import TECHNIQUES

STOPS = (
    ("baselines", 1),
    ("{base}/base/29/0: generate", 1),
    (f"train {{base}}: {', '.join(SHARING)} (8 rows, seed 0)", 5),
    ("{base}/lora/8/0: generate", 1),
    ("train {base}: full (29 rows, seed 0)", 5),
    ("{base}/full/29/0: perplexity", 1),
    ("probes", 1),
)
"""Where the kills come, one after the other: (stage, how far it must be). Checkpoints are made at steps 3 and 6."""


class Killer:
    """Listens to progress and dies once at each stop. A KeyboardInterrupt that nobody handles leaves the disk as a
    kill does."""

    def __init__(self, stops: list[tuple[str, int]]) -> None:
        self.left = stops

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.left and stage == self.left[0][0] and done >= self.left[0][1]:
            self.left.pop(0)
            raise KeyboardInterrupt


def test_killed_again_and_again_it_comes_to_the_same_table(
    finished: Callable[[], CompareResult], tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = Killer([(stage.format(base=tiny_folder), done) for stage, done in STOPS])
    save = artifacts.save

    def die_after_saving(*arguments: Any, **options: Any) -> Any:
        save(*arguments, **options)
        monkeypatch.setattr(compare_measure.artifacts, "save", save)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_measure.artifacts, "save", die_after_saving)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe(tiny_folder, rows, sizes=[8, "all"]), progress=killer)
    deaths = 1
    while True:
        assert unfinished() == ["mine"]
        try:
            result = resume_comparison("mine", progress=killer)
            break
        except KeyboardInterrupt:
            deaths += 1
    assert deaths == len(STOPS) + 1
    assert unfinished() == []
    assert timeless(result) == timeless(finished())


def test_trials_are_taken_up_where_they_were(tiny_folder: Path, rows: Path) -> None:
    tuned = {"techniques": ["lora", "full"], "tune": True, "trials": 2}
    whole = compare(quick(tiny_folder, rows, name="whole", **tuned))
    for name in ("lora", "full"):
        assert len(row_of(whole, name)["trials"]) == 2
    stage = f"train {tiny_folder}: full (29 rows, seed 0)"
    killer = Killer([(f"train {tiny_folder}: lora (29 rows, seed 0)", 4), (stage, 5), (stage, 6), (stage, 5)])
    options = {"progress": killer}
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            compare(quick(tiny_folder, rows, **tuned), **options)
    assert timeless(compare(quick(tiny_folder, rows, **tuned)))[2] == timeless(whole)[2]


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tiny_folder: Path, rows: Path) -> None:
    def press(stage: str, done: int, total: int) -> None:
        if stage.startswith("train") and done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError) as caught:
        compare(quick(tiny_folder, rows, techniques=["lora"]), progress=press)
    assert caught.value.hint == "tailor resume mine"
    steps: list[int] = []
    resume_comparison("mine", progress=lambda stage, done, total: steps.append(done) if "train" in stage else None)
    assert steps == [3, 4, 5, 6]


def test_the_checkpoint_of_a_later_size_outlives_the_sizes_that_are_done(tiny_folder: Path, rows: Path) -> None:
    one = quick(tiny_folder, rows, techniques=["lora"], sizes=[8, 16])
    stage = f"train {tiny_folder}: lora (16 rows, seed 0)"

    def press(at: str, done: int, total: int) -> None:
        if (at, done) == (stage, 2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError):
        compare(one, progress=press)
    steps: list[tuple[str, int]] = []
    compare(one, progress=lambda at, done, total: steps.append((at, done)) if "train" in at else None)
    assert steps == [(stage, done) for done in (3, 4, 5, 6)]


def test_the_same_command_prints_a_finished_comparison_without_work(
    tiny_folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = quick(tiny_folder, rows, techniques=["lora"])
    first = compare(one)
    stages: list[str] = []
    second = compare(one, progress=lambda stage, done, total: stages.append(stage))
    assert stages == []
    assert second.report == first.report
    assert run(["resume", "mine", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == first.report["rows"]


def test_it_is_finished_when_it_has_a_report(tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = quick(tiny_folder, rows, techniques=["prompting"])
    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "render_html", lambda report: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare(one)
    assert unfinished() == ["mine"]
    compare(one)
    assert unfinished() == []


def test_other_settings_are_a_conflict_and_force_replaces_what_can_be_replaced(tiny_folder: Path, rows: Path) -> None:
    first = compare(quick(tiny_folder, rows, techniques=["prompting"]))
    other = quick(tiny_folder, rows, techniques=["prompting"], sizes=[8])
    with pytest.raises(ConflictError, match="other settings"):
        compare(other)
    with pytest.raises(ConfigError, match="not among those measured"):
        compare(other.model_copy(update={"metric": "rougeL"}), force=True)
    again = compare(quick(tiny_folder, rows, techniques=["prompting"]), progress=Killer([("", 0)]))
    assert cells_of(again) == cells_of(first), "a force that is refused destroys nothing"
    assert row_of(compare(other, force=True), "prompting")["rows_used"]["train"] == 8


def test_a_forced_comparison_stays_forced_when_it_goes_on(tiny_folder: Path, rows: Path, own_home: Path) -> None:
    (own_home / "artifacts" / "mine-prompting").mkdir(parents=True)
    one = quick(tiny_folder, rows, techniques=["prompting"], save=True)
    with pytest.raises(KeyboardInterrupt):
        compare(one, force=True, progress=Killer([(f"{tiny_folder}/prompting/29/0: generate", 1)]))
    assert row_of(resume_comparison("mine"), "prompting")["artifact"] == "mine-prompting"


def test_a_comparison_on_a_relative_base_goes_on_from_another_folder(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    one = quick(Path(tiny_folder.name), rows, techniques=["prompting"])
    with pytest.raises(KeyboardInterrupt):
        compare(one, progress=Killer([(f"{tiny_folder}/prompting/29/0: generate", 1)]))
    with pytest.raises(ValueError, match="is named twice"):
        type(one).model_validate({**one.model_dump(), "base": [tiny_folder.name, str(tiny_folder)]})
    monkeypatch.chdir(tmp_path)
    assert row_of(resume_comparison("mine"), "prompting")["id"] == f"{tiny_folder}/prompting"


def test_what_has_changed_is_a_conflict(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tmp_path / "own-base"
    shutil.copytree(tiny_folder, base)
    one = quick(base, rows, techniques=["prompting"])
    with pytest.raises(KeyboardInterrupt):
        compare(one, progress=Killer([(f"{base}/prompting/29/0: generate", 1)]))
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConflictError, match="not what it was"):
        compare(one)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    rows.write_text(rows.read_text().replace("red", "grey"))
    with pytest.raises(ConflictError, match="have changed"):
        compare(one)


def test_a_technique_that_fails_takes_its_row_and_can_be_tried_again(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, slot: Any) -> None:
        raise ConfigError("no linear layer matches")

    both = quick(tiny_folder, rows, techniques=["prompt_tuning", "lora"], save=True)
    with monkeypatch.context() as patch:
        patch.setattr(TECHNIQUES["lora"], "attach", broken)
        result = compare(both)
    assert row_of(result, "lora")["status"] == "failed"
    assert row_of(result, "lora")["error"]["message"] == "no linear layer matches"
    assert row_of(result, "prompt_tuning")["status"] == "ok"
    assert result.report["failures"][0]["id"].endswith("/lora")
    trained = row_of(result, "prompt_tuning")["training"]
    assert row_of(compare(both), "lora")["status"] == "failed"
    retried = compare(both, retry=True)
    assert row_of(retried, "lora")["status"] == "ok"
    assert row_of(retried, "lora")["inference"]["ratio"]["time_to_first_token"] > 0, "it is probed as well"
    assert row_of(retried, "prompt_tuning")["training"] == trained, "what went well is not trained again"


def test_when_every_technique_fails_the_command_fails_after_its_report(
    tiny_folder: Path, rows: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, slot: Any) -> None:
        raise ConfigError("no linear layer matches")

    given = ["compare", str(rows), "-b", str(tiny_folder), "-t", "prompt_tuning,lora", "-n", "mine", "--quiet"]
    given += ["save=false", "baselines=false", "evaluation.metrics=[accuracy]", "train.num_steps=2"]
    monkeypatch.setattr(TECHNIQUES["lora"], "attach", broken)
    with monkeypatch.context() as patch:
        patch.setattr(TECHNIQUES["prompt_tuning"], "attach", broken)
        assert run(given) == 1
    told = capsys.readouterr()
    report = own_home / "comparisons" / "mine" / "report.html"
    assert report.is_file()
    assert "no linear layer matches" in told.out
    assert "error: all 2 techniques failed" in told.err
    assert str(report) in told.err
    assert unfinished() == []
    assert run(["resume", "mine", "--quiet"]) == 1
    assert run([*given, "--retry"]) == 0, "one that works is worth a table"


def test_a_probe_that_cannot_be_made_is_noted(tiny_folder: Path, rows: Path) -> None:
    one = quick(tiny_folder, rows, techniques=["prompting", "lora"], save=True)
    with pytest.raises(KeyboardInterrupt):
        compare(one, progress=Killer([("probes", 1)]))
    artifacts.remove(artifacts.find("mine-lora"))
    result = compare(one)
    assert row_of(result, "prompting")["inference"] is not None
    assert row_of(result, "lora")["inference"] is None
    assert any("there is no artifact 'mine-lora'" in note for note in row_of(result, "lora")["notes"])
