"""How commands speak: the result to stdout as text or one JSON object, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]

SCHEMA_VERSION = 1


def result_console() -> Console:
    """stdout; tables keep their width when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=False)


def emit(result: dict[str, Any], as_json: bool, render: Callable[[Console], None]) -> None:
    """Print `result`: as JSON when asked for, else as `render` draws it."""
    if as_json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, **result}, ensure_ascii=False, default=str))
    else:
        render(result_console())


def say(text: str) -> None:
    """A remark for the person at the terminal; never part of the result."""
    print(text, file=sys.stderr, flush=True)
