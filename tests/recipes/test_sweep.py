"""A sweep: its trials are what they would be alone, a killed one comes to the same trials, and its best is repeated."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

import torch

from mood_rows import write_moods
from tailor.artifacts import artifact as artifacts
from tailor.config import load_recipe
from tailor.errors import ConflictError, DataError, InterruptedRunError, MissingDependencyError, NotFoundError
from tailor.recipes import sweep as sweep_module
from tailor.recipes import sweep_study, sweep_train
from tailor.recipes.sweep import SweepResult, known, resume_sweep, sweep
from tailor.recipes.sweep_settings import SweepRecipe
from tailor.recipes.sweep_study import TrialStudy
from tailor.recipes.tune import tune
from tailor.recipes.tune_settings import BaseSettings, TuneRecipe
from tailor.runs import home
from tiny_models import tiny_model, tiny_tokenizer

FACTS = ("state", "values", "validation_loss", "curve", "technique", "learning_rate", "num_steps", "stopped", "recipe")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moods(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def _home(own_home: Path) -> None:
    """Every test has a TAILOR_HOME of its own."""


def recipe(base: Path, rows: Path, **more: Any) -> SweepRecipe:
    """Six trials of two techniques, three at a time."""
    return SweepRecipe.model_validate(
        {
            "name": "mine",
            "base": str(base),
            "data": {"train": str(rows)},
            "train": {"num_steps": 10, "batch_size": 4, "patience": None},
            "search": {
                "technique": ["lora", "prompt_tuning"],
                "lora.rank": [2, 4],
                "prompt_tuning.num_virtual_tokens": {"low": 2, "high": 6},
                "train.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
            },
            "num_trials": 6,
            "in_parallel": 3,
            "pruner": {"type": "median", "startup_trials": 2, "warmup": 2},
            **more,
        }
    )


def told(result: SweepResult) -> list[dict[str, Any]]:
    """Everything of the trials that does not depend on the clock."""
    return [{key: trial[key] for key in FACTS} for trial in result.report["trials"]]


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], SweepResult]:
    """A sweep that nobody disturbed; nobody may change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(tmp_path_factory.mktemp("finished")))
        result = sweep(recipe(tiny_folder, rows))
    return lambda: result


def test_every_trial_has_its_values_and_its_loss(finished: Callable[[], SweepResult]) -> None:
    report = finished().report
    trials = report["trials"]
    assert [trial["number"] for trial in trials] == list(range(6))
    assert {trial["state"] for trial in trials} == {"complete", "pruned"}
    assert trials[0]["technique"] == "lora"
    assert trials[1]["technique"] == "prompt_tuning"  # each technique's first trial is there before any draw
    for trial in trials:
        own = {"lora": "lora.rank", "prompt_tuning": "prompt_tuning.num_virtual_tokens"}[trial["technique"]]
        assert set(trial["values"]) == {own, "train.learning_rate"}
        (technique,) = trial["recipe"]["technique"]
        assert technique[own.partition(".")[2]] == trial["values"][own]
        assert trial["recipe"]["train"]["learning_rate"] == trial["values"]["train.learning_rate"]
        assert 1e-3 <= trial["values"]["train.learning_rate"] <= 1e-1
    complete = [trial for trial in trials if trial["state"] == "complete"]
    assert report["best"] == min(complete, key=lambda trial: trial["validation_loss"])
    losses = [trial["validation_loss"] for trial in complete]
    assert [loss for _, loss in report["history"]] == [min(losses[: k + 1]) for k in range(len(losses))]
    assert report["importance"] == {}
    assert "takes 10 finished trials" in report["importance_note"]


def test_the_base_is_quantised_when_the_recipe_says_so(tiny_folder: Path, rows: Path) -> None:
    base = {"name": str(tiny_folder), "quantize": "nf4"}
    more: dict[str, Any] = {"num_trials": 1, "in_parallel": 1, "search": {"lora.rank": [2, 4]}}
    result = sweep(recipe(tiny_folder, rows, **more).model_copy(update={"base": BaseSettings(**base)}))
    assert artifacts.find("mine").manifest["base"]["quantize"] == "nf4"
    assert json.loads((result.folder / "sweep.json").read_text())["base"]["quantize"] == "nf4"


def test_what_decides_is_found(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    study = TrialStudy(tmp_path, recipe(tiny_folder, rows, num_trials=40))
    for number in range(40):
        assert study.draw() == number
        _, values = study.values(number)
        study.finish(number, abs(math.log(values["train.learning_rate"] / 1e-2)))
    importance = study.importance()
    assert math.isclose(sum(importance.values()), 1.0)
    assert next(iter(importance)) == "train.learning_rate"
    assert set(importance) == {"technique", "lora.rank", "prompt_tuning.num_virtual_tokens", "train.learning_rate"}
    rates = [study.values(number)[1]["train.learning_rate"] for number in range(40)]
    late = [abs(math.log10(rate) + 2) for rate in rates[20:]]
    assert sum(late) < sum(abs(math.log10(rate) + 2) for rate in rates[:20])  # it learns where to look


def test_a_trial_is_what_it_would_be_alone(
    finished: Callable[[], SweepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    for trial in finished().report["trials"]:
        if trial["state"] != "complete":
            continue
        output = {"name": f"t{trial['number']}", "verify": False}
        alone = tune(TuneRecipe.model_validate({**trial["recipe"], "output": output}), quiet=True)
        assert alone.artifact.manifest["metrics"]["validation_loss"] == pytest.approx(
            trial["validation_loss"], abs=1e-4
        )
        assert alone.artifact.manifest["metrics"]["num_steps"] == trial["num_steps"]


def test_the_best_recipe_repeats_the_best_trial(finished: Callable[[], SweepResult]) -> None:
    result = finished()
    assert result.best_recipe is not None
    repeated = tune(result.best_recipe, quiet=True)
    found = repeated.artifact.manifest["metrics"]
    assert found["validation_loss"] == pytest.approx(result.report["best"]["validation_loss"], abs=1e-4)
    assert found["best_step"] == result.report["best"]["best_step"]


def test_the_best_weights_are_an_artifact(finished: Callable[[], SweepResult], monkeypatch: pytest.MonkeyPatch) -> None:
    result = finished()
    monkeypatch.setenv("TAILOR_HOME", str(result.folder.parents[1]))
    kept = artifacts.find("mine")
    assert kept.manifest["run"] == "sweep mine"
    assert kept.manifest["metrics"]["trial"] == result.report["best"]["number"]
    assert kept.manifest["metrics"]["validation_loss"] == result.report["best"]["validation_loss"]
    from tailor.recipes.verify import verify

    assert verify("mine", num_rows=2).passed


def test_a_trial_that_is_given_up_leaves_and_the_others_do_not_notice(
    finished: Callable[[], SweepResult], tiny_folder: Path, rows: Path
) -> None:
    pruned = [trial for trial in finished().report["trials"] if trial["state"] == "pruned"]
    assert pruned
    assert all(2 <= trial["num_steps"] < 10 and trial["validation_loss"] is None for trial in pruned)
    whole = sweep(recipe(tiny_folder, rows, pruner="none", num_trials=3))
    assert {trial["state"] for trial in whole.report["trials"]} == {"complete"}
    assert told(whole) == told(finished())[:3]  # nothing was given up in the first pass


@pytest.mark.parametrize("stop", [(0, 4), (0, 10), (1, 2)])
def test_killed_in_a_pass_it_goes_on_to_the_same_trials(
    finished: Callable[[], SweepResult], tiny_folder: Path, rows: Path, stop: tuple[int, int]
) -> None:
    passes = {"trials 0, 1, 2": 0, "trials 3, 4, 5": 1}

    def die(stage: str, done: int, total: int) -> None:
        if stage.startswith("mine") and passes[stage.removeprefix("mine: ")] == stop[0] and done >= stop[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(tiny_folder, rows), progress=die)
    assert json.loads((home() / "sweeps/mine/sweep.json").read_text())["status"] == "interrupted"
    result = resume_sweep("mine")
    assert told(result) == told(finished())
    assert not (result.folder / "pass").exists()


def test_killed_while_drawing_it_draws_the_same(
    finished: Callable[[], SweepResult], tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suggest, calls = sweep_study._suggest, [0]

    def die(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == 10:  # the second value of the second trial of the second pass
            raise KeyboardInterrupt
        suggest(*arguments, **options)

    monkeypatch.setattr(sweep_study, "_suggest", die)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(tiny_folder, rows))
    assert calls[0] == 10
    monkeypatch.setattr(sweep_study, "_suggest", suggest)
    assert told(sweep(recipe(tiny_folder, rows))) == told(finished())


def test_killed_while_telling_nothing_is_lost(
    finished: Callable[[], SweepResult], tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, calls = TrialStudy.finish, [0]

    def die(study: TrialStudy, number: int, loss: float) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        finish(study, number, loss)

    monkeypatch.setattr(TrialStudy, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(tiny_folder, rows))
    monkeypatch.setattr(TrialStudy, "finish", finish)
    result = resume_sweep("mine")
    assert told(result) == told(finished())
    assert artifacts.find("mine").manifest["metrics"]["trial"] == result.report["best"]["number"]


SCRIPT = """
import os, signal, sys
from tailor.config import load_recipe
from tailor.recipes.sweep import sweep
from tailor.recipes.sweep_settings import SweepRecipe

def die(stage, done, total):
    if stage.endswith("3, 4, 5") and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

sweep(load_recipe(sys.argv[1], SweepRecipe).recipe, progress=die)
"""


def test_kill_9(finished: Callable[[], SweepResult], tiny_folder: Path, rows: Path) -> None:
    path = finished().folder / "recipe.yaml"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert told(resume_sweep("mine")) == told(finished())


def test_an_interruption_says_how_to_go_on(tiny_folder: Path, rows: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("mine") and done == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(InterruptedRunError) as caught:
        sweep(recipe(tiny_folder, rows), progress=interrupt)
    assert caught.value.hint == "tailor resume mine"
    counters = json.loads((home() / "sweeps/mine/pass/checkpoint/0.json").read_text())
    assert counters["step"] == 3


def test_more_trials_go_on_and_the_same_command_trains_nothing(
    finished: Callable[[], SweepResult], tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(recipe(tiny_folder, rows, num_trials=3))
    result = sweep(recipe(tiny_folder, rows))
    assert told(result) == told(finished())
    assert known() == ["mine"]
    monkeypatch.setattr(sweep_module, "load_base", None)
    assert told(sweep(recipe(tiny_folder, rows))) == told(result)


def test_another_sweep_or_artifact_of_the_name_is_not_replaced(tiny_folder: Path, rows: Path) -> None:
    one = recipe(tiny_folder, rows, num_trials=1)
    sweep(one)
    with pytest.raises(ConflictError, match="other settings: seed"):
        sweep(recipe(tiny_folder, rows, num_trials=1, seed=1))
    again = sweep(recipe(tiny_folder, rows, num_trials=1, seed=1), force=True)
    assert again.report["recipe"]["seed"] == 1
    assert len(again.report["trials"]) == 1
    tune(
        TuneRecipe.model_validate({**again.report["best"]["recipe"], "output": {"name": "taken", "verify": False}}),
        quiet=True,
    )
    with pytest.raises(ConflictError, match="taken"):
        sweep(recipe(tiny_folder, rows, name="taken", num_trials=1))
    with pytest.raises(NotFoundError, match="no sweep 'mien'"):
        resume_sweep("mien")


def test_rows_that_changed_are_noticed(tiny_folder: Path, tmp_path: Path) -> None:
    own = write_moods(tmp_path)
    sweep(recipe(tiny_folder, own, num_trials=1))
    own.write_text(own.read_text() + json.dumps({"prompt": "I feel odd", "completion": "glad"}) + "\n")
    with pytest.raises(ConflictError, match="the rows of sweep 'mine' have changed"):
        sweep(recipe(tiny_folder, own, num_trials=2))


def test_a_trial_that_cannot_be_fails_alone(tiny_folder: Path, rows: Path) -> None:
    search = {"technique.target_modules": [["q_proj"], ["no_proj"]], "train.learning_rate": {"low": 1e-3, "high": 0.1}}
    result = sweep(recipe(tiny_folder, rows, technique="lora", search=search, num_trials=4))
    by_target = {str(t["values"]["technique.target_modules"]): set() for t in result.report["trials"]}
    for trial in result.report["trials"]:
        by_target[str(trial["values"]["technique.target_modules"])].add(trial["state"])
    assert by_target == {"['q_proj']": {"complete"}, "['no_proj']": {"failed"}}
    told_of = next(t["error"]["message"] for t in result.report["trials"] if t["error"])
    assert "no_proj" in told_of
    assert "no_proj" in (result.folder / "report.html").read_text()


def test_a_trial_that_diverges_leaves_the_others_be(tiny_folder: Path, rows: Path) -> None:
    search = {"train.learning_rate": [1e-2, 1e30]}
    settings = {"technique": "lora", "search": search, "pruner": "none", "num_trials": 4, "save": False}
    result = sweep(recipe(tiny_folder, rows, **settings))
    states = {t["values"]["train.learning_rate"]: t["state"] for t in result.report["trials"]}
    assert states == {1e-2: "complete", 1e30: "failed"}
    assert result.report["artifact"] is None
    with pytest.raises(NotFoundError):
        artifacts.find("mine")


def test_halving_gives_up_all_but_the_best(tiny_folder: Path, rows: Path) -> None:
    more = {"pruner": "halving", "num_trials": 6, "in_parallel": 6, "technique": "lora"}
    search = {"train.learning_rate": {"low": 1e-4, "high": 0.1, "log": True}}
    result = sweep(recipe(tiny_folder, rows, **more, search=search))
    states = [trial["state"] for trial in result.report["trials"]]
    assert states.count("pruned") >= 2
    assert result.report["best"] is not None
    assert {trial["num_steps"] for trial in result.report["trials"] if trial["state"] == "pruned"} <= {1, 3, 9}


def test_nothing_is_written_outside_the_home(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(elsewhere))
    result = sweep(recipe(tiny_folder, rows, num_trials=2))
    assert list(elsewhere.iterdir()) == []
    names = {path.name for path in result.folder.iterdir()}
    assert names - {".lock"} == {
        *("sweep.json", "recipe.yaml", "study.jsonl"),
        *("best.yaml", "report.json", "report.html"),
    }
    assert load_recipe(result.folder / "recipe.yaml", SweepRecipe).recipe == recipe(tiny_folder, rows, num_trials=2)


def test_a_torn_line_is_cut_and_a_damaged_file_is_told(tiny_folder: Path, rows: Path) -> None:
    result = sweep(recipe(tiny_folder, rows, num_trials=1))
    journal = result.folder / "study.jsonl"
    journal.write_text(journal.read_text() + '{"op_code":')
    assert told(sweep(recipe(tiny_folder, rows, num_trials=1))) == told(result)
    journal.write_text("not json\n" + journal.read_text())
    with pytest.raises(DataError, match="cannot be read"):
        sweep(recipe(tiny_folder, rows, num_trials=1))


def test_without_optuna_it_says_what_to_install(tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError) as caught:
        sweep(recipe(tiny_folder, rows))
    assert caught.value.hint == 'pip install "tailor-llm[hpo]"'


def test_memory_that_does_not_suffice_says_what_to_lower(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailor.errors import ResourceError

    class Full(sweep_train.Trainer):
        def step(self) -> Any:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(sweep_train, "Trainer", Full)
    with pytest.raises(ResourceError) as caught:
        sweep(recipe(tiny_folder, rows))
    assert "in_parallel" in str(caught.value.hint)
    monkeypatch.undo()


def test_fewer_in_parallel_after_a_stop(tiny_folder: Path, rows: Path) -> None:
    def die(stage: str, done: int, total: int) -> None:
        if stage.startswith("mine"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(tiny_folder, rows, num_trials=3), progress=die)
    stages: list[str] = []
    sweep(
        recipe(tiny_folder, rows, num_trials=3, in_parallel=1), progress=lambda stage, done, total: stages.append(stage)
    )
    assert {"mine: trials 0", "mine: trials 1", "mine: trials 2"} <= set(stages)
