"""Files that are never half-written: a temporary sibling, fsync, then one rename."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailor.errors import ConflictError

DAY = 86_400.0
"""Seconds after which a draft has no writer any more."""


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


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, quota or limit that is reached."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise OSError, as Python's own files do, where a library tells what the system said in words of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # safetensors': "… No space left on device (os error 28)"
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends, and vanishes when the block raises.

    Raises ConflictError when `path` exists, before the block and again at its end. With `force` the new folder takes
    the place of the old one in one system call where the system has it (Linux). Elsewhere the old one is moved aside
    first, and a kill between the two renames leaves nothing at `path` until `recover`, which is called here too.
    What a kill left beside `path` more than a day ago is removed.
    """
    path = _with_name(Path(path))
    recover(path)
    _remove_stale(path)
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


def recover(path: str | Path) -> bool:
    """Put the old folder back that a kill during a replacement left aside; whether there was one to put back.

    Only while nobody else is replacing `path`.
    """
    path = _with_name(Path(path))
    if os.path.lexists(path):
        return False
    aside = [entry for entry in _siblings(path) if entry.suffix == ".old"]
    if not aside:
        return False
    os.rename(max(aside, key=lambda entry: entry.lstat().st_mtime), path)
    _fsync(path.parent)
    return True


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
    if not os.path.lexists(path):
        os.rename(new, path)
        _fsync(path.parent)
        return
    old = new if _exchange(new, path) else _rename_twice(new, path)
    _fsync(path.parent)
    _remove(old)


def _rename_twice(new: Path, path: Path) -> Path:
    """Where the old folder is now."""
    old = _sibling(path, "old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    return old


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step (Linux, renameat2(2)); False where system or disk cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    return (
        renameat2 is not None
        and renameat2(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchange) == 0
    )


def _remove_stale(path: Path) -> None:
    for entry in _siblings(path):
        with contextlib.suppress(OSError):  # its writer may be at it, or it may not be ours to remove
            if time.time() - entry.lstat().st_mtime > DAY:
                _remove(entry)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _with_name(path: Path) -> Path:
    """`.` and `..` as the folders that they are; symbolic links by other names stay what they are."""
    return path.resolve() if path.name in ("", "..") else path


def _siblings(path: Path) -> list[Path]:
    """What `_sibling` named: drafts (.tmp) and folders moved aside (.old)."""
    if not path.parent.is_dir():
        return []
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    return [entry for entry in path.parent.iterdir() if ours.fullmatch(entry.name)]


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
