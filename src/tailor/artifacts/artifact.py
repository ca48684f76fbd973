"""Saving, finding and attaching artifacts: `<home>/artifacts/<name>/`, described by `tailor.json`."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from tailor.artifacts.files import (
    ADAPTER_CONFIG,
    TRAINING_STATE,
    folder_hash,
    merged_weights,
    read_peft,
    read_state,
    write_model,
    write_state,
    write_techniques,
)
from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError, nearest
from tailor.models.base import Base, dtype_name
from tailor.models.slots import Slot
from tailor.runs import home
from tailor.store import atomic_folder, write_json
from tailor.techniques import Technique, TechniqueList

MANIFEST = "tailor.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A customization on disk. `manifest` is `tailor.json`; a plain PEFT folder gets one made up on reading."""

    name: str
    folder: Path
    manifest: Mapping[str, Any]

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """The techniques, with the settings they were trained with."""
        return TypeAdapter(TechniqueList).validate_python(self.manifest["techniques"])

    @property
    def kind(self) -> str:
        """The techniques' names joined by +."""
        return "+".join(technique["type"] for technique in self.manifest["techniques"])

    @property
    def is_base(self) -> bool:
        """Whether the folder is a model of its own (full, merged) rather than something to attach to one."""
        return (self.folder / "config.json").is_file()

    @property
    def base_name(self) -> str:
        """What to load: the base it was made on, or the folder itself when it is one."""
        return str(self.folder) if self.is_base else str(self.manifest["base"]["name"])


def check_name(name: str) -> str:
    """A name that is also a folder and a model id. Raises ConfigError for others."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}", name):
        raise ConfigError(
            f"{name!r} cannot be an artifact's name",
            hint="use letters, digits, '.', '_' and '-', starting with a letter or digit",
        )
    return name


def check_free(name: str, force: bool) -> Path:
    """The folder for a new artifact. Raises ConflictError when the name is taken and `force` is not given."""
    folder = home() / "artifacts" / check_name(name)
    if folder.exists() and not force:
        raise ConflictError(
            f"there is an artifact {name!r} already ({folder})", hint="choose another name, or use --force"
        )
    return folder


def made_by(name: str, run: str) -> bool:
    """Whether an artifact of that name is there and this run made it (it was killed right after saving)."""
    path = home() / "artifacts" / name / MANIFEST
    return path.is_file() and _read(path.parent).manifest.get("run") == run


def save(
    name: str,
    base: Base,
    slot: Slot,
    techniques: Sequence[Technique],
    facts: Mapping[str, Any],
    *,
    training_state: Mapping[str, Tensor] = MappingProxyType({}),
    force: bool = False,
) -> Artifact:
    """Write the slot as an artifact, atomically; `facts` (recipe, data, metrics, parity) go into `tailor.json`.

    `training_state` is what `slot.bake()` returned: training can go on from it.
    """
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


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write `tailor.json` of a folder whose other files are complete; returns it."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "content_hash": folder_hash(folder),
        "versions": {p: importlib.metadata.version(p) for p in ("tailor-llm", "torch", "transformers")},
        **facts,
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def describe_base(base: Base) -> dict[str, str]:
    """What `tailor.json` says of the base."""
    return {"name": base.name, "fingerprint": base.fingerprint, "dtype": dtype_name(base.dtype)}


def update_manifest(artifact: Artifact, **facts: Any) -> Artifact:
    """The artifact with more facts in `tailor.json` (a parity record, metrics), written atomically."""
    manifest = {**artifact.manifest, **facts}
    write_json(artifact.folder / MANIFEST, manifest)
    return Artifact(artifact.name, artifact.folder, manifest)


def find(name_or_path: str | Path) -> Artifact:
    """An artifact by name or folder; a PEFT folder without `tailor.json` will do. Raises NotFoundError, DataError."""
    for folder in (home() / "artifacts" / str(name_or_path), Path(name_or_path).expanduser()):
        if (folder / MANIFEST).is_file():
            return _read(folder)
        if (folder / ADAPTER_CONFIG).is_file():
            return _foreign(folder)
    names = [artifact.name for artifact in every()]
    raise NotFoundError(
        f"there is no artifact {str(name_or_path)!r} in {home() / 'artifacts'}",
        hint=nearest(str(name_or_path), names) if names else "make one with `tailor tune`",
    )


def every() -> list[Artifact]:
    """All artifacts of TAILOR_HOME, by name. A folder whose `tailor.json` is damaged raises DataError."""
    return [_read(path.parent) for path in sorted((home() / "artifacts").glob(f"[!.]*/{MANIFEST}"))]


def _read(folder: Path) -> Artifact:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return Artifact(str(manifest["name"]), folder, manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST}: not an artifact's manifest: {error}") from None


def _foreign(folder: Path) -> Artifact:
    technique, _ = read_peft(folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    base = {"name": config.get("base_model_name_or_path") or "", "fingerprint": ""}
    manifest = {"name": folder.name, "techniques": [technique.model_dump(mode="json")], "base": base}
    return Artifact(folder.name, folder, manifest)


def attach(base: Base, artifact: Artifact) -> Slot:
    """Attach to a loaded base. Raises ConflictError when the artifact was made on other weights."""
    expected = artifact.manifest["base"].get("fingerprint")
    if expected and base.fingerprint and expected != base.fingerprint:
        raise ConflictError(
            f"artifact {artifact.name!r} was made on base {artifact.manifest['base']['name']!r} "
            f"(fingerprint {expected[:8]}…), but {base.name!r} has other weights ({base.fingerprint[:8]}…)",
            hint="load the base it was made on",
        )
    slot = base.host.attach(artifact.techniques, baked=True)
    state = read_state(artifact.folder, artifact.techniques)
    try:
        slot.load(state)
    except BaseException:
        base.host.detach(slot)
        raise
    return slot


def start_from(slot: Slot, artifact: Artifact) -> None:
    """Let a slot that is about to train begin where the artifact's training ended.

    Raises ConfigError when its techniques have other parameters.
    """
    from safetensors.torch import load_file

    kept = artifact.folder / TRAINING_STATE
    slot.load(load_file(kept) if kept.is_file() else read_state(artifact.folder, artifact.techniques))


def write_merged(base: Base, slot: Slot, techniques: Sequence[Technique], folder: Path) -> None:
    """Write the base with the slot folded into its weights. Raises ConfigError for techniques that cannot merge."""
    stuck = [technique.type for technique in techniques if not technique.traits.merges]
    if stuck:
        raise ConfigError(
            f"{' and '.join(stuck)} cannot be merged into weights",
            hint="serve it as it is, or export it with --format peft where PEFT has the technique",
        )
    write_model(folder, base, merged_weights(base, slot))


def copy_peft(artifact: Artifact, folder: Path) -> None:
    """Copy the artifact's PEFT files alone. Raises ConfigError for what PEFT has no files for."""
    kinds = artifact.techniques
    if len(kinds) != 1:
        hint = "its parts, or a merged model, may be exported"
        raise ConfigError(f"{artifact.name}: PEFT has no files for a combination of techniques", hint=hint)
    if reason := kinds[0].beyond_peft():
        raise ConfigError(f"{artifact.name} cannot be exported for PEFT: {reason}")
    for path in artifact.folder.glob("adapter_*"):
        shutil.copyfile(path, folder / path.name)


def remove(artifact: Artifact) -> None:
    """Delete an artifact of TAILOR_HOME. Raises ConfigError for a folder elsewhere: that is not ours to delete."""
    if artifact.folder.parent != home() / "artifacts":
        raise ConfigError(f"{artifact.folder} is not in {home() / 'artifacts'}: delete it by hand if you mean it")
    shutil.rmtree(artifact.folder)
