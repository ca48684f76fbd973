"""Records of a large file: its rows lie on disk as the file has them, and are converted when they are looked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import index as as_index
from typing import Any, overload

import numpy as np

from tailor.data.cache import cache_key
from tailor.data.columns import Columns, ColumnWriter, Numbers, span
from tailor.data.containers import Container
from tailor.data.parallel import in_ranges
from tailor.data.progress import Progress
from tailor.data.records import Record
from tailor.data.rows import BadRow, RawRow, RowError, parse
from tailor.errors import DataError
from tailor.store import file_hash

MakeRecord = Callable[[int, Mapping[str, Any]], Record]
"""(line, parsed row) → record. Raises RowError."""


ROWS_AT_ONCE = 64
"""Rows that are copied together; each may have 16 MiB, but most are small and each piece has its cost."""


class NotJSONError(Exception):
    """A table holds a value that JSON would not give back."""


@dataclass(frozen=True, slots=True)
class RowFile:
    """All rows of a file, bad ones too, on disk as JSON: row k ends at `ends[k]` and was in line `lines[k]`."""

    key: str
    columns: Columns
    make: MakeRecord

    def row(self, k: int) -> tuple[int, bytes]:
        """(line, JSON) of row k."""
        start, stop = span(self.columns["ends"], k)
        return int(self.columns["lines"][k : k + 1][0]), self.columns["rows"][start:stop].tobytes()


class StoredRecords(Sequence[Record]):
    """Records that stay on disk: all of a file, or a selection. 4 bytes of memory per record; slices are selections."""

    def __init__(self, file: RowFile, places: Numbers) -> None:
        self.file = file
        self.places = places

    @property
    def key(self) -> str:
        """A hash of what the records are; the path in their `source` has no part in it."""
        return cache_key(self.file.key, hashlib.sha256(self.places.tobytes()).hexdigest())

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> StoredRecords: ...
    def __getitem__(self, place: int | slice) -> Record | StoredRecords:
        if isinstance(place, slice):
            return StoredRecords(self.file, self.places[place])
        line, row = self.file.row(int(self.places[as_index(place)]))
        return self.file.make(line, json.loads(row))  # it was parsed strictly when it was stored


def select(records: Sequence[Record], places: Numbers) -> Sequence[Record]:
    """The records at these places; those on disk stay there."""
    if isinstance(records, StoredRecords):
        return StoredRecords(records.file, records.places[places])
    return [records[place] for place in places]


def store_rows(
    container: Container, make: MakeRecord, writer: ColumnWriter, digest: str, progress: Progress
) -> dict[str, Any]:
    """Write the rows of a file, whose SHA-256 is `digest`, and try each. The facts that `stored_records` needs.

    Raises NotJSONError for tables with values that JSON does not know, and DataError when the file changes meanwhile.
    """
    bad, is_table = _copy(container, writer)
    if file_hash(container.path) != digest:
        raise DataError(f"{container.path} was changed while it was read", hint="try again")
    bad |= _unusable(RowFile("", writer.written(), make), bad, is_table, progress)
    return {"bad": sorted(bad.items())}


def stored_records(key: str, columns: Columns, make: MakeRecord) -> tuple[StoredRecords, tuple[BadRow, ...]]:
    """The usable records of a file that was stored under `key`, and its bad rows."""
    bad: list[tuple[int, str]] = columns.facts["bad"]
    usable = np.delete(np.arange(len(columns["lines"]), dtype=np.uint32), [k for k, _ in bad])
    bad_rows = tuple(BadRow(int(columns["lines"][k : k + 1][0]), reason) for k, reason in bad)
    return StoredRecords(RowFile(key, columns, make), usable), bad_rows


def _copy(container: Container, writer: ColumnWriter) -> tuple[dict[int, str], bool]:
    """Write the rows as JSON. Which of them the container could not read (row → reason), and whether it is a table."""
    bad: dict[int, str] = {}
    is_table = False
    num_rows = size = 0
    rows = container.rows()
    while some := list(islice(rows, ROWS_AT_ONCE)):
        bad |= {k: row.reason for k, row in enumerate(some, start=num_rows) if isinstance(row, BadRow)}
        is_table = is_table or any(isinstance(row, RawRow) and isinstance(row.content, Mapping) for row in some)
        contents = [_to_json(row.content) if isinstance(row, RawRow) else b"" for row in some]
        ends = size + np.cumsum([len(content) for content in contents], dtype=np.int64)
        writer.append("rows", np.frombuffer(b"".join(contents), np.uint8))
        writer.append("ends", ends)
        writer.append("lines", np.array([row.line for row in some], np.uint32))
        num_rows, size = num_rows + len(some), int(ends[-1])
    return bad, is_table


def _to_json(row: bytes | Mapping[str, Any]) -> bytes:
    if isinstance(row, bytes):
        return row
    if not _is_json(row):
        raise NotJSONError
    return json.dumps(row).encode("ascii")


def _is_json(value: object) -> bool:
    """Does JSON give this value back as it is?"""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(type(key) is str and _is_json(inner) for key, inner in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _unusable(file: RowFile, bad: Mapping[int, str], is_table: bool, progress: Progress) -> dict[int, str]:
    """The rows that make no record, with the reason."""

    def check(rows: range) -> dict[int, str]:
        found = {}
        for k in rows:
            if k not in bad:
                line, row = file.row(k)
                try:
                    file.make(line, parse(RawRow(line, json.loads(row) if is_table else row)))
                except RowError as error:
                    found[k] = str(error)
        return found

    found: dict[int, str] = {}
    for more in in_ranges(check, len(file.columns["lines"]), "read rows", progress):
        found |= more
    return found
