"""From a file to records: the only place that reads data files. Nothing is dropped silently."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from tailor.data.containers import Container, open_container
from tailor.data.detect import Detection, check_settings, detect, select_columns, survey
from tailor.data.formats import FORMATS, Format
from tailor.data.records import Record, Source
from tailor.data.rows import BadRow, BadRowsError, RawRow, RowError, parse


@dataclass(frozen=True, slots=True)
class Reading:
    """A file that was read. `num_rows` counts all rows, bad ones too; `content_hash` is the SHA-256 of its bytes."""

    records: list[Record]
    detection: Detection
    bad_rows: tuple[BadRow, ...]
    num_rows: int
    content_hash: str
    path: Path


def read_records(
    path: str | PathLike[str],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Reading:
    """All records of a data file, in its order.

    `format` is a key of FORMATS, or "auto" to detect it. `columns` maps our field names to the file's columns.
    Bad rows raise BadRowsError, which has them all in `bad_rows`; with `skip_bad_rows` they are left out and listed
    in the Reading. Raises NotFoundError, DataError (also when no row is usable), ConfigError for unknown names.
    """
    return read_rows(path, FORMATS, format=format, columns=columns, skip_bad_rows=skip_bad_rows)


def read_rows(
    path: str | PathLike[str],
    formats: Mapping[str, Format],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
) -> Reading:
    """`read_records` for another set of formats."""
    container, detection = _open(path, format, columns or {}, formats)
    records: list[Record] = []
    bad_rows: list[BadRow] = []
    for row in _convert(container, formats[detection.format], columns or {}):
        if isinstance(row, BadRow):
            bad_rows.append(row)
        else:
            records.append(row)
    num_rows = len(records) + len(bad_rows)
    if bad_rows and not (skip_bad_rows and records):
        raise BadRowsError(
            container.path,
            bad_rows,
            f"{len(bad_rows)} of {num_rows} rows cannot be read as {detection.format}",
            unit=container.unit,
            hint="correct them, or leave them out: skip_bad_rows=True (--skip-bad-rows)"
            if records
            else "no row is usable; is this the right file and format?",
        )
    return Reading(records, detection, tuple(bad_rows), num_rows, content_hash(container.path), container.path)


def stream_records(
    path: str | PathLike[str], *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Iterator[Record | BadRow]:
    """The records of a file one by one, a BadRow in the place of each row that cannot be used. Memory is bounded."""
    container, detection = _open(path, format, columns or {})
    yield from _convert(container, FORMATS[detection.format], columns or {})


def detect_format(
    path: str | PathLike[str], *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Detection:
    """The format of a file with the evidence. Raises DataError when the file does not decide it."""
    return _open(path, format, columns or {})[1]


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(
    path: str | PathLike[str], format: str, columns: Mapping[str, str], formats: Mapping[str, Format] = FORMATS
) -> tuple[Container, Detection]:
    check_settings(format, columns, formats)
    container = open_container(Path(path))
    return container, detect(survey(container, columns, formats), format)


def _convert(container: Container, row_format: Format, columns: Mapping[str, str]) -> Iterator[Record | BadRow]:
    for raw in container.rows():
        if isinstance(raw, BadRow):
            yield raw
            continue
        try:
            yield _record(container, row_format, raw, columns)
        except RowError as error:
            yield BadRow(raw.line, str(error))


def _record(container: Container, row_format: Format, raw: RawRow, columns: Mapping[str, str]) -> Record:
    row, displaced = select_columns(parse(raw), columns)
    record, others = row_format.read(row)
    source = Source(str(container.path), raw.line)
    return replace(record, source=source, meta={**others, **displaced, **record.meta})
