"""The report of a comparison as Markdown (GitHub's), to be pasted into a merge request or a wiki."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tailor.evaluation.drawing import details, tables
from tailor.evaluation.drawing.quantities import visible
from tailor.evaluation.drawing.tables import Cell, Table

_SPECIAL = re.compile(r"[\\`*\[<|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")
_STARTS_A_BLOCK = re.compile(r"^(\s*)([#>+=-]|\d+(?=[.)](?:\s|$)))")


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report, drawn from the dict of `build_report` (or report.json) alone.

    Texts of the data are escaped: they cannot open a table column, a link, markup or HTML. Line breaks become `<br>`.
    """
    headline, *sentences = report["verdict"]["sentences"] or ["Nothing was measured."]
    parts = [f"# {escaped(report['name'] or 'comparison')}", f"**{escaped(headline)}**", *map(escaped, sentences)]
    for title, blocks in _sections(report):
        found = [block for block in blocks if block]
        parts += [f"## {title}", *found] if found else []
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    plain = _SPECIAL.sub(r"\\\g<0>", visible(text).strip())
    return "<br>".join(_STARTS_A_BLOCK.sub(_as_text, line) for line in plain.replace("\t", " ").split("\n"))


def _as_text(found: re.Match[str]) -> str:
    """What would begin a heading, a quotation or a list."""
    space, start = found.groups()
    return f"{space}{start}\\" if start.isdecimal() else f"{space}\\{start}"


def table(found: Table, reasons: bool = True) -> str:
    """A table with its caption above, and below it the `reasons` for missing values; empty when it has no lines."""
    if not found.lines:
        return ""
    rules = [":---" if not column.number else "---:" for column in found.columns]
    lines = [_line(escaped(column.header) for column in found.columns), _line(rules)]
    for k, cells in enumerate(found.lines):
        name = f"**{_cell(cells[0])}**" if k == found.picked else _cell(cells[0])
        lines.append(_line([name, *map(_cell, cells[1:])]))
    gaps = [escaped(gap) for gap in tables.gaps(found)] if reasons else []
    return "\n\n".join([f"**{escaped(found.caption)}**", "\n".join(lines), *gaps])


def _sections(report: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    summary = tables.summary(report)
    take = "" if summary.picked is None else "The one to take is bold."
    yield "Comparison", [table(summary), take, _glossary(summary)]
    if details.has_curves(report):
        yield "Learning curves", [_list(report["crossovers"]), table(details.curves(report))]
    differences = table(details.differences(report))
    yield "Differences to the best", [escaped(report["verdict"]["noise"]), differences] if differences else []
    detailed = (tables.quality(report), tables.training(report), tables.serving(report))
    yield "All measurements", [table(found) for found in detailed if len(found.columns) > 1]
    claims, source = table(details.claims(report), reasons=False), details.SOURCE_OF_CLAIMS
    why = table(details.reasons(report))
    yield "Claimed and measured", [f"Claimed in general: {source}.", claims, why] if claims else []
    yield "Where techniques disagree", [_example(k, one) for k, one in enumerate(details.examples(report), 1)]
    yield "What failed", [table(details.failures(report))]
    yield "How this was measured", [*_method(report)]
    yield "Notes", [_list(details.notes(report))]


def _method(report: Mapping[str, Any]) -> Iterator[str]:
    for what, command in details.commands(report):
        yield f"{escaped(what)}:\n\n{_code(command)}"
    for title, facts in details.facts(report).items():
        if facts:
            yield f"### {title}\n\n" + "\n".join(f"- {escaped(term)}: {escaped(value)}" for term, value in facts)
    yield table(details.settings(report))


def _example(k: int, found: details.Example) -> str:
    outcome = f" ({escaped(found.outcome)})" if found.outcome else ""
    facts = {"Prompt": found.prompt, "Reference": found.reference, "Source": found.source}
    return "\n\n".join(
        [
            f"### Example {k}{outcome}",
            "\n".join(f"- {term}: {escaped(value)}" for term, value in facts.items()),
            table(found.answers),
        ]
    )


def _glossary(found: Table) -> str:
    return "\n".join(f"- {escaped(c.header)}: {escaped(c.explained)}" for c in found.columns if c.explained)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _code(text: str) -> str:
    """A fenced block; the fence is longer than any run of backticks in the text."""
    shown = visible(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}sh\n{shown}\n{fence}"


def _cell(cell: Cell) -> str:
    return f"{escaped(cell.text)}<br>{escaped(cell.note)}" if cell.note else escaped(cell.text)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
