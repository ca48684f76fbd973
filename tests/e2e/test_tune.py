"""Rows in, artifact out; interrupted and killed runs come to the same losses, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mood_rows import write_lines
from tailor.artifacts.artifact import find
from tailor.errors import ConflictError, DataError, InterruptedRunError, ResourceError
from tailor.inference.load import load
from tailor.models.base import load_base
from tailor.recipes import tune_save, tune_train
from tailor.recipes.tune import resume, tune
from tailor.recipes.tune_settings import TuneRecipe
from tailor.runs import Run
from tailor.techniques import TECHNIQUES

NEEDED = {"new_tokens": {"type": "new_tokens", "tokens": ["number"]}}
TRAINED = [name for name, technique in TECHNIQUES.items() if technique.traits.defaults is not None]


def recipe(base: Path, rows: Path, technique: Any, name: str = "mine", **train: Any) -> TuneRecipe:
    settings = {
        "num_steps": 12,
        "batch_size": 6,
        "eval_every": 4,
        "checkpoint_every": 3,
        "learning_rate": 0.01,
        **train,
    }
    return TuneRecipe.model_validate(
        {
            "base": {"name": str(base)},
            "data": {"train": str(rows)},
            "technique": NEEDED.get(technique, technique) if isinstance(technique, str) else technique,
            "train": settings,
            "output": {"name": name},
        }
    )


def losses(run: Run) -> list[tuple[int, float, float, float | None]]:
    return [(m["step"], m["loss"], m["grad_norm"], m.get("validation_loss")) for m in run.metrics()]


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process a Ctrl-C right after the given step was logged, once."""
    original, sent = Run.log, []

    def log(self: Run, at: int, **values: Any) -> None:
        original(self, at, **values)
        if at == step and not sent:
            sent.append(at)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "log", log)


def weights(folder: Path) -> dict[str, Any]:
    return {p.name: load_file(p) for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("technique", TRAINED)
def test_a_tuned_artifact_is_complete_verified_and_answers(technique: str, tiny_folder: Path, rows: Path) -> None:
    result = tune(recipe(tiny_folder, rows, technique), quiet=True)
    facts = find("mine").manifest
    assert facts["parity"]["passed"]
    hops = {hop["name"] for hop in facts["parity"]["hops"]}
    assert {"cached generation", "reloaded artifact"} <= hops
    assert ("merged weights" in hops) == TECHNIQUES[technique].traits.merges
    assert facts["data"]["num_train"] + facts["data"]["num_validation"] == 40
    assert facts["metrics"]["num_steps"] == 12
    assert result.run is not None
    assert len(result.run.metrics()) == 12
    first = result.run.metrics()[0]["loss"]
    assert result.run.metrics()[-1]["loss"] < first
    assert load("mine").complete(["thing number 3?"], max_new_tokens=4)[0].token_ids


@pytest.mark.parametrize("technique", TRAINED)
def test_an_interrupted_run_resumes_to_the_same_numbers(
    technique: str, tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"type": technique, "dropout": 0.2} if technique == "lora" else technique
    whole = tune(recipe(tiny_folder, rows, settings, "whole"), quiet=True)
    interrupt_at(monkeypatch, 5)
    with pytest.raises(InterruptedRunError, match="step 5"):
        tune(recipe(tiny_folder, rows, settings, "parts"), quiet=True)
    assert Run.open("parts").manifest["status"] == "interrupted"
    parts = resume("parts", quiet=True)
    assert whole.run is not None
    assert parts.run is not None
    assert losses(parts.run) == losses(whole.run)
    first, second = weights(find("whole").folder), weights(find("parts").folder)
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        assert all(tensors[key].equal(second[name][key]) for key in tensors)
    with pytest.raises(ConflictError, match="finished"):
        resume("parts")


@pytest.mark.parametrize("kill_at", [2, 7])
def test_a_killed_run_resumes_to_the_same_numbers(kill_at: int, tiny_folder: Path, rows: Path, own_home: Path) -> None:
    whole = tune(recipe(tiny_folder, rows, "lora", "whole"), quiet=True)
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
        "import torch; torch.set_num_threads(int(sys.argv[4])); "
        "from test_tune import recipe; from tailor.recipes.tune import tune; import time; from tailor.runs import Run; "
        "log = Run.log; Run.log = lambda self, step, **v: (log(self, step, **v), time.sleep(0.15))[0]; "
        "tune(recipe(Path(sys.argv[2]), Path(sys.argv[3]), 'lora', 'killed'), quiet=True)"
    )
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": f"{here.parents[1]}:{here.parent}"}
    arguments = [str(here.parent), str(tiny_folder), str(rows), str(torch.get_num_threads())]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment)
    while process.poll() is None:
        metrics = list((own_home / "runs").glob("killed-*/metrics.jsonl"))
        if metrics and metrics[0].read_text().count("\n") >= kill_at:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert len(Run.open("killed").metrics()) < 12
    killed = resume("killed", quiet=True)
    assert whole.run is not None
    assert killed.run is not None
    assert losses(killed.run) == losses(whole.run)


def test_a_run_on_a_relative_base_is_resumed_from_another_folder(
    tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(monkeypatch, 4)
    monkeypatch.chdir(tiny_folder.parent)
    with pytest.raises(InterruptedRunError):
        tune(recipe(Path(tiny_folder.name), rows, "lora"), quiet=True)
    monkeypatch.chdir(tmp_path)
    assert resume("mine", quiet=True).artifact.manifest["base"]["name"] == str(tiny_folder)
    named = recipe(Path("nobody/here"), rows, "lora").base  # what is no folder here may be a hub id
    assert named.absolute() == named


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_the_run_with_its_own_error(
    number: int, code: str, tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "log", lambda self, step, **values: signal.raise_signal(number))
    with pytest.raises(InterruptedRunError, match="stopped at step 1; the checkpoint is saved") as caught:
        tune(recipe(tiny_folder, rows, "lora"), quiet=True)
    assert caught.value.code == code
    assert caught.value.hint == f"tailor resume {Run.open('mine').name}"
    assert Run.open("mine").manifest["status"] == "interrupted"


def test_resume_refuses_changed_data(tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError):
        tune(recipe(tiny_folder, rows, "lora"), quiet=True)
    rows.write_text(rows.read_text().replace("red", "pink"))
    with pytest.raises(ConflictError, match="changed"):
        resume("mine", quiet=True)


def test_tensorboard_events_stand_beside_the_metrics(tiny_folder: Path, rows: Path) -> None:
    pytest.importorskip("tensorboard")
    result = tune(recipe(tiny_folder, rows, "lora", num_steps=2, tensorboard=True), quiet=True)
    assert result.run is not None
    assert list((result.run.folder / "tensorboard").glob("events*"))


def test_prompting_needs_no_training(tiny_folder: Path, rows: Path) -> None:
    result = tune(recipe(tiny_folder, rows, {"type": "prompting", "shots": 2, "system": "Say a colour."}), quiet=True)
    assert result.run is None
    assert json.loads((find("mine").folder / "prompt.json").read_text())["examples"]
    answer = load("mine").complete(["thing number 3?"], max_new_tokens=3)[0]
    plain = load(str(tiny_folder)).complete(["thing number 3?"], max_new_tokens=3)[0]
    assert answer.num_prompt_tokens > 3 * plain.num_prompt_tokens


def test_a_list_of_techniques_is_composed_and_saved_in_parts(tiny_folder: Path, rows: Path) -> None:
    techniques = [{"type": "prompting", "shots": 0, "system": "Say a colour."}, "lora", "prompt_tuning"]
    tune(recipe(tiny_folder, rows, techniques), quiet=True)
    artifact = find("mine")
    assert artifact.kind == "prompting+lora+prompt_tuning"
    assert sorted(p.name for p in artifact.folder.iterdir() if p.is_dir()) == [
        "part-0-prompting",
        "part-1-lora",
        "part-2-prompt_tuning",
    ]
    assert artifact.manifest["parity"]["passed"]


def test_a_taken_name_is_refused_before_any_work(tiny_folder: Path, rows: Path) -> None:
    tune(recipe(tiny_folder, rows, "lora", num_steps=1), quiet=True)
    with pytest.raises(ConflictError, match="already"):
        tune(recipe(Path("no-such-base"), rows, "lora"), quiet=True)


def test_a_run_killed_right_after_saving_its_artifact_resumes(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tune_save, "_parity", lambda artifact, prepared: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tune(recipe(tiny_folder, rows, "lora"), quiet=True)
    assert find("mine").manifest["metrics"]["num_steps"] == 12
    assert Run.open("mine").manifest["status"] == "failed"
    again = resume("mine", quiet=True)
    assert again.artifact.manifest["parity"]["passed"]
    assert again.run is not None
    assert again.run.manifest["status"] == "finished"
    assert len(again.run.metrics()) == 12


def test_resume_refuses_other_weights(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    interrupt_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError):
        tune(recipe(base, rows, "lora"), quiet=True)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConflictError, match="base_fingerprint"):
        resume("mine", quiet=True)


def test_dropped_rows_are_spoken_of_and_not_counted(tiny_folder: Path, rows: Path) -> None:
    long = {"prompt": "word " * 60, "completion": "red"}
    rows.write_text(rows.read_text() + json.dumps(long) + "\n")
    settings = recipe(tiny_folder, rows, "lora", num_steps=1)
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"truncation": "drop", "max_seq_len": 40})}
    )
    facts = tune(settings, quiet=True).artifact.manifest
    assert facts["data"]["num_train"] + facts["data"]["num_validation"] == 40
    assert "rows.jsonl:41" in facts["notes"][0]


def test_a_loaded_base_is_used_as_it_is(tiny_folder: Path, rows: Path) -> None:
    base = load_base(tiny_folder)
    first = tune(recipe(tiny_folder, rows, "lora", "first", num_steps=2), base=base, quiet=True)
    second = tune(recipe(tiny_folder, rows, "prompt_tuning", "second", num_steps=2), base=base, quiet=True)
    assert first.base is second.base is base
    assert set(base.host.slots) == {first.slot.number, second.slot.number}


def test_rows_that_do_not_fit_leave_nothing_on_the_base(tiny_folder: Path, rows: Path) -> None:
    base = load_base(tiny_folder)
    settings = recipe(tiny_folder, rows, "lora")
    short = settings.model_copy(update={"data": settings.data.model_copy(update={"max_seq_len": 8})})
    with pytest.raises(DataError, match=r"rows\.jsonl:"):
        tune(short, base=base, quiet=True)
    assert base.host.slots == {}


def test_full_is_not_combined(tiny_folder: Path, rows: Path) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        recipe(tiny_folder, rows, ["lora", "full"])


def test_verification_renders_rows_as_the_run_did(tiny_folder: Path, tmp_path: Path) -> None:
    turns = [
        [{"role": role, "content": f"{text} {k}"} for role, text in (("user", "a"), ("assistant", "b")) * 2]
        for k in range(12)
    ]
    path = write_lines(tmp_path / "chats.jsonl", ({"messages": messages} for messages in turns))
    settings = recipe(tiny_folder, path, "lora", num_steps=1)
    for trained_turns in ("all", "last"):
        data = settings.data.model_copy(update={"trained_turns": trained_turns})
        named = settings.model_copy(
            update={"data": data, "output": settings.output.model_copy(update={"name": trained_turns})}
        )
        assert tune(named, quiet=True).artifact.manifest["parity"]["passed"]
    tokens = [find(name).manifest["parity"]["num_tokens"] for name in ("all", "last")]
    assert tokens[0] == 2 * tokens[1]


def test_running_out_of_memory_says_what_to_lower(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tune_train.Trainer, "step", full)
    with pytest.raises(ResourceError, match="step 1 does not fit"):
        tune(recipe(tiny_folder, rows, "lora"), quiet=True)
    assert Run.open("mine").manifest["status"] == "failed"
