"""Which format a file is in: decided from a sample by fixed rules, with the evidence; never guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailor.data.containers import Container
from tailor.data.formats import FORMATS, Format
from tailor.data.rows import BadRow, BadRowsError, RowError, parse, where
from tailor.errors import ConfigError, DataError, nearest

SAMPLED = 1000
"""A file's sample has this many rows to twice as many, spread evenly over it; a smaller file is its own sample."""

AGREED = 0.98
"""The share of sampled rows that a format must fit. The others are reported as bad rows."""

PROMPTS = ("question", "query", "input", "instruction", "text")
COMPLETIONS = ("answer", "response", "output", "target", "label", "category", "intent", "class", "summary")
"""Names that probably mean prompt and completion. Only proposed: a wrong guess trains on the wrong column."""

_KNOWN = {name for row_format in FORMATS.values() for name in row_format.names()}


@dataclass(frozen=True, slots=True)
class Detection:
    """The format of a file, the share of sampled rows that it fits, and why, in sentences."""

    format: str
    confidence: float
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the sample keeps of one row."""

    line: int
    formats: frozenset[str]
    columns: tuple[str, ...]
    texts: frozenset[str]


@dataclass(slots=True)
class Survey:
    """One pass over a file: how many rows, and what a sample of them looks like."""

    container: Container
    formats: Mapping[str, Format]
    num_rows: int = 0
    unreadable: list[BadRow] = field(default_factory=list)
    sample: list[_Seen] = field(default_factory=list)


def select_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the row under our names, columns that had to make way). Spelling variants such as `Prompt` are understood."""
    mapped = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
    taken = {*columns.values()}
    others = {name: value for name, value in row.items() if name not in taken}
    displaced = {name: others.pop(name) for name in mapped if name in others}
    for name in list(others):
        plain = str(name).strip().lower().replace("-", "_").replace(" ", "_")
        if plain != name and plain in _KNOWN and plain not in others and plain not in mapped:
            others[plain] = others.pop(name)
    return mapped | others, displaced


def check_settings(format_name: str, columns: Mapping[str, str], formats: Mapping[str, Format] = FORMATS) -> None:
    """Raise ConfigError for a format that does not exist, or a column name that no format (or not this one) has."""
    if format_name != "auto" and format_name not in formats:
        raise ConfigError(f"there is no data format {format_name!r}; {nearest(format_name, ['auto', *formats])}")
    known = _KNOWN if format_name == "auto" else formats[format_name].names()
    for ours in columns:
        if ours not in known:
            raise ConfigError(
                f"columns: {ours!r} is not a field of any format; {nearest(ours, sorted(known))}",
                hint='columns maps our names to those in the file: columns={"prompt": "<column in the file>"}',
            )


def survey(container: Container, columns: Mapping[str, str], formats: Mapping[str, Format] = FORMATS) -> Survey:
    """Read through the file once and sample it evenly. Raises DataError when a mapped column is nowhere."""
    seen = Survey(container, formats)
    stride = 1
    names: set[str] = set()
    for raw in container.rows():
        index = seen.num_rows
        seen.num_rows += 1
        if isinstance(raw, BadRow):
            seen.unreadable.append(raw)
            continue
        if index % stride:
            continue
        try:
            row = parse(raw)
        except RowError as error:
            seen.unreadable.append(BadRow(raw.line, str(error)))
            continue
        names.update(map(str, row))
        seen.sample.append(_look(raw.line, select_columns(row, columns)[0], formats))
        if len(seen.sample) >= 2 * SAMPLED:
            # Keep every second row; memory stays the same however long the file is.
            stride *= 2
            seen.sample = seen.sample[::2]
    if not seen.num_rows:
        raise DataError(f"{container.path} has no rows")
    for ours, theirs in columns.items():
        if seen.sample and theirs not in names:
            raise DataError(
                f"{container.path}: columns maps {ours!r} to {theirs!r}, but no row has that column; "
                f"{nearest(theirs, sorted(names))}"
            )
    return seen


def detect(seen: Survey, format_name: str = "auto") -> Detection:
    """Decide the format, or say whether the one named fits.

    The first rule that holds: a format named by the person is taken. Of formats that fit a row, one that uses more of
    its fields than another displaces it (KTO displaces prompt/completion), and plain text gives way to all others. A
    format that is left for at least 98 % of the rows that fit any is taken when it is the only one. Otherwise
    DataError says what stands against it: two readings, mixed rows, probable columns, or nothing known.
    """
    path, unit = seen.container.path, seen.container.unit
    evidence = [f"{seen.container.kind}, {seen.num_rows} rows, {len(seen.sample)} looked at"]
    if not seen.sample:
        raise BadRowsError(
            path, seen.unreadable, "no row can be read", unit=unit, hint="JSONL needs one whole JSON object per line"
        )
    if format_name != "auto":
        fits = sum(format_name in row.formats for row in seen.sample)
        evidence.append(f"format={format_name} was given; {fits} of {len(seen.sample)} rows fit it")
        return Detection(format_name, fits / len(seen.sample), tuple(evidence))
    counts = Counter(name for row in seen.sample for name in row.formats)
    fitting = sum(bool(row.formats) for row in seen.sample)
    agreed = [name for name in seen.formats if counts[name] and counts[name] >= AGREED * fitting]
    if 2 * fitting < len(seen.sample):
        raise _unknown(seen, fitting)
    if len(agreed) > 1:
        raise _ambiguous(path, [f"{name} ({seen.formats[name].about})" for name in agreed], agreed)
    if not agreed:
        raise _mixed(seen, counts)
    name = agreed[0]
    if name == "text" and (mapping := _probable(seen, need_text=False)):
        readings = ["text (documents)", f"prompt/completion with {_spell(mapping)}"]
        raise _ambiguous(path, readings, ["text"], mapping)
    evidence += _reasons(seen, name, counts[name])
    return Detection(name, counts[name] / len(seen.sample), tuple(evidence))


def _look(line: int, row: Mapping[str, Any], formats: Mapping[str, Format]) -> _Seen:
    uses = {name: row_format.uses(row) for name, row_format in formats.items() if row_format.fits(row)}
    if len(uses) > 1:
        uses.pop("text", None)
    best = frozenset(name for name, used in uses.items() if not any(used < other for other in uses.values()))
    present = [str(name) for name, value in row.items() if value is not None]
    return _Seen(line, best, tuple(present), frozenset(name for name in present if isinstance(row[name], str)))


def _reasons(seen: Survey, name: str, count: int) -> list[str]:
    row_format = seen.formats[name]
    needed = ", ".join(f"{spec.replace('|', ' or ')}: {kind.name}" for spec, kind in row_format.required.items())
    reasons = [f"{name}: {row_format.about}", f"{count} of {len(seen.sample)} rows have {needed}"]
    others = {column: None for row in seen.sample for column in row.columns if column not in row_format.names()}
    if others:
        reasons.append(f"other columns, kept in meta: {', '.join(list(others)[:12])}")
    return reasons


def _probable(seen: Survey, *, need_text: bool) -> dict[str, str]:
    """The mapping that synonyms propose, empty unless they name both sides in nearly all rows."""
    mapping = {}
    for ours, synonyms in (("prompt", PROMPTS), ("completion", COMPLETIONS)):
        for name in (ours, *synonyms):
            rows = sum(name in (row.texts if need_text else row.columns) for row in seen.sample)
            if rows >= AGREED * len(seen.sample):
                mapping[ours] = name
                break
    both = len(mapping) == 2 and mapping["prompt"] != mapping["completion"]
    return {ours: theirs for ours, theirs in mapping.items() if ours != theirs} if both else {}


def _spell(mapping: Mapping[str, str]) -> str:
    inside = ", ".join(f'"{ours}": "{theirs}"' for ours, theirs in mapping.items())
    return f"columns={{{inside}}}"


def _flags(mapping: Mapping[str, str]) -> str:
    return " ".join(f"--columns {ours}={theirs}" for ours, theirs in mapping.items())


def _ambiguous(
    path: Path, readings: list[str], names: list[str], mapping: Mapping[str, str] | None = None
) -> DataError:
    choices = [f'format="{name}" (--format {name})' for name in names]
    if mapping:
        choices.append(f"{_spell(mapping)} ({_flags(mapping)})")
    return DataError(
        f"{path} can be read in {len(readings)} ways: {' or '.join(readings)}",
        hint="say which: " + " or ".join(choices),
    )


def _mixed(seen: Survey, counts: Counter[str]) -> DataError:
    unit, path = seen.container.unit, seen.container.path
    parts = []
    for name in [name for name in seen.formats if counts[name]]:
        first = next(row.line for row in seen.sample if name in row.formats)
        parts.append(f"{name} {counts[name]} rows (first at {where(path, first, unit)})")
    if others := sum(not row.formats for row in seen.sample):
        parts.append(f"no known format {others} rows")
    return DataError(
        f"{path} mixes formats; of {len(seen.sample)} rows looked at: {'; '.join(parts)}",
        hint='make one file of each, or read one with format="…" (--format) and skip the rest (--skip-bad-rows)',
    )


def _unknown(seen: Survey, fitting: int) -> DataError:
    path = seen.container.path
    columns = list(dict.fromkeys(column for row in seen.sample for column in row.columns))
    listed = ", ".join(columns[:20]) or "none"
    if mapping := _probable(seen, need_text=True):
        return DataError(
            f"{path} probably has {' and '.join(f'{ours} in {theirs!r}' for ours, theirs in mapping.items())}, "
            f"but no format says so (columns: {listed})",
            hint=f"if that is right, pass {_spell(mapping)} ({_flags(mapping)})",
        )
    some = f"; {fitting} of {len(seen.sample)} rows fit a format" if fitting else ""
    return DataError(
        f"{path} is in no known format (columns: {listed}{some})",
        hint='name the columns: columns={"prompt": "…", "completion": "…"} (--columns prompt=… '
        f"--columns completion=…), or use a known format: {', '.join(seen.formats)}",
    )
