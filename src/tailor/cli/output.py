"""How commands speak: the result to stdout as text or one JSON object, everything else to stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Columns = Annotated[
    list[str] | None, typer.Option("--columns", help="Our name=the file's column, e.g. prompt=text; may be repeated.")
]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Go on without rows that cannot be used.")]
BaseOf = Annotated[
    str | None, typer.Option("--base", "-b", help="Where the artifact's base is, when not where it was tuned on.")
]
CompareOn = Annotated[
    str | None, typer.Option("--data", help="Rows to compare on; those the run held out when not given.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]

SCHEMA_VERSION = 1
SECONDS_BETWEEN_LINES = 5.0
SHOWN_STAGES = 4
"""Bars that stay on the screen; the oldest goes when another one begins."""


def result_console() -> Console:
    """stdout, printing people's texts as they are: no markup, no emoji codes. In a file tables have 110 columns."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False, emoji=False)


def emit(result: dict[str, Any], as_json: bool, render: Callable[[Console], None]) -> None:
    """Print `result`: as JSON when asked for, else as `render` draws it.

    For texts that must come out as they are (answers, YAML) `render` uses `print`: rich wraps lines, widens tabs and
    drops control characters.
    """
    if as_json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, **result}, ensure_ascii=False, default=str))
    else:
        render(result_console())


def draw(console: Console, report: RenderableType) -> None:
    """Print a report: tables in the console's width, its sentences unbroken so that they can be searched and copied."""
    for part in report.renderables if isinstance(report, Group) else [report]:
        console.print(part, soft_wrap=isinstance(part, Text))


@contextmanager
def stages(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of long work on stderr, told as (stage, done, total): bars on a terminal, lines at times elsewhere."""
    if quiet:
        yield lambda stage, done, total: None
        return
    if not sys.stderr.isatty():
        yield _stage_lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for old in list(tasks)[: max(0, len(tasks) - SHOWN_STAGES + 1)]:
                    progress.remove_task(tasks.pop(old))
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update


def _stage_lines() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def line(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(f"{stage} {done}/{total}")

    return line


def say(text: str) -> None:
    """A remark for the person at the terminal; never part of the result."""
    print(text, file=sys.stderr, flush=True)


def numbers(values: list[str] | None, option: str) -> dict[str, float]:
    """`a=1.5` options as a dict. Raises a usage error for what is no finite number."""
    found = {}
    for key, text in pairs(values, option).items():
        try:
            found[key] = float(text)
        except ValueError:
            found[key] = math.nan
        if not math.isfinite(found[key]):
            raise typer.BadParameter(f"{option} {key} wants a number, got {text!r}")
    return found


def pairs(values: list[str] | None, option: str) -> dict[str, str]:
    """`a=b` options as a dict. Raises a usage error for anything else."""
    found = {}
    for value in values or []:
        key, equals, text = value.partition("=")
        if not (key and equals and text):
            raise typer.BadParameter(f"{option} wants name=value, got {value!r}")
        found[key] = text
    return found
