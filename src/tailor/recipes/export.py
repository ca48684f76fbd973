"""Merge and export, each with proof that the result answers as the artifact does; what differs is never kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import MANIFEST, Artifact
from tailor.errors import ConflictError
from tailor.evaluation.parity import Parity
from tailor.inference.load import Customized, load
from tailor.recipes.verify import held_out, verify_folder
from tailor.store import atomic_folder, write_json

Format = Literal["hf", "peft"]


def merge(name: str, to: str, *, force: bool = False) -> tuple[Artifact, Parity]:
    """Save `name` folded into its base as the new artifact `to`, a model of its own.

    Raises ConfigError for techniques that cannot merge, QualityError (keeping nothing) when the merged model answers
    differently.
    """
    target = artifacts.check_free(to, force)
    customized = load(name)
    artifact = _mergeable(customized, name)
    facts = {**artifact.manifest, "name": to, "parent": artifact.name, "merged": artifact.kind}
    facts["techniques"] = [{"type": "full"}]
    parity = _write(customized, artifact, target, "hf", force, facts)
    return artifacts.find(to), parity


def export(name: str, folder: Path, format: Format, *, force: bool = False) -> Parity:
    """Write `name` into `folder` for other tools. Raises ConfigError, ConflictError, QualityError as `merge` does."""
    customized = load(name)
    artifact = _mergeable(customized, name)
    return _write(customized, artifact, folder, format, force, None)


def _mergeable(customized: Customized, name: str) -> Artifact:
    if customized.artifact is None:
        raise ConflictError(f"{name!r} is a base, not an artifact: there is nothing to export")
    if customized.slot is None:
        folder = customized.artifact.folder
        raise ConflictError(f"{name!r} is a model of its own already", hint=f"its Hugging Face folder is {folder}")
    return customized.artifact


def _write(
    customized: Customized,
    artifact: Artifact,
    folder: Path,
    format: Format,
    force: bool,
    manifest: Mapping[str, Any] | None,
) -> Parity:
    """The folder appears only after what is in it has been loaded and compared."""
    assert customized.slot is not None
    with atomic_folder(folder, force=force) as draft:
        if format == "hf":
            artifacts.write_merged(customized.base, customized.slot, artifact.techniques, draft)
        else:
            artifacts.copy_peft(artifact, draft)
        parity = verify_folder(customized, draft, format, held_out(artifact))
        parity.check()
        if manifest is not None:
            write_json(draft / MANIFEST, {**manifest, "parity": parity.to_dict()})
    return parity
