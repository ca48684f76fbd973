"""The states of a run's last epochs: each is what a run of that length would have come to."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import tailor
from tailor.artifacts import artifact as artifacts
from tailor.errors import ConflictError
from tailor.models.base import Base, load_base
from tailor.recipes import tune_train
from tailor.recipes.tune_checkpoints import ends_epoch
from tailor.runs import Run, list_runs

ROWS = [{"prompt": f"Is {n} even?", "completion": "no" if n % 2 else "yes"} for n in range(8)]
TECHNIQUES: dict[str, Any] = {
    "lora": {"type": "lora", "rank": 2},
    "p_tuning": {"type": "p_tuning", "num_virtual_tokens": 2, "encoder_hidden": 8},
    "prefix_tuning": {"type": "prefix_tuning", "num_virtual_tokens": 2, "init": "random"},
    "adapter+ia3": [{"type": "adapter", "bottleneck_size": 4}, {"type": "ia3"}],
}


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tailor-nano", dtype="float32")


def recipe(tmp_path: Path, name: str, technique: Any, num_steps: int, **output: Any) -> tailor.TuneRecipe:
    """Two steps an epoch (8 rows, 4 a step), at a rate that does not know how many there will be."""
    for file, rows in (("train.jsonl", ROWS), ("validation.jsonl", ROWS[:2])):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = {"num_steps": num_steps, "batch_size": 4, "eval_every": 1000, "schedule": "constant", "warmup_ratio": 0.0}
    return tailor.TuneRecipe.model_validate(
        {
            "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")},
            "technique": technique,
            "train": train,
            "output": {"name": name, "verify": False, **output},
        }
    )


def weights(name: str) -> dict[str, bytes]:
    folder = artifacts.find(name).folder
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 11, 64, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 16])
def test_epochs_end_where_that_many_would(rows: int, size: int) -> None:
    """As `train.num_epochs` counts, which rounds (training/settings.py); a step is the end of one epoch at most."""
    size = min(size, rows)
    ends = [step for step in range(1, 5 * math.ceil(rows / size) + 1) if ends_epoch(step, size, rows)]
    assert ends[:4] == [max(1, round(float(epoch) * rows / size)) for epoch in range(1, 5)]


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_a_checkpoint_is_what_a_shorter_run_comes_to(own_home: Path, tmp_path: Path, base: Base, kind: str) -> None:
    technique = TECHNIQUES[kind]
    before = len(base.host.slots)
    tailor.tune(recipe(tmp_path, "long", technique, 8, checkpoints=3), base=base, quiet=True)
    assert len(base.host.slots) == before + 1  # its own
    found = artifacts.checkpoints("long")
    assert list(found) == [4, 6]  # of 2, 4, 6, 8 the last three; that of 8 is the artifact itself
    for step, artifact in found.items():
        tailor.tune(recipe(tmp_path, f"short-{step}", technique, step), base=base, quiet=True)
        assert weights(artifact.name) == weights(f"short-{step}")
        assert artifact.manifest["checkpoint"] == {"of": "long", "step": step}
        assert artifact.manifest["metrics"]["num_steps"] == step
        assert tailor.load(artifact.name, base).generate("Is 3 even?", max_new_tokens=2) is not None
    assert {one.name for one in artifacts.every()} == {"long", "long-step-4", "long-step-6", "short-4", "short-6"}


def test_a_run_that_was_killed_keeps_the_same_states(
    own_home: Path, tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique = TECHNIQUES["lora"]
    tailor.tune(recipe(tmp_path, "whole", technique, 8, checkpoints=2), base=base, quiet=True)
    told = tune_train.keep_state

    def killed(prepared: Any, run: Run, slot_run: Any) -> None:
        told(prepared, run, slot_run)
        if slot_run.step == 7:
            raise KeyboardInterrupt

    asked = recipe(tmp_path, "cut", technique, 8, checkpoints=2)
    asked = asked.model_copy(update={"train": asked.train.model_copy(update={"checkpoint_every": 5})})
    monkeypatch.setattr(tune_train, "keep_state", killed)
    with pytest.raises(KeyboardInterrupt):
        tailor.tune(asked, base=base, quiet=True)
    monkeypatch.undo()
    monkeypatch.setenv("TAILOR_HOME", str(own_home))
    assert artifacts.checkpoints("cut") == {}
    tailor.resume("cut", quiet=True)
    assert list(artifacts.checkpoints("cut")) == list(artifacts.checkpoints("whole")) == [6]
    assert weights("cut-step-6") == weights("whole-step-6")
    assert weights("cut") == weights("whole")


def test_several_runs_keep_their_own(own_home: Path, tmp_path: Path, base: Base) -> None:
    one = recipe(tmp_path, "one", TECHNIQUES["lora"], 6, checkpoints=1)
    other = recipe(tmp_path, "other", {"type": "ia3"}, 5, checkpoints=2)
    plain = recipe(tmp_path, "plain", {"type": "ia3"}, 4)
    tailor.tune_many([one, other, plain], base=base, quiet=True)
    found = {name: list(artifacts.checkpoints(name)) for name in ("one", "other", "plain")}
    assert found == {"one": [], "other": [2, 4], "plain": []}  # one: its last epoch's end is its best state


def test_names_that_are_taken(own_home: Path, tmp_path: Path, base: Base) -> None:
    technique = TECHNIQUES["lora"]
    tailor.tune(recipe(tmp_path, "mine", technique, 6, checkpoints=3), base=base, quiet=True)
    assert list(artifacts.checkpoints("mine")) == [2, 4]
    artifacts.remove(artifacts.find("mine"))
    num_runs = len(list_runs())
    with pytest.raises(ConflictError, match="mine-step-2, mine-step-4"):
        tailor.tune(recipe(tmp_path, "mine", technique, 6, checkpoints=3), base=base, quiet=True)
    assert len(list_runs()) == num_runs  # said before anything was trained
    tailor.tune(recipe(tmp_path, "mine", technique, 4, checkpoints=1, force=True), base=base, quiet=True)
    assert (
        list(artifacts.checkpoints("mine")) == []
    )  # the state of step 4 is the artifact's; those of the other run went
    folder = Path(shutil.copytree(artifacts.find("mine").folder, own_home / "artifacts" / "mine-step-9"))
    assert artifacts.checkpoints("mine") == {}  # somebody's artifact with such a name
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("technique", "name", "told"),
    [
        ({"type": "full"}, "x", "frozen base; full is not"),
        ({"type": "prompting"}, "x", "prompting is not"),
        ({"type": "lora"}, "x" * 81, "up to 80 letters"),
    ],
)
def test_what_cannot_have_checkpoints(tmp_path: Path, technique: Any, name: str, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        recipe(tmp_path, name, technique, 2, checkpoints=1)
