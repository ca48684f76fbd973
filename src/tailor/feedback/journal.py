"""Folders of append-only JSON lines: several processes may write at once, and one that is killed spoils its own line.

A line is one write behind the end of the file, under the file's lock. What a killed writer left unfinished is ended by
the next one, so it never swallows a good line. Nothing here deletes; whole files may be moved away by whoever likes to.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tailor.data.containers import lines
from tailor.data.rows import BadRow, RawRow
from tailor.errors import ResourceError

FILE_BYTES = 256 << 20

_NAME = re.compile(r"(\d{4}-\d\d-\d\d)-(\d+)\.jsonl")


class Line(NamedTuple):
    """One entry, and the `file:line` where it stands."""

    place: str
    entry: dict[str, Any]


class Damage(NamedTuple):
    """A line that is no entry, as after a kill or a full disk."""

    place: str
    reason: str


class Journal:
    """One folder: a file per day (UTC), a further one when it has `max_file_bytes`.

    A line is with the system when `append` returns: it survives the death of the process. It is forced to the disk,
    which a power cut needs, when `sync_every` seconds have passed since that was last done; with 0 each time.
    """

    def __init__(self, folder: Path, *, max_file_bytes: int = FILE_BYTES, sync_every: float = 0.0) -> None:
        self.folder = folder
        self._max_file_bytes = max_file_bytes
        self._sync_every = sync_every
        self._synced = float("-inf")
        self._lock = threading.Lock()
        self._day, self._number = "", 1

    def append(self, line: bytes) -> None:
        """Add what `encode` made. Raises ResourceError when it cannot be written; then no part of it stays."""
        today = datetime.now(UTC).date().isoformat()
        with self._lock:
            if self._day != today:
                self._day, self._number = today, 1
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                while self._file(self._number + 1).exists():  # another process found this one full
                    self._number += 1
                while not self._append_to(self._file(self._number), line):
                    self._number += 1
            except OSError as error:
                raise ResourceError(f"{self.folder}: cannot be written ({error.strerror or error})") from error

    def files(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in self.folder.glob("*.jsonl") if _NAME.fullmatch(path.name)]
        return sorted(found, key=_age)

    def lines(self) -> Iterator[Line | Damage]:
        """Everything that was written, oldest first. Raises DataError when a file cannot be read."""
        for path in self.files():
            for row in lines(path):
                if isinstance(row, BadRow) or row.content.strip():  # type: ignore[union-attr]
                    yield _read(f"{path}:{row.line}", row)

    def starting_with(self, head: bytes) -> Iterator[dict[str, Any]]:
        """The whole entries whose line starts with what `head_of` made, newest first."""
        for path in reversed(self.files()):
            with path.open("rb") as file:
                found = [line for line in file if line.startswith(head)]
            for line in reversed(found):
                read = _read("", RawRow(0, line))
                if isinstance(read, Line):
                    yield read.entry

    def _file(self, number: int) -> Path:
        return self.folder / f"{self._day}-{number:03}.jsonl"

    def _append_to(self, path: Path, line: bytes) -> bool:
        """False when the file is full."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = _locked_size(descriptor)
            if size and size + len(line) > self._max_file_bytes:
                return False
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            whole = (b"\n" if torn else b"") + line + b"\n"
            if os.write(descriptor, whole) < len(whole):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _unlock(descriptor)
            if time.monotonic() - self._synced >= self._sync_every:
                os.fsync(descriptor)
                self._synced = time.monotonic()
            return True
        finally:
            os.close(descriptor)


def encode(entry: Mapping[str, Any]) -> bytes:
    """One line without its end. Raises ValueError for NaN and infinities."""
    try:
        return json.dumps(entry, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair: JSON can escape it, UTF-8 cannot carry it
        return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode("ascii")


def head_of(first: str, value: str) -> bytes:
    """How the lines start whose first field has this value.

    >>> head_of("id", "chatcmpl-1")
    b'{"id":"chatcmpl-1",'
    """
    return encode({first: value})[:-1] + b","


def _age(path: Path) -> tuple[str, int]:
    day, number = path.stem[:10], path.stem[11:]
    return day, int(number)


def _read(place: str, row: RawRow | BadRow) -> Line | Damage:
    if isinstance(row, BadRow):
        return Damage(place, row.reason)
    assert isinstance(row.content, bytes)
    try:
        entry = json.loads(row.content)
    except (ValueError, RecursionError) as error:
        return Damage(place, f"not JSON: {error}")
    return Line(place, entry) if isinstance(entry, dict) else Damage(place, "not a JSON object")


def _locked_size(descriptor: int) -> int:
    """The size of a file that nobody else appends to until it is unlocked or closed."""
    import fcntl  # not on Windows

    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.fstat(descriptor).st_size


def _unlock(descriptor: int) -> None:
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)
