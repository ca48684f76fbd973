"""Rows of tables: CSV and TSV (text cells only) and Parquet (optional package pyarrow)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from tailor.data.rows import ROW_LIMIT, BadRow, RawRow
from tailor.errors import DataError, require

DELIMITERS = (",", "\t", ";", "|")
_CONSISTENT = 0.95


def looks_like_csv(head: bytes) -> bool:
    """Do at least 95 % of the first rows have the same number of cells, two or more?"""
    return max(_consistency(head, delimiter)[0] for delimiter in DELIMITERS) >= _CONSISTENT


def delimiter_of(head: bytes) -> str:
    """The delimiter that cuts most of the first rows into as many cells as the header; a comma when none cuts."""
    return max(DELIMITERS, key=lambda delimiter: (_consistency(head, delimiter), -DELIMITERS.index(delimiter)))


def _consistency(head: bytes, delimiter: str) -> tuple[float, int]:
    """(share of the first rows with the header's number of cells, that number); (0, 0) when nothing is cut."""
    text = head[: 2**16].decode("utf-8", errors="replace")
    if len(head) > 2**16:
        text = text.rpartition("\n")[0]
    csv.field_size_limit(max(csv.field_size_limit(), ROW_LIMIT))
    rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row]
    if len(rows) < 2 or len(rows[0]) < 2:
        return 0.0, 0
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows), len(rows[0])


class _Lines:
    """Text lines for csv.reader, which counts them and remembers those that were too long to pass on."""

    def __init__(self, rows: Iterator[RawRow | BadRow]) -> None:
        self.rows = rows
        self.first = self.last = 0
        self.oversized: list[BadRow] = []

    def __iter__(self) -> Iterator[str]:
        for row in self.rows:
            self.last = row.line
            self.first = self.first or row.line
            if isinstance(row, BadRow):
                self.oversized.append(row)
            elif isinstance(row.content, bytes):
                # surrogateescape marks a byte that is not UTF-8; rows.parse then reports this row, not the file.
                yield row.content.removesuffix(b"\r").decode("utf-8", errors="surrogateescape") + "\n"


def csv_rows(path: Path, rows: Iterator[RawRow | BadRow], delimiter: str) -> Iterator[RawRow | BadRow]:
    """The rows below the header, numbered by the line they start on. All cells are text."""
    csv.field_size_limit(max(csv.field_size_limit(), ROW_LIMIT))
    source = _Lines(rows)
    reader = csv.reader(iter(source), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        source.first = 0
        try:
            cells = next(reader, None)
            problem = ""
        except csv.Error as error:
            cells, problem = [], _explain(error, source)
        yield from source.oversized
        source.oversized.clear()
        if cells is None:
            return
        if problem:
            yield BadRow(source.first, problem)
        elif not cells:
            continue
        elif not header:
            header = _header(path, cells)
        elif len(cells) != len(header):
            yield BadRow(source.first, f"the row has {len(cells)} cells, the header has {len(header)}")
        else:
            yield RawRow(source.first, dict(zip(header, cells, strict=True)))


def _explain(error: csv.Error, source: _Lines) -> str:
    if source.last > source.first and ("unexpected end" in str(error) or "field limit" in str(error)):
        return f"a quote that opens here is never closed: everything up to line {source.last} was read as one row"
    return f"invalid CSV: {error}"


def _header(path: Path, cells: list[str]) -> list[str]:
    # pandas writes its index as a column without a name.
    names = [cell.strip() or f"column_{index}" for index, cell in enumerate(cells, start=1)]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise DataError(f"{path}: the header has the column {twice[0]!r} twice", hint="rename one of them")
    return names


def parquet_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a Parquet file, read in batches."""
    arrow = require("pyarrow", "data")
    parquet = require("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(number, row)
    except (arrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: the Parquet file is damaged ({error})", hint="copy or download it again") from error
