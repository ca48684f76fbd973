"""Files of an artifact that are not those that were written: an error by name, wherever they are loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tailor
from tailor.artifacts import artifact as artifacts
from tailor.artifacts import integrity
from tailor.artifacts.artifact import Artifact
from tailor.artifacts.files import TRAINING_STATE
from tailor.errors import DamageError, NotFoundError
from tailor.models.base import Base, load_base
from tailor.techniques import Technique
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.p_tuning import PTuning

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tailor-nano", dtype="float32")


def saved(base: Base, technique: Technique, name: str = "mine", **more: bool) -> Artifact:
    slot = base.host.attach([technique], seed=1)
    state = slot.bake()
    artifact = artifacts.save(name, base, slot, [technique], {}, training_state=state, **more)
    base.host.detach(slot)
    return artifact


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the lowest bit of a float32
    path.write_bytes(content)


def test_the_manifest_lists_every_file(own_home: Path, base: Base) -> None:
    artifact = saved(base, PTuning(num_virtual_tokens=2, encoder="mlp"))
    files = artifact.manifest["files"]
    assert set(files) == {path.name for path in artifact.folder.iterdir()} - {"tailor.json"}
    assert TRAINING_STATE in files
    digest = hashlib.sha256()
    for name, facts in sorted(files.items()):
        content = (artifact.folder / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if name != TRAINING_STATE:
            digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    assert artifact.manifest["content_hash"] == digest.hexdigest()[:32]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (flip, r"adapter_model\.safetensors is not what was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"adapter_model\.safetensors has \d+ bytes where"),
        (Path.unlink, r"adapter_model\.safetensors is missing"),
    ],
)
def test_changed_weights_are_never_attached(
    own_home: Path, base: Base, spoil: Callable[[Path], object], told: str
) -> None:
    artifact = saved(base, LoRA(rank=2))
    assert integrity.intact(artifact) is artifact
    spoil(artifact.folder / WEIGHTS)
    before = len(base.host.slots)
    with pytest.raises(DamageError, match=told) as error:
        tailor.load("mine", base)
    assert "mine" in str(error.value)
    assert len(base.host.slots) == before


def test_a_model_of_its_own_is_looked_at_too(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = saved(load_base("tailor-nano", dtype="float32"), Full())
    weights = artifact.folder / "model.safetensors"
    flip(weights)
    with pytest.raises(DamageError, match=r"model\.safetensors is not what was written"):
        tailor.load("mine")
    # of large files the size alone is compared, and of small ones every byte
    monkeypatch.setattr(integrity, "LARGE", weights.stat().st_size - 1)
    assert tailor.load("mine").generate("Hi", max_new_tokens=1) is not None
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(DamageError, match="bytes where"):
        tailor.load("mine")


def test_training_goes_on_from_whole_files_only(own_home: Path, base: Base) -> None:
    technique = PTuning(num_virtual_tokens=2, encoder="mlp")
    artifact = saved(base, technique)
    flip(artifact.folder / TRAINING_STATE)
    slot = base.host.attach([technique], seed=2)
    with pytest.raises(DamageError, match=r"training_state\.safetensors is not what was written"):
        artifacts.start_from(slot, artifact)
    base.host.detach(slot)


def test_one_task_of_a_table_is_looked_at_with_its_table(own_home: Path, base: Base) -> None:
    technique = tailor.PromptTuning(num_virtual_tokens=2, init="random", task="first")
    task = saved(base, technique, add=True)
    saved(base, technique.model_copy(update={"task": "second"}), add=True)
    # the table was written anew since `task` was read: it is not damaged
    assert integrity.intact(task).task == "first"
    flip(task.folder / "prompt_table.safetensors")
    with pytest.raises(DamageError, match="prompt_table"):
        integrity.intact(artifacts.find("mine").of_task("second"))


def test_what_was_replaced_is_read_as_it_is_now(own_home: Path, base: Base) -> None:
    before = saved(base, LoRA(rank=2))
    saved(base, LoRA(rank=4), force=True)
    now = integrity.intact(before)
    assert (now.name, now.techniques[0]) == ("mine", LoRA(rank=4))
    slot = artifacts.attach(base, before)
    assert {p.shape[0] for n, p in slot.parameters.items() if n.endswith("lora_A")} <= {4}
    base.host.detach(slot)
    shutil.rmtree(before.folder)
    with pytest.raises(NotFoundError, match="not there any more"):
        integrity.intact(before)


def test_manifests_of_before_and_of_others(own_home: Path, base: Base) -> None:
    artifact = saved(base, LoRA(rank=2))
    path = artifact.folder / "tailor.json"
    older = {key: value for key, value in json.loads(path.read_text()).items() if key != "files"}
    path.write_text(json.dumps(older))
    assert integrity.changed(artifacts.find("mine")) is None
    flip(artifact.folder / WEIGHTS)
    with pytest.raises(DamageError, match="mine"):
        integrity.intact(artifacts.find("mine"))
    path.unlink()  # a PEFT folder: it says nothing of its bytes
    slot = artifacts.attach(base, artifacts.find(artifact.folder))
    assert all(torch.isfinite(p).all() for p in slot.parameters.values())
    base.host.detach(slot)


def test_notes_beside_the_files_do_no_harm(own_home: Path, base: Base) -> None:
    artifact = saved(base, LoRA(rank=2))
    (artifact.folder / "README.md").write_text("ours")
    assert integrity.intact(artifact) is artifact
