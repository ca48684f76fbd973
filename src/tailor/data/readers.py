"""From a file to records: the only place that reads data files. Nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from tailor.data.cache import cache_key, find, keep
from tailor.data.columns import Columns, ColumnWriter
from tailor.data.containers import Container, open_container
from tailor.data.detect import Detection, Survey, check_settings, detect, select_columns, survey
from tailor.data.formats import FORMATS, Format
from tailor.data.parallel import MANY_ROWS
from tailor.data.progress import Progress, silent
from tailor.data.record_store import MakeRecord, NotJSONError, store_rows, stored_records
from tailor.data.records import Record, Source
from tailor.data.rows import BadRow, BadRowsError, RowError, parse
from tailor.store import file_hash


@dataclass(frozen=True, slots=True)
class Reading:
    """A file that was read. `num_rows` counts all rows, bad ones too; `content_hash` is the SHA-256 of its bytes.

    The records of a large file stay on disk and are made anew at each look.
    """

    records: Sequence[Record]
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
    progress: Progress = silent,
) -> Reading:
    """All records of a data file, in its order.

    `format` is a key of FORMATS, or "auto" to detect it. `columns` maps our field names to the file's columns.
    Bad rows raise BadRowsError, which has them all in `bad_rows`; with `skip_bad_rows` they are left out and listed
    in the Reading. Raises NotFoundError, DataError (also when no row is usable), ConfigError for unknown names.
    `progress` is told how far a large file is read.
    """
    return read_rows(path, FORMATS, format=format, columns=columns, skip_bad_rows=skip_bad_rows, progress=progress)


def read_rows(
    path: str | PathLike[str],
    formats: Mapping[str, Format],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    progress: Progress = silent,
) -> Reading:
    """`read_records` for another set of formats."""
    opened = _open(path, format, columns, formats)
    container, digest = opened.container, file_hash(opened.container.path)
    detection, records, bad_rows = _from_cache(opened, digest) or _from_file(opened, digest, progress)
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
    return Reading(records, detection, bad_rows, num_rows, digest, container.path)


def stream_records(
    path: str | PathLike[str], *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Iterator[Record | BadRow]:
    """The records of a file one by one, a BadRow in the place of each row that cannot be used. Memory is bounded."""
    opened = _open(path, format, columns)
    yield from _convert(opened.container, opened.maker(detect(opened.survey(), format)))


def detect_format(
    path: str | PathLike[str], *, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Detection:
    """The format of a file with the evidence. Raises DataError when the file does not decide it."""
    return detect(_open(path, format, columns).survey(), format)


@dataclass(frozen=True, slots=True)
class _Opened:
    """A file, and how it is to be read."""

    container: Container
    format: str
    columns: Mapping[str, str]
    formats: Mapping[str, Format]

    def survey(self) -> Survey:
        return survey(self.container, self.columns, self.formats)

    def maker(self, detection: Detection) -> MakeRecord:
        return partial(_record, str(self.container.path), self.formats[detection.format], self.columns)

    def key(self, digest: str) -> str:
        return cache_key(
            "records",
            digest,
            self.format,
            dict(self.columns),
            sorted((n, f.made_from) for n, f in self.formats.items()),
        )


_Read = tuple[Detection, Sequence[Record], tuple[BadRow, ...]]


def _open(
    path: str | PathLike[str],
    format: str,
    columns: Mapping[str, str] | None,
    formats: Mapping[str, Format] = FORMATS,
) -> _Opened:
    check_settings(format, columns or {}, formats)
    return _Opened(open_container(Path(path)), format, columns or {}, formats)


def _from_cache(opened: _Opened, digest: str) -> _Read | None:
    stored = find("records", opened.key(digest))
    return None if stored is None else _stored(opened, digest, stored)


def _from_file(opened: _Opened, digest: str, progress: Progress) -> _Read:
    """Read a file; the rows of a large one are kept in the cache, if they can be."""
    seen = opened.survey()
    detection = detect(seen, opened.format)
    make = opened.maker(detection)

    def build(writer: ColumnWriter) -> Mapping[str, Any]:
        facts = store_rows(opened.container, make, writer, digest, progress)
        return {"detection": asdict(detection), **facts}

    if seen.num_rows >= MANY_ROWS:
        with suppress(NotJSONError):
            if stored := keep("records", opened.key(digest), build):
                return _stored(opened, digest, stored)
    rows = list(_convert(opened.container, make))
    bad_rows = tuple(row for row in rows if isinstance(row, BadRow))
    return detection, [row for row in rows if isinstance(row, Record)], bad_rows


def _stored(opened: _Opened, digest: str, columns: Columns) -> _Read:
    found = columns.facts["detection"]
    detection = Detection(found["format"], found["confidence"], tuple(found["evidence"]))
    return detection, *stored_records(opened.key(digest), columns, opened.maker(detection))


def _convert(container: Container, make: MakeRecord) -> Iterator[Record | BadRow]:
    for raw in container.rows():
        if isinstance(raw, BadRow):
            yield raw
            continue
        try:
            yield make(raw.line, parse(raw))
        except RowError as error:
            yield BadRow(raw.line, str(error))


def _record(path: str, row_format: Format, columns: Mapping[str, str], line: int, row: Mapping[str, Any]) -> Record:
    fields, displaced = select_columns(row, columns)
    record, others = row_format.read(fields)
    return replace(record, source=Source(path, line), meta={**others, **displaced, **record.meta})
