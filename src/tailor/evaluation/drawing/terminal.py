"""The report of a comparison on the terminal: what to take, the table, learning curves, failures, notes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from tailor.evaluation.drawing import details, tables
from tailor.evaluation.drawing.quantities import MISSING, visible
from tailor.evaluation.drawing.tables import Table

MAX_NOTES = 12
"""What goes beyond is left to the written reports."""


def render_comparison(report: Mapping[str, Any]) -> RenderableType:
    """What to print, drawn from the dict of `build_report` (or report.json) alone; tables fit into 110 columns."""
    return Group(*_parts(report))


def _parts(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    headline, *sentences = report["verdict"]["sentences"] or ["Nothing was measured."]
    yield _text(headline, style="bold")
    yield from map(_text, sentences)
    yield _compact(tables.compact(report))
    if details.has_curves(report):
        yield drawn_table(details.curves(report))
        yield from map(_text, report["crossovers"])
    for line in details.failures(report).lines:
        name, size, seed, message, hint = (cell.text for cell in line)
        help_ = "" if hint == MISSING else f" ({hint})"
        yield _text(f"failed: {name} with {size} rows, seed {seed}: {message}{help_}", style="red")
    notes = details.notes(report)
    yield from (_text(f"note: {note}") for note in notes[:MAX_NOTES])
    if len(notes) > MAX_NOTES:
        yield _text(f"note: {len(notes) - MAX_NOTES} more notes stand in the written report")


def _compact(found: Table) -> RichTable:
    """One line per row; the score keeps its interval, the cost its multiple of the plain base's."""
    drawn = _empty(found)
    for k, (name, *cells) in enumerate(found.lines):
        picked = k == found.picked
        title = Text(visible(f"{name.text} (take this)" if picked else name.text))
        drawn.add_row(title, *(Text(cell.brief or cell.text) for cell in cells), style="bold" if picked else None)
    return drawn


def drawn_table(found: Table) -> RichTable:
    """A table of single values: learning curves without their intervals, trials of a sweep."""
    drawn = _empty(found)
    for line in found.lines:
        drawn.add_row(*(Text(visible(cell.text)) for cell in line))
    return drawn


def _empty(found: Table) -> RichTable:
    drawn = RichTable(
        title=Text(visible(found.caption)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for k, column in enumerate(found.columns):
        justify: JustifyMethod = "right" if column.number else "left"
        drawn.add_column(Text(textwrap.fill(column.header, 12)), justify=justify, no_wrap=k > 0, overflow="fold")
    return drawn


def _text(line: str, style: str = "") -> Text:
    """A sentence as it is, on one line."""
    return Text(visible(line).replace("\n", " "), style=style)
