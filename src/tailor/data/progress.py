"""How far long work is: bars on a terminal, a line at times elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_BETWEEN_LINES = 5.0
SHOWN_STAGES = 4
"""Bars that stay on the screen; the oldest goes when another one begins."""

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total)."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of work that nobody watches."""


@contextmanager
def stages(quiet: bool) -> Iterator[Progress]:
    """Show what is told as (stage, done, total) until the block ends."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as update:
            yield update
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for old in list(tasks)[: max(0, len(tasks) - SHOWN_STAGES + 1)]:
                    bars.remove_task(tasks.pop(old))
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


def _lines() -> Progress:
    last = time.monotonic()

    def line(stage: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)

    return line
