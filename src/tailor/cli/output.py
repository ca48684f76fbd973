"""How commands speak: the result to stdout as text or one JSON object, everything else to stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

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
Task = Annotated[str | None, typer.Option("--task", help="One task of a prompt table.")]
Quantize = Annotated[str | None, typer.Option("--quantize", help="nf4: the base's linear layers in 4 bits (QLoRA).")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]

SCHEMA_VERSION = 1


def result_console() -> Console:
    """stdout, printing people's texts as they are: no markup, no emoji codes. In a file tables have 110 columns."""
    from rich.console import Console

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
    from rich.console import Group
    from rich.text import Text

    for part in report.renderables if isinstance(report, Group) else [report]:
        console.print(part, soft_wrap=isinstance(part, Text))


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
