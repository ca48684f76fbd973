"""Files that are never half-written: a temporary sibling, fsync, then one rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailor.errors import ConflictError


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replace `path` by `content`, or leave it untouched: a reader never sees a part. Parent folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, line ends as given."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by JSON with sorted keys and 2-space indent. NaN and infinities raise ValueError."""
    try:
        text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate: JSON can escape it, UTF-8 cannot carry it
        content = json.dumps(value, sort_keys=True, indent=2, allow_nan=False).encode("ascii")
    write_bytes(path, content + b"\n")


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends, and vanishes when the block raises.

    Raises ConflictError when `path` exists, before the block and again at its end. With `force` the old folder is
    moved aside, and removed only once the new one is in its place.
    """
    path = Path(path)
    _refuse_existing(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _fsync(Path(folder, name))
            _fsync(Path(folder))
        _refuse_existing(path, force)
        _swap(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(text: str) -> str:
    """sha256 of a text in UTF-8, in hex. Lone surrogates are hashed as their three bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _refuse_existing(path: Path, force: bool) -> None:
    if os.path.lexists(path) and not force:
        raise ConflictError(f"{path} exists already", hint="choose another name, or replace it with --force")


def _swap(new: Path, path: Path) -> None:
    old = _sibling(path, "old")
    replaced = os.path.lexists(path)
    if replaced:
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if replaced:
            os.rename(old, path)
        raise
    _fsync(path.parent)
    if replaced:
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()


def _sibling(path: Path, suffix: str) -> Path:
    """A hidden name in the same folder, hence on the same disk, so that the rename is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def _fsync(path: Path) -> None:
    if path.is_symlink() or (path.is_dir() and os.name == "nt"):  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
