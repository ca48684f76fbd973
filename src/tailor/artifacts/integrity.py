"""Whether an artifact's files are those that were written: a flipped bit is an error, not another answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tailor.artifacts.files import TRAINING_STATE
from tailor.artifacts.manifest import MANIFEST, Artifact, read
from tailor.errors import DamageError, NotFoundError
from tailor.store import file_hash

LARGE = 1 << 30
"""Bytes of a file above which its size stands for its content, in models of their own."""

Files = Mapping[str, Mapping[str, Any]]
"""Path within the artifact's folder → its `size` in bytes and its `sha256`."""


def described(folder: Path) -> Files:
    """All files of a folder but `tailor.json`, which is where this goes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_hash(path)} for path in paths
    }


def content_hash(files: Files) -> str:
    """A hash over the names and bytes of the files that decide what the artifact answers."""
    digest = hashlib.sha256()
    for path, facts in files.items():
        if not path.endswith(TRAINING_STATE):
            digest.update(path.encode() + b"\0" + bytes.fromhex(facts["sha256"]))
    return digest.hexdigest()[:32]


def intact(artifact: Artifact) -> Artifact:
    """The artifact, after a look at whether its files are those that were written; as it is now, if it was replaced.

    Everything that is loaded comes by here. All bytes are hashed; only in a model of its own (full, merged) files of
    more than a gibibyte are known by their size, because hashing takes about as long as reading them. An adapter of
    other programs says nothing of its bytes.

    Raises DamageError that names the file, and NotFoundError when the folder has gone.
    """
    if (damage := changed(artifact)) is None:
        return artifact
    try:
        now = read(artifact.folder)
    except FileNotFoundError:
        raise NotFoundError(f"artifact {artifact.name!r} is not there any more") from None
    if now.manifest.get("content_hash") == artifact.manifest.get("content_hash") or changed(now) is not None:
        raise DamageError(
            f"artifact {artifact.name!r} is damaged: {damage}",
            hint="put the file back from a copy, or make the artifact again",
        )
    now = replace(now, name=artifact.name)
    return now if artifact.task is None else now.of_task(artifact.task)


def changed(artifact: Artifact) -> str | None:
    """Which file is not as it was written, and how; None when all are. Files that were added later do not count, nor
    does the state that training goes on from where it was taken away: answers do not need it.

    Where `tailor.json` is older than its list of files, all of them are compared at once.
    """
    files: Files | None = artifact.manifest.get("files")
    if files is None:
        wanted = artifact.manifest.get("content_hash")
        same = wanted is None or wanted == content_hash(described(artifact.folder))
        return None if same else f"the files in {artifact.folder} are not those that were written"
    for name, facts in files.items():
        if Path(name).name == TRAINING_STATE and not (artifact.folder / name).is_file():
            continue
        if (how := _difference(artifact.folder / name, facts, artifact.is_base)) is not None:
            return f"{artifact.folder / name} {how}"
    return None


def _difference(path: Path, facts: Mapping[str, Any], is_base: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != facts["size"]:
        return f"has {size} bytes where {facts['size']} were written"
    if is_base and size > LARGE:
        return None
    return None if file_hash(path) == facts["sha256"] else "is not what was written (SHA-256)"
