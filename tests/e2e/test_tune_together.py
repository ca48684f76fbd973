"""Several recipes in one pass: each comes to what it comes to alone, ends alone, fails alone, and can be resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from test_tune import interrupt_at, recipe, weights

from tailor.artifacts.artifact import find
from tailor.cli.main import run as cli
from tailor.config import dump_yaml
from tailor.errors import ConfigError, ConflictError, DataError, InterruptedRunError, NotFoundError, TailorError
from tailor.inference.load import load
from tailor.models.base import load_base
from tailor.recipes import tune_save
from tailor.recipes.tune import resume, tune
from tailor.recipes.tune_settings import TuneRecipe
from tailor.recipes.tune_together import resume_many, tune_many
from tailor.runs import Run, list_runs


def three(base: Path, rows: Path, other_rows: Path) -> list[TuneRecipe]:
    """Techniques, rows, rates, schedules, batch sizes and ends differ; `c` stops early or goes to its end."""
    lora = {"type": "lora", "rank": 2, "dropout": 0.2}
    return [
        recipe(base, rows, lora, "a", num_steps=6, batch_size=3),
        recipe(base, other_rows, "prompt_tuning", "b", num_steps=12, learning_rate=0.1, schedule="linear"),
        recipe(base, rows, {"type": "lora", "target_layers": [1]}, "c", num_steps=9, eval_every=2, checkpoint_every=2),
    ]


@pytest.fixture
def other_rows(tmp_path: Path) -> Path:
    path = tmp_path / "sounds.jsonl"
    sounds = ("woof", "meow", "moo")
    lines = [{"prompt": f"what does animal {k} say", "completion": sounds[k % 3]} for k in range(30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def diverging(base: Path, rows: Path, name: str = "wild") -> TuneRecipe:
    return recipe(base, rows, "lora", name, learning_rate=1e30, schedule="constant", eval_every=12)


def same_run(run: Run, alone: Run) -> None:
    ours, theirs = run.metrics(), alone.metrics()
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["learning_rate"] == other["learning_rate"]
        assert one["num_tokens"] == other["num_tokens"]
        assert one.get("validation_loss") == pytest.approx(other.get("validation_loss"), abs=1e-4)


def alone(recipes: list[TuneRecipe], home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """The same recipes, each trained by itself in a home of its own."""
    with monkeypatch.context() as patched:
        patched.setenv("TAILOR_HOME", str(home))
        runs = {one.output.name: tune(one, quiet=True).run for one in recipes}
    assert all(runs.values())
    return {name: run for name, run in runs.items() if run is not None}


def test_each_comes_to_what_it_comes_to_alone(
    tiny_folder: Path, rows: Path, other_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = three(tiny_folder, rows, other_rows)
    base = load_base(tiny_folder)
    tuned = tune_many(recipes, base=base, quiet=True)
    assert [result.artifact.name for result in tuned.results] == ["a", "b", "c"]
    assert base.host.slots == {}
    apart = alone(recipes, tmp_path / "alone", monkeypatch)
    for result in tuned.results:
        assert result.run is not None
        same_run(result.run, apart[result.artifact.name])
        facts = find(result.artifact.name).manifest
        assert facts["parity"]["passed"]
        assert set(facts["metrics"]["shared_with"]) == {"a", "b", "c"} - {result.artifact.name}
        assert result.run.manifest["status"] == "finished"
        assert load(result.artifact.name).complete(["thing number 3?"], max_new_tokens=2)[0].token_ids


def test_one_that_is_done_is_saved_while_the_others_go_on(
    tiny_folder: Path, rows: Path, other_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, dict[str, int]] = {}
    slots: dict[str, int] = {}
    original = tune_save.artifacts.save

    def save(name: str, base: Any, *args: Any, **options: Any) -> Any:
        steps[name] = {run.manifest["name"]: len(run.metrics()) for run in list_runs()}
        slots[name] = len(base.host.slots)
        return original(name, base, *args, **options)

    monkeypatch.setattr(tune_save.artifacts, "save", save)
    tune_many(three(tiny_folder, rows, other_rows), quiet=True)
    assert steps["a"] == {"a": 6, "b": 6, "c": 6}
    assert steps["c"]["b"] == steps["c"]["c"] < 12
    assert steps["b"]["b"] == 12
    assert slots == {"a": 3, "c": 2, "b": 1}


def test_one_that_diverges_fails_alone(tiny_folder: Path, rows: Path, other_rows: Path) -> None:
    recipes = [diverging(tiny_folder, rows), *three(tiny_folder, rows, other_rows)[:2]]
    base = load_base(tiny_folder)
    tuned = tune_many(recipes, base=base, quiet=True)
    assert [outcome.error is None for outcome in tuned.outcomes] == [False, True, True]
    assert base.host.slots == {}
    with pytest.raises(TailorError, match="1 of 3 failed; the others are saved\nwild: the loss or its gradient became"):
        _ = tuned.results
    assert Run.open("wild").manifest["status"] == "failed"
    assert "wild" in Run.open("wild").manifest["error"]
    with pytest.raises(NotFoundError):
        find("wild")
    assert find("a").manifest["parity"]["passed"]
    assert len(Run.open("b").metrics()) == 12


def test_one_that_cannot_be_saved_fails_alone(tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = tune_save._parity
    broken = lambda artifact, prepared: 1 / 0 if artifact.name == "x" else original(artifact, prepared)  # noqa: E731
    monkeypatch.setattr(tune_save, "_parity", broken)
    tuned = tune_many([recipe(tiny_folder, rows, "lora", name, num_steps=2) for name in ("x", "y")], quiet=True)
    assert [type(outcome.error) for outcome in tuned.outcomes] == [ZeroDivisionError, type(None)]
    with pytest.raises(TailorError, match=r"x: ZeroDivisionError"):
        tuned.check()
    assert find("y").manifest["parity"]["passed"]


@pytest.mark.parametrize("how", ["the group", "their names", "one alone"])
def test_interrupted_ones_go_on_together_or_alone(
    how: str, tiny_folder: Path, rows: Path, other_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = three(tiny_folder, rows, other_rows)
    interrupt_at(monkeypatch, 7)  # `a` is finished by then
    with pytest.raises(InterruptedRunError, match=r"b at step 7, c at step 7\); the checkpoints are saved") as caught:
        tune_many(recipes, quiet=True)
    assert [Run.open(name).manifest["status"] for name in "abc"] == ["finished", "interrupted", "interrupted"]
    group = Run.open("b").manifest["group"]
    assert caught.value.hint == f"tailor resume {group}"
    if how == "one alone":
        resume("c", quiet=True)
        assert Run.open("b").manifest["status"] == "interrupted"
        resume("b", quiet=True)
    else:
        tuned = resume_many([group] if how == "the group" else ["c", "b"], quiet=True)
        assert {result.artifact.name for result in tuned.results} == {"b", "c"}
    apart = alone(recipes, tmp_path / "alone", monkeypatch)
    for name, run in apart.items():
        same_run(Run.open(name), run)
    with pytest.raises(ConflictError, match="all finished"):
        resume_many([group])


def test_together_resumed_together_is_bit_for_bit(
    tiny_folder: Path, rows: Path, other_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = three(tiny_folder, rows, other_rows)
    with monkeypatch.context() as patched:
        patched.setenv("TAILOR_HOME", str(tmp_path / "whole"))
        tune_many(recipes, quiet=True)
        whole = {name: weights(find(name).folder) for name in "abc"}
    interrupt_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError) as caught:
        tune_many(recipes, quiet=True)
    assert caught.value.hint is not None
    resume_many([caught.value.hint.removeprefix("tailor resume ")], quiet=True)
    for name, files in whole.items():
        for file, tensors in weights(find(name).folder).items():
            assert all(tensor.equal(files[file][key]) for key, tensor in tensors.items())


def test_a_second_stop_names_the_run_that_is_left(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [recipe(tiny_folder, rows, "lora", name, num_steps=n) for name, n in (("short", 2), ("long", 6))]
    interrupt_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError, match="stopped at step 4; the checkpoint is saved") as caught:
        tune_many(recipes, quiet=True)
    assert caught.value.hint == f"tailor resume {Run.open('long').name}"
    assert resume("long", quiet=True).artifact.manifest["metrics"]["num_steps"] == 6


def test_terminated_has_its_own_code(tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log(self: Run, step: int, **values: Any) -> None:
        if self.name.startswith("x"):  # a second signal would end it at once
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Run, "log", log)
    recipes = [recipe(tiny_folder, rows, "lora", name) for name in ("x", "y")]
    with pytest.raises(InterruptedRunError) as caught:
        tune_many(recipes, quiet=True)
    assert caught.value.exit_code == 143


# ------------------------------------------------------------------------------------------------ what is refused


def changed(settings: TuneRecipe, **base: Any) -> TuneRecipe:
    return settings.model_copy(update={"base": settings.base.model_copy(update=base)})


def test_what_cannot_share_a_pass_is_refused_before_anything_is_trained(
    tiny_folder: Path, rows: Path, tmp_path: Path, own_home: Path
) -> None:
    one, other = (recipe(tiny_folder, rows, "lora", name) for name in ("one", "other"))
    named = other.model_copy(update={"output": one.output})
    full = recipe(tiny_folder, rows, "full", "whole")
    with pytest.raises(ConfigError, match=r"recipe 1 and recipe 2: both are to write artifact 'one'"):
        tune_many([one, named])
    with pytest.raises(ConfigError, match="recipe 2: full changes the base itself and is trained alone"):
        tune_many([one, full])
    with pytest.raises(ConfigError, match=r"recipe 1: .*tiny-llama cpu float32(?s:.*)recipe 2: tailor-nano"):
        tune_many([one, changed(other, name="tailor-nano")])
    with pytest.raises(ConfigError, match=r"recipe 2: .* bfloat16"):
        tune_many([one, changed(other, dtype="bfloat16")])
    with pytest.raises(ConfigError, match="no recipe"):
        tune_many([])
    with pytest.raises(NotFoundError):
        tune_many([one, recipe(tiny_folder, tmp_path / "nothing.jsonl", "lora", "other")])
    assert not own_home.exists() or list_runs() == []
    link = tmp_path / "the-same"
    link.symlink_to(tiny_folder)
    short = [recipe(tiny_folder, rows, "lora", "one", num_steps=1), recipe(link, rows, "lora", "other", num_steps=1)]
    assert len(tune_many(short, quiet=True).results) == 2
    with pytest.raises(ConflictError, match="'other' already"):
        tune_many([recipe(tiny_folder, rows, "lora", "third"), other])


def test_rows_that_do_not_fit_leave_nothing_on_the_base(tiny_folder: Path, rows: Path) -> None:
    base = load_base(tiny_folder)
    one, other = (recipe(tiny_folder, rows, "lora", name) for name in ("one", "other"))
    short = other.model_copy(update={"data": other.data.model_copy(update={"max_seq_len": 8})})
    with pytest.raises(DataError):
        tune_many([one, short], base=base, quiet=True)
    assert base.host.slots == {}


def test_what_trains_nothing_is_saved_beside_the_others(tiny_folder: Path, rows: Path) -> None:
    prompting = recipe(tiny_folder, rows, {"type": "prompting", "shots": 1}, "shown")
    tuned = tune_many([prompting, recipe(tiny_folder, rows, "lora", "learned", num_steps=1)], quiet=True)
    assert [result.artifact.name for result in tuned.results] == ["shown", "learned"]
    assert tuned.results[0].run is None
    assert "group" not in Run.open("learned").manifest


# ------------------------------------------------------------------------------------------------ the command line


def written(folder: Path, *recipes: TuneRecipe) -> list[str]:
    paths = [folder / f"{one.output.name}.yaml" for one in recipes]
    for path, one in zip(paths, recipes, strict=True):
        path.write_text(dump_yaml(one.model_dump(mode="json")))
    return [str(path) for path in paths]


def test_the_command_trains_shows_and_tells_by_its_exit_code(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = recipe(tiny_folder, rows, "prompt_tuning", "good")
    files = written(tmp_path, good, diverging(tiny_folder, rows))
    assert cli(["tune", *files, "train.num_steps=3", "train.batch_size=2", "--json"]) == 1
    out, err = capsys.readouterr()
    found = {run["name"]: run for run in json.loads(out)["runs"]}
    assert found["good"]["status"] == "finished"
    assert found["good"]["metrics"]["num_steps"] == 3
    assert found["wild"]["status"] == "failed"
    assert "infinite or NaN" in found["wild"]["error"]["message"]
    assert "good 1/3  loss" in err
    assert "wild 1/3  loss" in err
    assert "1 of 2 failed" in err


def test_the_command_resumes_a_group(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = written(tmp_path, *(recipe(tiny_folder, rows, "lora", name, num_steps=4) for name in ("x", "y")))
    with monkeypatch.context() as patched:
        interrupt_at(patched, 2)
        assert cli(["tune", *files, "-q"]) == 130
    hint = capsys.readouterr().err.splitlines()[-1]
    assert cli([*hint.removeprefix("hint: tailor ").split(), "-q"]) == 0
    out, err = capsys.readouterr()
    assert "in passes shared with y" in out
    assert "tailor eval x FILE" in err
    assert cli(["resume", "x", "y"]) == 8
    assert "finished already" in capsys.readouterr().err


def test_the_command_refuses_what_it_cannot_mean(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = written(tmp_path, *(recipe(tiny_folder, rows, "lora", name) for name in ("x", "y")))
    assert cli(["tune", one, two, "--name", "z"]) == 2
    assert "cannot be the name of 2 artifacts" in capsys.readouterr().err
    assert cli(["tune", str(rows), two]) == 2
    assert "several are recipes" in capsys.readouterr().err
    assert cli(["tune", one, two, "output.name=z"]) == 3
    assert f"{one} and {two}: both are to write artifact 'z'" in capsys.readouterr().err
    assert cli(["tune", one, str(tmp_path / "absent.yaml")]) == 6
