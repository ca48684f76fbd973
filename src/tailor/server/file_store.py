"""Uploaded files: their bytes under names that we gave, their facts in the database. A file is there whole, or not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

from pydantic import Field
from sqlalchemy import BigInteger, Column, ColumnElement, Engine, MetaData, Row, String, Table, delete, insert, select
from sqlalchemy.exc import IntegrityError

from tailor.config import Strict
from tailor.data.rows import ROW_LIMIT, RawRow, RowError, oversized, parse
from tailor.jobs.database import Serial, make_tables, reading
from tailor.jobs.tables import new_id
from tailor.runs import home
from tailor.server.errors import ApiError, invalid, is_full, storage_full

VERSION = 1
TABLES = MetaData()
FILES = Table(
    "files",
    TABLES,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(40), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    sqlite_autoincrement=True,
)

_ID = re.compile(r"file-[0-9A-Za-z]{24}")
_STRAY_SECONDS = 86_400
_BAD_ROWS = 20


class FileSettings(Strict):
    """How much may be uploaded."""

    max_bytes: int = Field(512 << 20, ge=1, description="largest file")
    max_rows: int = Field(1_000_000, ge=1, description="most rows of a file for fine-tuning")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """The facts of a file; times are seconds since 1970."""

    seq: int
    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """The file of a row."""
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})


class FileStore:
    """The files of `<home>/files`. Expired ones are not found, and removed when others come."""

    def __init__(self, engine: Engine, settings: FileSettings | None = None) -> None:
        make_tables(engine, "files", VERSION, TABLES)
        self.settings = settings or FileSettings()
        self._engine = engine
        self._reading = reading(engine)
        self._folder = home() / "files"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remove_strays()

    def draft(self) -> Draft:
        """A file to write; nobody sees it before it is kept."""
        return Draft(self._folder / f".{secrets.token_hex(8)}.tmp", self.settings)

    def keep(
        self, draft: Draft, *, filename: str, purpose: str, expires_after: int | None = None, id: str | None = None
    ) -> StoredFile:
        """Make a finished draft a file. Raises ApiError for rows that cannot be used.

        With an `id` that is taken already, the file of that id stays as it is.
        """
        draft.check(purpose)
        self._remove_expired()
        created = int(time.time())
        file_id = id or new_id("file-")
        if id is not None and (known := self._find(FILES.c.id == id)):
            draft.discard()
            return known[0]
        path = draft.move(self._folder / file_id)
        values = {
            "id": file_id,
            "filename": shown_name(filename),
            "purpose": purpose,
            "bytes": draft.size,
            "sha256": draft.digest,
            "created_at": created,
            "expires_at": created + expires_after if expires_after is not None else None,
        }
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(FILES).values(**values))
        except BaseException as error:
            if id is not None and isinstance(error, IntegrityError) and (known := self._find(FILES.c.id == id)):
                return known[0]  # somebody else was quicker, and the file is theirs
            path.unlink(missing_ok=True)
            raise
        return self.get(file_id)

    def add(self, content: bytes, *, filename: str, purpose: str, id: str) -> StoredFile:
        """A file of our own."""
        draft = self.draft()
        try:
            draft.write(content)
            return self.keep(draft, filename=filename, purpose=purpose, id=id)
        finally:
            draft.discard()

    def get(self, file_id: str, param: str | None = None) -> StoredFile:
        """The facts of a file. Raises ApiError 404; `param` is where the id stood in the request."""
        found = self._find(FILES.c.id == file_id) if _ID.fullmatch(file_id) else []
        if not found:
            raise ApiError(404, f"No such File object: {file_id[:80]}", code="file_not_found", param=param or "id")
        return found[0]

    def path(self, file: StoredFile) -> Path:
        """Where its bytes are."""
        return self._folder / file.id

    def open(self, file_id: str) -> tuple[StoredFile, BinaryIO]:
        """The facts and the bytes of a file, which can be read to their end even when it is deleted meanwhile."""
        file = self.get(file_id)
        try:
            return file, self.path(file).open("rb")
        except FileNotFoundError:
            raise ApiError(404, f"No such File object: {file_id}", code="file_not_found", param="id") from None

    def page(
        self, limit: int, *, purpose: str | None = None, after: str | None = None, ascending: bool = False
    ) -> tuple[list[StoredFile], bool]:
        """Up to `limit` files beyond `after`, and whether there are more. Raises ApiError 404 for its id."""
        where: list[ColumnElement[bool]] = []
        if purpose is not None:
            where.append(FILES.c.purpose == purpose)
        if after is not None:
            last = self.get(after, "after").seq
            where.append(FILES.c.seq > last if ascending else FILES.c.seq < last)
        found = self._find(*where, ascending=ascending, limit=limit + 1)
        return found[:limit], len(found) > limit

    def delete(self, file_id: str) -> None:
        """Forget a file, then remove its bytes. Raises ApiError 404."""
        self._remove([self.get(file_id)])

    def _find(
        self, *where: ColumnElement[bool], ascending: bool = False, limit: int = 1, expired: bool = False
    ) -> list[StoredFile]:
        now = int(time.time())
        gone = FILES.c.expires_at.is_not(None) & (FILES.c.expires_at <= now)
        query = select(FILES).where(*where, gone if expired else ~gone).limit(limit)
        order = FILES.c.seq.asc() if ascending else FILES.c.seq.desc()
        with self._reading.connect() as connection:
            return [StoredFile.of(row) for row in connection.execute(query.order_by(order))]

    def _remove(self, files: Sequence[StoredFile]) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(FILES).where(FILES.c.id.in_([file.id for file in files])))
        for file in files:
            self.path(file).unlink(missing_ok=True)

    def _remove_expired(self) -> None:
        if expired := self._find(expired=True, limit=100):
            self._remove(expired)

    def _remove_strays(self) -> None:
        """What a kill left behind: drafts, and files moved to their place that the database does not know."""
        with self._reading.connect() as connection:
            known = set(connection.execute(select(FILES.c.id)).scalars())
        for path in self._folder.iterdir():
            stray = path.name not in known and (path.suffix == ".tmp" or _ID.fullmatch(path.name))
            with contextlib.suppress(OSError):  # another server may be at it
                if stray and time.time() - path.stat().st_mtime > _STRAY_SECONDS:
                    path.unlink()


class Draft:
    """A file under way. Size and rows are checked as they come; bad rows matter for fine-tuning only."""

    def __init__(self, path: Path, settings: FileSettings) -> None:
        self.size = 0
        self.check_rows = True
        self._path = path
        self._settings = settings
        self._file: BinaryIO | None = path.open("xb")
        self._hash = hashlib.sha256()
        self._rows = _Rows()

    @property
    def digest(self) -> str:
        """sha256 of what was written, in hex."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append. Raises ApiError 413 beyond the limits, and 507 when the disk is full."""
        assert self._file is not None
        self.size += len(data)
        if self.size > self._settings.max_bytes:
            limit = self._settings.max_bytes
            raise ApiError(413, f"The file is larger than {limit} bytes.", code="file_too_large", param="file")
        self._hash.update(data)
        with _full_disk():
            self._file.write(data)
        if self.check_rows:
            self._rows.feed(data)
            if self._rows.number > self._settings.max_rows:
                raise self._too_many()

    def check(self, purpose: str) -> None:
        """Raise ApiError when the whole file cannot serve the purpose."""
        if self.size == 0:
            raise invalid("file", "The file is empty.", "invalid_file")
        if purpose != "fine-tune":
            return
        self._rows.end()
        if self._rows.number > self._settings.max_rows:
            raise self._too_many()
        if self._rows.bad:
            raise invalid("file", self._rows.complaint(), "invalid_file_format")

    def move(self, path: Path) -> Path:
        """To its final place, when it is on the disk."""
        assert self._file is not None
        with _full_disk():
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.rename(self._path, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return path

    def discard(self) -> None:
        """Remove what was written, unless it was moved."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is buffered does not fit on the disk, and nobody wants it
                self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)

    def _too_many(self) -> ApiError:
        message = f"The file has more than {self._settings.max_rows} rows."
        return ApiError(413, message, code="file_too_large", param="file")


class _Rows:
    """The lines of a JSONL file as they come in pieces: how many, and which are no JSON objects."""

    def __init__(self) -> None:
        self.number = 0
        self.bad: list[tuple[int, str]] = []
        self.num_bad = 0
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._add(line)
            self._line()
        self._add(rest)

    def end(self) -> None:
        if self._size:
            self._line()

    def complaint(self) -> str:
        """What is wrong with which line."""
        told = [f"Line {number}: {reason}" for number, reason in self.bad]
        more = [f"… and {self.num_bad - len(self.bad)} more"] if self.num_bad > len(self.bad) else []
        return "\n".join(["Files for fine-tuning are JSON Lines: an object in every line.", *told, *more])

    def _add(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= ROW_LIMIT:
            self._parts.append(data)
        else:
            self._parts.clear()

    def _line(self) -> None:
        self.number += 1
        line = b"".join(self._parts)
        if self.number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        reason = oversized(self._size) if self._size > ROW_LIMIT else _why_not(self.number, line)
        self._parts.clear()
        self._size = 0
        if reason is not None:
            self.num_bad += 1
            if len(self.bad) < _BAD_ROWS:
                self.bad.append((self.number, reason))


def _why_not(number: int, line: bytes) -> str | None:
    if not line.strip():
        return None
    try:
        parse(RawRow(number, line))
    except RowError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise storage_full() from error


def shown_name(filename: str) -> str:
    """A client's file name as it is shown: its last part, without what cannot be printed. It never names a file."""
    last = re.split(r"[/\\]", filename)[-1]
    return "".join(character for character in last if character.isprintable())[:255] or "file"
