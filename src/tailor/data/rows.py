"""Raw rows: strict JSON parsing of one row, and the types in which unusable rows are reported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.errors import DataError

ROW_LIMIT = 16 * 2**20
"""The largest row in bytes. No text of this size fits a context; without a limit one line can fill the memory."""

LISTED = 20
"""How many bad rows a message shows."""

_UNUSABLE = re.compile("[\x00\ud800-\udfff]")


class RowError(ValueError):
    """Why one row cannot be used. Readers turn it into a BadRow; it never leaves the data layer."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: 1-based line (row number in JSON arrays and Parquet) and the reason."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as its container gives it: JSON still to be parsed (bytes), or the cells of a table."""

    line: int
    content: bytes | Mapping[str, Any]


class BadRowsError(DataError):
    """Some rows cannot be used. `bad_rows` has all of them, the message the first 20."""

    def __init__(self, path: Path, bad_rows: Sequence[BadRow], summary: str, *, unit: str, hint: str) -> None:
        lines = [f"{path}: {summary}"]
        lines += [f"  {where(path, bad.line, unit)}: {bad.reason}" for bad in bad_rows[:LISTED]]
        if len(bad_rows) > LISTED:
            lines.append(f"  … and {len(bad_rows) - LISTED} more")
        super().__init__("\n".join(lines), hint=hint)
        self.bad_rows = tuple(bad_rows)


def where(path: Path, line: int, unit: str) -> str:
    """`file:line`, or `file row n` where lines mean nothing (JSON arrays, Parquet)."""
    return f"{path}:{line}" if unit == "line" else f"{path} row {line}"


def parse(row: RawRow) -> Mapping[str, Any]:
    """The row as an object. Raises RowError for everything that would come back different or break later.

    That is invalid JSON, NaN and infinities, a key given twice, bytes that are not UTF-8, lone surrogates and NUL.
    """
    value = _parse_json(row.content) if isinstance(row.content, bytes) else row.content
    if not isinstance(value, Mapping):
        raise RowError(f"the row is {describe(value)}, it must be an object with named fields")
    for name, field in value.items():
        for text in _strings([name, field]):
            if found := _UNUSABLE.search(text):
                raise RowError(f"field {name!r} has {_explain(found.group())} at character {found.start() + 1}")
    return value


def describe(value: object) -> str:
    """What a value is, in the words of a person who writes JSON.

    >>> describe(3), describe(None), describe([])
    ('a number (3)', 'null', 'an empty list')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"true/false ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"text ({value[:30]!r}{'…' if len(value) > 30 else ''})" if value else "empty text"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(repr, list(value)[:6]))}" if value else "an empty object"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def oversized(size: int) -> str:
    """The reason for a row over the limit."""
    return f"the row is {size / 2**20:.1f} MiB long, the limit is {ROW_LIMIT // 2**20} MiB: split it"


def _parse_json(data: bytes) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"byte {data[error.start]:#04x} at position {error.start + 1} is not UTF-8: save the file as UTF-8"
        ) from error
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        ends = " (the row ends too early)" if error.pos >= len(text.rstrip()) else ""
        raise RowError(f"invalid JSON at character {error.pos + 1}: {error.msg}{ends}") from error
    except RecursionError as error:
        raise RowError("invalid JSON: nested too deeply") from error
    except RowError:
        raise
    except ValueError as error:
        raise RowError(f"invalid JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RowError(f"field {twice!r} is given twice")
    return fields


def _constant(name: str) -> Any:
    raise RowError(f"{name} is not valid JSON: write null, or leave the field out")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise RowError(f"the number {digits[:40]} is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)


def _strings(value: object) -> Iterator[str]:
    """Every string inside a value, keys included."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)


def _explain(character: str) -> str:
    code = ord(character)
    if code == 0:
        return "the control character NUL (U+0000)"
    if 0xDC80 <= code <= 0xDCFF:
        # Table cells are decoded with "surrogateescape", which maps byte 0xNN to U+DCNN.
        return f"half of a surrogate pair (U+{code:04X}) or a byte that is not UTF-8 ({code - 0xDC00:#04x})"
    return f"half of a surrogate pair (U+{code:04X}), which is not a character"
