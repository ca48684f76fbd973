"""Saving, finding and attaching artifacts: `<home>/artifacts/<name>/`, described by `tailor.json`."""

from __future__ import annotations

import contextlib
import datetime
import glob
import importlib.metadata
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from tailor.artifacts.compatibility import check_base, describe_base
from tailor.artifacts.files import (
    ADAPTER_CONFIG,
    PROMPT,
    TRAINING_STATE,
    damage_told,
    load_tensors,
    merged_weights,
    read_state,
    write_model,
    write_state,
    write_techniques,
)
from tailor.artifacts.integrity import content_hash, described, intact
from tailor.artifacts.manifest import MANIFEST as MANIFEST
from tailor.artifacts.manifest import SCHEMA_VERSION, foreign, read
from tailor.artifacts.manifest import Artifact as Artifact
from tailor.artifacts.prompt_table import PROMPT_TABLE, is_table, key_of, named, unnamed, without
from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError, nearest
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.runs import hold, home
from tailor.store import atomic_folder, write_json
from tailor.techniques import Technique


def check_name(name: str) -> str:
    """A name that is also a folder and a model id. Raises ConfigError for others."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
        raise ConfigError(
            f"{name!r} cannot be an artifact's name",
            hint="use letters, digits, '.', '_' and '-', starting with a letter or digit",
        )
    return name


def checkpoint_name(name: str, step: int) -> str:
    """What the state after a step of the run that made an artifact is called."""
    return f"{name}-step-{step}"


def checkpoints(name: str) -> dict[int, Artifact]:
    """The checkpoints of an artifact that are there, by their step, in order. Damaged ones are left out."""
    found = {}
    for path in (home() / "artifacts").glob(f"{glob.escape(name)}-step-*/{MANIFEST}"):
        with contextlib.suppress(DataError, FileNotFoundError):
            artifact = read(path.parent)
            told = artifact.manifest.get("checkpoint")
            if told and told["of"] == name and artifact.name == checkpoint_name(name, told["step"]):
                found[int(told["step"])] = artifact
    return dict(sorted(found.items()))


def check_free(name: str, force: bool, task: str | None = None) -> Path:
    """The folder for a new artifact, or for the prompt table that `task` is added to (it need not be there yet).

    Raises ConflictError when the name, or the task in the table, is taken and `force` is not given.
    """
    folder = home() / "artifacts" / check_name(name)
    if task is not None and folder.exists():
        _check_task_free(find(name), task, force)
    elif folder.exists() and not force:
        raise ConflictError(
            f"there is an artifact {name!r} already ({folder})", hint="choose another name, or use --force"
        )
    return folder


def _check_task_free(table: Artifact, task: str, force: bool) -> None:
    if not table.tasks:
        raise ConflictError(
            f"artifact {table.name!r} is no prompt table ({table.kind}): no task can be added to it",
            hint="choose another name; the first task of a table is named too (technique.task)",
        )
    if task in table.tasks and not force:
        raise ConflictError(
            f"prompt table {table.name!r} has a task {task!r} already",
            hint="choose another task name, or use --force: it replaces this task alone",
        )


def check_same_base(name: str, base: Base) -> None:
    """Raise ConflictError when there is an artifact of that name and it was made on other weights."""
    if (home() / "artifacts" / name / MANIFEST).is_file():
        check_base(base, find(name))


def made_by(name: str, run: str) -> bool:
    """Whether an artifact of that name is there and this run made it (it was killed right after saving)."""
    path = home() / "artifacts" / name / MANIFEST
    if not path.is_file():
        return False
    manifest = read(path.parent).manifest
    return any(facts.get("run") == run for facts in (manifest, *manifest.get("tasks", {}).values()))


def save(  # noqa: PLR0913 - what is saved, and how
    name: str,
    base: Base,
    slot: Slot,
    techniques: Sequence[Technique],
    facts: Mapping[str, Any],
    *,
    training_state: Mapping[str, Tensor] = MappingProxyType({}),
    force: bool = False,
    add: bool = False,
) -> Artifact:
    """Write the slot as an artifact, atomically; `facts` (recipe, data, metrics, parity) go into `tailor.json`.

    `training_state` is what `slot.bake()` returned: training can go on from it. A soft prompt for a named task becomes
    a prompt table, or joins the one of that name with `add`; its own part of the table is returned.
    """
    if is_table(techniques):
        with _table(home() / "artifacts" / check_name(name)):
            return _save_task(name, base, slot, techniques, facts, training_state, force=force, add=add)
    folder = check_free(name, force)
    with atomic_folder(folder, force=force) as draft:
        write_techniques(draft, techniques, slot, base)
        if training_state:
            write_state(draft / TRAINING_STATE, training_state)
        own = {
            "name": name,
            "techniques": [technique.model_dump(mode="json") for technique in techniques],
            "num_parameters": slot.num_parameters,
            "num_trained": slot.num_parameters + slot.num_dropped,
            "base": describe_base(base),
        }
        manifest = write_manifest(draft, {**own, **facts})
    return Artifact(name, folder, manifest)


def _table(folder: Path) -> AbstractContextManager[None]:
    """Hold a prompt table while it is read and written anew: who adds another task at that time waits."""
    return hold(folder.with_name(f".{folder.name}"), f"prompt table {folder.name}", wait=True)


def _save_task(  # noqa: PLR0913 - those of `save`
    name: str,
    base: Base,
    slot: Slot,
    techniques: Sequence[Technique],
    facts: Mapping[str, Any],
    training_state: Mapping[str, Tensor],
    *,
    force: bool,
    add: bool,
) -> Artifact:
    """A table with this task, and with all that are in it already when it is one to `add` to."""
    if len(techniques) > 1:
        raise ConfigError("the tasks of a prompt table are trained one by one", hint="add each with output.add=true")
    task = key_of(techniques[0])
    folder = check_free(name, force, task if add else None)
    there = find(name).manifest if add and folder.exists() else {}
    if add:
        check_same_base(name, base)
    with atomic_folder(folder, force=force or add) as draft:
        write_techniques(draft, techniques, slot, base)
        own = load_tensors(draft / PROMPT_TABLE)
        write_state(draft / PROMPT_TABLE, {**without(folder / PROMPT_TABLE, [task]), **own} if add else own)
        kept = without(folder / TRAINING_STATE, [task], prefixed=True) if add else {}
        if kept or training_state:
            write_state(draft / TRAINING_STATE, {**kept, **named(task, training_state)})
        told = {
            "techniques": [technique.model_dump(mode="json") for technique in techniques],
            "num_parameters": slot.num_parameters,
            "num_trained": slot.num_parameters + slot.num_dropped,
            "created": _now(),
            **facts,
        }
        tasks = {**there.get("tasks", {}), task: told}
        shared = {
            "name": name,
            "techniques": [technique for each in tasks.values() for technique in each["techniques"]],
            "num_parameters": sum(each["num_parameters"] for each in tasks.values()),
            "base": there.get("base") or describe_base(base),
            "tasks": tasks,
        }
        manifest = write_manifest(draft, shared)
    return Artifact(name, folder, manifest).of_task(task)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def save_hosted(name: str, base: str, facts: Mapping[str, Any], *, force: bool = False) -> Artifact:
    """Write what was made on a hosted base, atomically: `techniques` around it, or a `model` that was tuned there.

    Nothing of a model is here, so that `tailor.json` and prompts are all of it.
    """
    folder = check_free(name, force)
    with atomic_folder(folder, force=force) as draft:
        for technique in facts["techniques"]:
            write_json(draft / PROMPT, technique)
        own = {"name": name, "num_parameters": 0, "num_trained": 0, "base": {"name": base, "fingerprint": ""}}
        manifest = write_manifest(draft, {**own, **facts})
    return Artifact(name, folder, manifest)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `tailor.json` of a folder whose other files are complete; returns it."""
    files = described(folder)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": _now(),
        "content_hash": content_hash(files),
        "files": files,
        "versions": {p: importlib.metadata.version(p) for p in ("tailor-llm", "torch", "transformers")},
        **facts,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def update_manifest(artifact: Artifact, **facts: Any) -> Artifact:
    """The artifact with more facts in `tailor.json` (a parity record, metrics), written atomically.

    Those of a prompt table's task stand with the task.
    """
    if artifact.task is not None:
        with _table(artifact.folder):
            table = read(artifact.folder)
            tasks = {**table.manifest["tasks"], artifact.task: {**table.manifest["tasks"][artifact.task], **facts}}
            return update_manifest(table, tasks=tasks).of_task(artifact.task)
    manifest = {**artifact.manifest, **facts}
    write_json(artifact.folder / MANIFEST, manifest)
    return Artifact(artifact.name, artifact.folder, manifest)


def find(name_or_path: str | Path) -> Artifact:
    """An artifact by name or folder; a PEFT folder without `tailor.json` will do. Raises NotFoundError, DataError."""
    for folder in (home() / "artifacts" / str(name_or_path), Path(name_or_path).expanduser()):
        if (folder / MANIFEST).is_file():
            return read(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            return foreign(folder)
    names = [artifact.name for artifact in survey()[0]]
    raise NotFoundError(
        f"there is no artifact {str(name_or_path)!r} in {home() / 'artifacts'}",
        hint=nearest(str(name_or_path), names) if names else "make one with `tailor tune`",
    )


def every() -> list[Artifact]:
    """All artifacts of TAILOR_HOME, by name. A folder whose `tailor.json` is damaged raises DataError."""
    found, damaged = survey()
    for error in damaged.values():
        raise error
    return found


def survey() -> tuple[list[Artifact], dict[str, DataError]]:
    """All artifacts of TAILOR_HOME that can be read, by name, and what is wrong with the others, by folder."""
    found: list[Artifact] = []
    damaged: dict[str, DataError] = {}
    for path in sorted((home() / "artifacts").glob(f"[!.]*/{MANIFEST}")):
        try:
            found.append(read(path.parent))
        except FileNotFoundError:  # removed since it was listed
            continue
        except DataError as error:
            damaged[path.parent.name] = error
    return found, damaged


def attach(base: Base, artifact: Artifact, state: Mapping[str, Tensor] | None = None) -> Slot:
    """Attach to a loaded base. Raises ConflictError when the artifact was made on other weights, DataError for damage.

    Quantised weights are others than those they were made from. `state`: what `read_state` gave, if it was read before.
    """
    check_base(base, artifact)
    with damage_told(artifact.name, artifact.folder):
        artifact = intact(artifact) if state is None else artifact
        techniques = artifact.techniques
        state = read_state(artifact.folder, techniques) if state is None else state
    slot = base.host.attach(techniques, baked=True)
    try:
        slot.load(state)
    except BaseException:
        base.host.detach(slot)
        raise
    return slot


def start_from(slot: Slot, artifact: Artifact) -> None:
    """Let a slot that is about to train begin where the artifact's training ended.

    Raises ConfigError when its techniques have other parameters, DamageError when its files have changed.
    """
    artifact = intact(artifact)
    kept = artifact.folder / TRAINING_STATE
    state = load_tensors(kept) if kept.is_file() else {}
    if artifact.task is not None:
        state = unnamed(artifact.task, state)
    try:
        slot.load(state or read_state(artifact.folder, artifact.techniques))
    except ConfigError as error:
        hint = f"give the settings that it has: tailor artifacts show {artifact.name}"
        raise ConfigError(
            f"start: {artifact.name} was trained with other settings: {error.message}", hint=hint
        ) from None


def write_merged(base: Base, slot: Slot, techniques: Sequence[Technique], folder: Path) -> None:
    """Write the base with the slot folded into its weights. Raises ConfigError for techniques that cannot merge."""
    stuck = [technique.type for technique in techniques if not technique.traits.merges]
    if stuck:
        raise ConfigError(
            f"{' and '.join(stuck)} cannot be merged into weights",
            hint="serve it as it is, or export it with --format peft where PEFT has the technique",
        )
    write_model(folder, base, merged_weights(base, slot))


def remove(artifact: Artifact) -> None:
    """Delete an artifact of TAILOR_HOME. Raises ConfigError for a folder elsewhere: that is not ours to delete."""
    if artifact.folder.parent != home() / "artifacts":
        raise ConfigError(f"{artifact.folder} is not in {home() / 'artifacts'}: delete it by hand if you mean it")
    shutil.rmtree(artifact.folder)
