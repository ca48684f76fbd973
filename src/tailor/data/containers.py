"""What holds the rows: plain, gzip or zstd bytes; JSON lines, a JSON array, a table or text. Memory is bounded."""

from __future__ import annotations

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tailor.data import tables
from tailor.data.rows import ROW_LIMIT, BadRow, RawRow, oversized
from tailor.errors import DataError, NotFoundError, require

CHUNK = 2**20
WRAPPERS = ("data", "examples", "rows")
"""Keys under which an object may hold the list of rows."""

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
BOM = b"\xef\xbb\xbf"
FOREIGN = {
    b"PK\x03\x04": ("a zip or Excel file", "unzip it, or save the sheet as CSV"),
    b"ARROW1": ("an Arrow file", "write it as Parquet or JSONL"),
    b"BZh": ("a bzip2 file", "decompress it: bunzip2"),
    b"\xfd7zXZ": ("an xz file", "decompress it: unxz"),
    b"%PDF": ("a PDF", "extract its text first"),
    b"SQLite": ("an SQLite database", "export the table as CSV"),
    b"\x80\x04\x95": ("a pickle", "pickles can run code and are never read; write JSONL"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data", "fetch the data: git lfs pull"),
}
_SPECIAL = re.compile(rb'["\\\[\]{},]')
_WRAPPER_KEY = re.compile(rb'"(?:%s)"\s*:\s*$' % "|".join(WRAPPERS).encode())


@dataclass(frozen=True, slots=True)
class Container:
    """An opened file: `kind` in words, `unit` of its numbering (line or row), `rows()` starts a new pass over it."""

    path: Path
    kind: str
    unit: str
    rows: Callable[[], Iterator[RawRow | BadRow]]


def open_container(path: Path) -> Container:
    """Find out by content, then by name, what holds the rows.

    Raises NotFoundError for a missing file and DataError for a folder, an empty, binary or damaged file.
    """
    _check_file(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if magic == b"PAR1":
        return Container(path, "Parquet", "row", lambda: tables.parquet_rows(path))
    compression = "gzip" if magic.startswith(GZIP) else "zstd" if magic == ZSTD else ""
    head = _head(path)
    _check_content(path, head)
    kind, unit, rows = _structure(path, head)
    return Container(path, f"{kind}, {compression}" if compression else kind, unit, rows)


def chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file without its byte order mark, in pieces. Raises DataError when it is damaged."""
    first = True
    try:
        for chunk in filter(None, _decompress(path)):
            yield chunk.removeprefix(BOM) if first else chunk
            first = False
    except EOFError as error:
        raise DataError(
            f"{path}: the compressed file ends too early, it is truncated", hint="copy or download it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the compressed file is damaged ({error})", hint="copy or download it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def lines(path: Path) -> Iterator[RawRow | BadRow]:
    """The lines of a file without their end. One over the limit is skipped piece by piece and reported."""
    number, size, parts = 0, 0, list[bytes]()
    for chunk in chunks(path):
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            number += 1
            size += end - start
            yield _line(number, size, [*parts, chunk[start:end]])
            size, start = 0, end + 1
            parts.clear()
        size += len(chunk) - start
        if size <= ROW_LIMIT:
            parts.append(chunk[start:])
        else:
            parts.clear()
    if size:
        yield _line(number + 1, size, parts)


def _line(number: int, size: int, parts: list[bytes]) -> RawRow | BadRow:
    return RawRow(number, b"".join(parts)) if size <= ROW_LIMIT else BadRow(number, oversized(size))


def _check_file(path: Path) -> None:
    if path.is_dir():
        inside = ", ".join(sorted(child.name for child in path.iterdir())[:8])
        raise DataError(f"{path} is a folder, not a file", hint=f"name one file; it contains: {inside or 'nothing'}")
    if not path.exists():
        names = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
        missing = "" if path.parent.is_dir() else f"the folder {path.parent} does not exist"
        raise NotFoundError(
            f"there is no file {path}", hint=missing or (f"did you mean {' or '.join(close)}?" if close else None)
        )
    if not path.is_file():
        raise DataError(f"{path} is not a regular file", hint="write its content to a file first")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: it has no rows")


def _check_content(path: Path, head: bytes) -> None:
    for magic, (what, remedy) in FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}, which is not read as data", hint=remedy)
    if not head.strip():
        raise DataError(f"{path} is empty: it has only blank lines")
    # In JSON a NUL or a wrong byte spoils one row, which is reported as such; anywhere else the file is no text.
    if b"\x00" in head[:8192] and not head.lstrip().startswith((b"{", b"[")):
        raise DataError(
            f"{path} is a binary file, not text", hint="data files are JSONL, JSON, CSV, TSV, Parquet, .txt or .md"
        )


def _decompress(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(GZIP):
            with gzip.GzipFile(fileobj=file) as unzipped:
                while chunk := unzipped.read(CHUNK):
                    yield chunk
        elif magic == ZSTD:
            zstandard = require("zstandard", "data")
            frame = None
            # Small input pieces: a run of one character shrinks thousandfold, and each piece is expanded at once.
            while data := file.read(2**13):
                while data:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    try:
                        yield frame.decompress(data)
                    except zstandard.ZstdError as error:
                        raise DataError(
                            f"{path}: the compressed file is damaged ({error})", hint="copy or download it again"
                        ) from error
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
            if frame is not None:
                raise EOFError
        else:
            while chunk := file.read(CHUNK):
                yield chunk


def _head(path: Path) -> bytes:
    """The first MiB or so."""
    parts, size = [], 0
    for chunk in chunks(path):
        parts.append(chunk)
        size += len(chunk)
        if size >= CHUNK:
            break
    return b"".join(parts)


def _structure(path: Path, head: bytes) -> tuple[str, str, Callable[[], Iterator[RawRow | BadRow]]]:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst")]
    suffix = suffixes[-1] if suffixes else ""
    start = len(head) - len(head.lstrip())
    named_text = suffix in (".txt", ".md", ".csv", ".tsv")
    if head[start:].startswith(b"[") and not named_text:
        return "JSON array", "row", lambda: _array_rows(path, start, wrapped=False)
    if head[start:].startswith(b"{") and suffix != ".md" and (not named_text or _first_line_is_object(head)):
        offset = None if _is_lines(head) else _wrapped_array(head)
        if offset is not None:
            return "JSON object with a list of rows", "row", lambda: _array_rows(path, offset, wrapped=True)
        return "JSONL", "line", lambda: _json_lines(path)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "JSONL", "line", lambda: _json_lines(path)
    if suffix in (".csv", ".tsv") or (not named_text and tables.looks_like_csv(head)):
        delimiter = "\t" if suffix == ".tsv" else tables.delimiter_of(head)
        kind = "TSV" if delimiter == "\t" else f"CSV with {delimiter!r}"
        return kind, "line", lambda: tables.csv_rows(path, lines(path), delimiter)
    return "plain text", "line", lambda: _text_row(path)


def _first_line_is_object(head: bytes) -> bool:
    try:
        return isinstance(json.loads(head.strip().split(b"\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _is_lines(head: bytes) -> bool:
    """Is the first line a whole object, and not the only line?"""
    return b"\n" in head.strip() and _first_line_is_object(head)


def _json_lines(path: Path) -> Iterator[RawRow | BadRow]:
    for row in lines(path):
        if isinstance(row, RawRow) and isinstance(row.content, bytes):
            # Files that were joined carry a byte order mark in the middle.
            text = row.content.removeprefix(BOM).strip()
            if text:
                yield RawRow(row.line, text)
        else:
            yield row


def _wrapped_array(head: bytes) -> int | None:
    """The offset of the list in `{"data": [...]}`, or None when the start of the file has no such key."""
    depth, member = 0, 0
    for at, mark in _marks([head]):
        if mark == b"[" and depth == 1 and _WRAPPER_KEY.search(head, member, at):
            return at
        depth += (mark in b"[{") - (mark in b"]}")
        if depth == 0:
            return None
        if depth == 1:
            member = at + 1
    return None


def _marks(pieces: Iterator[bytes] | list[bytes]) -> Iterator[tuple[int, bytes]]:
    """Offset and character of each bracket and comma outside strings."""
    base, quoted, escaped = 0, False, -1
    for piece in pieces:
        for found in _SPECIAL.finditer(piece):
            at, mark = base + found.start(), found.group()
            if at == escaped:
                continue
            if mark == b"\\":
                escaped = at + 1 if quoted else -1
            elif mark == b'"':
                quoted = not quoted
            elif not quoted:
                yield at, mark
        base += len(piece)


class _Window:
    """A stretch of the file's bytes: keeps what was read since `start`, forgets rows over the limit."""

    def __init__(self, path: Path, start: int) -> None:
        self.pieces = self._read(path)
        self.start = start
        self.base, self.held = 0, b""

    def _read(self, path: Path) -> Iterator[bytes]:
        for chunk in chunks(path):
            used = max(self.start - self.base, 0)
            if len(self.held) - used > ROW_LIMIT:
                used = len(self.held)
            used = min(used, len(self.held))
            self.base, self.held = self.base + used, self.held[used:] + chunk
            yield chunk

    def take(self, stop: int) -> bytes | int:
        """The bytes from `start` up to `stop`, or their number when they are over the limit; then start after it."""
        begin, self.start = self.start, stop + 1
        size = stop - begin
        return size if size > ROW_LIMIT else self.held[begin - self.base : stop - self.base]

    def rest(self) -> Iterator[bytes]:
        yield self.held[self.start - self.base :]
        yield from self.pieces


def _array_rows(path: Path, offset: int, *, wrapped: bool) -> Iterator[RawRow | BadRow]:
    """The elements of the array that opens at `offset`, each still to be parsed; a broken one spoils only itself."""
    window = _Window(path, offset + 1)
    depth, number = 0, 0
    for at, mark in _marks(window.pieces):
        if at < offset:
            continue
        closes = mark in b"]}"
        if depth == 1 and (mark == b"," or closes):
            element = window.take(at)
            if isinstance(element, int) or element.strip() or mark == b",":
                number += 1
                yield _element(number, element)
        depth += (mark in b"[{") - closes
        if depth == 0:
            break
    if depth:
        yield BadRow(number + 1, "the file ends inside this row: it is truncated, or a bracket or quote is not closed")
    elif not wrapped:
        yield from _trailing(window, number)


def _element(number: int, element: bytes | int) -> RawRow | BadRow:
    if isinstance(element, int):
        return BadRow(number, oversized(element))
    return RawRow(number, element.strip())


def _trailing(window: _Window, number: int) -> Iterator[BadRow]:
    for piece in window.rest():
        if text := piece.strip():
            start = text[:30].decode(errors="replace")
            yield BadRow(number + 1, f"there is more text after the end of the array: {start!r}")
            return


def _text_row(path: Path) -> Iterator[RawRow | BadRow]:
    parts: list[bytes] = []
    size = 0
    for chunk in chunks(path):
        size += len(chunk)
        if size <= ROW_LIMIT:
            parts.append(chunk)
    if size > ROW_LIMIT:
        yield BadRow(1, oversized(size))
        return
    data = b"".join(parts)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield BadRow(line, f"byte {data[error.start]:#04x} is not UTF-8: save the file as UTF-8")
        return
    yield RawRow(1, {"text": text.replace("\r\n", "\n")})
