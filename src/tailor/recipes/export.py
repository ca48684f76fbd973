"""Merge and export, each with proof that the result answers as the artifact does; what differs is never kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import Artifact
from tailor.artifacts.peft_export import copy_peft
from tailor.errors import ConflictError
from tailor.evaluation.parity import Parity
from tailor.inference.load import Customized, load_local
from tailor.recipes.verify import rows_for, verify_folder
from tailor.store import atomic_folder

Format = Literal["hf", "peft"]


@dataclass(frozen=True)
class Target:
    """Where an export goes, and the rows it is compared on: those of `data`, or those that the run held out."""

    folder: Path
    format: Format
    data: str | None = None
    force: bool = False


def merge(
    name: str, to: str, *, base: str | None = None, data: str | None = None, force: bool = False
) -> tuple[Artifact, Parity]:
    """Save `name` folded into its base as the new artifact `to`, a model of its own.

    Raises ConfigError for techniques that cannot merge, QualityError (keeping nothing) when the merged model answers
    differently.
    """
    customized = load_local(name, base)
    artifact = _exportable(customized, name)
    facts = {
        **{
            key: artifact.manifest[key] for key in ("recipe", "objective", "data", "labels") if key in artifact.manifest
        },
        "name": to,
        "parent": artifact.name,
        "merged": artifact.kind,
        "techniques": [{"type": "full"}],
        "num_parameters": customized.base.num_parameters,
        "base": dict(artifact.manifest["base"]),
    }
    target = Target(artifacts.check_free(to, force), "hf", data, force)
    parity = _write(customized, artifact, target, facts)
    return artifacts.find(to), parity


def export(
    name: str,
    folder: Path,
    format: Format,
    *,
    task: str | None = None,
    base: str | None = None,
    data: str | None = None,
    force: bool = False,
) -> Parity:
    """Write `name`, or one task of a prompt table, into `folder` for other tools.

    Raises ConfigError, ConflictError, QualityError as `merge` does, and ConfigError for several tasks.
    """
    customized = load_local(name, base, task=task)
    return _write(customized, _exportable(customized, name), Target(folder, format, data, force), None)


def _exportable(customized: Customized, name: str) -> Artifact:
    if customized.artifact is None:
        raise ConflictError(f"{name!r} is a base, not an artifact: there is nothing to export")
    if customized.slot is None:
        folder = customized.artifact.folder
        raise ConflictError(f"{name!r} is a model of its own already", hint=f"its Hugging Face folder is {folder}")
    return customized.artifact.of_task(None)  # one of several tasks must have been named


def _write(customized: Customized, artifact: Artifact, target: Target, facts: Mapping[str, Any] | None) -> Parity:
    """The folder appears only after what is in it has been loaded and compared."""
    assert customized.slot is not None
    rows = rows_for(artifact, target.data)
    with atomic_folder(target.folder, force=target.force) as draft:
        if target.format == "hf":
            artifacts.write_merged(customized.base, customized.slot, artifact.techniques, draft)
        else:
            copy_peft(artifact, customized.slot, customized.base, draft)
        parity = verify_folder(customized, draft, target.format, rows)
        parity.check()
        if facts is not None:
            artifacts.write_manifest(draft, {**facts, "parity": parity.to_dict()})
    return parity
