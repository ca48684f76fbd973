"""Folders of columns that can be made again, kept under the home by a hash of all that they were made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tailor import __version__
from tailor.data.columns import Columns, ColumnWriter, open_columns
from tailor.errors import ConflictError
from tailor.runs import home
from tailor.store import DAY, atomic_folder

LIMIT = 8 * 2**30
"""Bytes that the cache may hold; beyond, what was not used for longest is removed."""

FORMAT = 1
"""Counted up when columns of the same key would be written differently."""

_OURS = re.compile(r"[0-9a-f]{64}")
_DRAFT = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8}\.(tmp|old)")


def cache_key(*parts: Any) -> str:
    """A hash of all that a cached folder depends on (values that JSON knows), and of this version of the program."""
    return hashlib.sha256(json.dumps([FORMAT, __version__, *parts], sort_keys=True).encode()).hexdigest()


def cached(kind: str, key: str, build: Callable[[ColumnWriter], Mapping[str, Any]]) -> Columns | None:
    """The columns kept under `key`, built first when they are not there: `find` or else `keep`."""
    return find(kind, key) or keep(kind, key, build)


def find(kind: str, key: str) -> Columns | None:
    """The columns kept under `key`; None when they are not there, or damaged."""
    folder = _folder(kind, key)
    found = open_columns(folder)
    if found is not None:
        with contextlib.suppress(OSError):  # the home may be another's
            os.utime(folder)  # removal goes by last use
    return found


def keep(kind: str, key: str, build: Callable[[ColumnWriter], Mapping[str, Any]]) -> Columns | None:
    """Build columns and keep them under `key`, in the place of damaged ones. `build` returns the facts beside them.

    The folder appears whole or not at all; of several processes that build the same one the first wins. None when the
    home cannot be written to (the disk is full, say). Whatever else `build` raises is raised.
    """
    folder = _folder(kind, key)
    try:
        with atomic_folder(folder, force=folder.exists()) as draft:
            _write(draft, build)
    except (ConflictError, OSError):
        return find(kind, key)  # another process was faster, or nothing can be written
    _prune(folder)
    return find(kind, key)


def _folder(kind: str, key: str) -> Path:
    return home() / "cache" / kind / key


def _write(draft: Path, build: Callable[[ColumnWriter], Mapping[str, Any]]) -> None:
    writer = ColumnWriter(draft)
    facts = None
    try:
        facts = build(writer)
    finally:
        writer.close(facts)


def _prune(newest: Path) -> None:
    """Remove drafts that nobody writes any more, then the folders that were not used for longest; never `newest`."""
    entries = [entry for entry in (home() / "cache").glob("*/*") if entry.is_dir() and not entry.is_symlink()]
    used: list[tuple[float, int, Path]] = []
    for entry in entries:
        with contextlib.suppress(OSError):  # another process may be removing it
            if _OURS.fullmatch(entry.name):
                used.append((entry.stat().st_mtime, sum(file.stat().st_size for file in entry.iterdir()), entry))
            elif _DRAFT.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > DAY:
                shutil.rmtree(entry, ignore_errors=True)
    total = sum(size for _, size, _ in used)
    for _, size, entry in sorted(used):
        if total <= LIMIT:
            return
        if entry != newest:
            # who has it open goes on reading it: a file lives until it is closed
            shutil.rmtree(entry, ignore_errors=True)
            total -= size
