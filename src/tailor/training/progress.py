"""What a person sees while a run trains: a bar on a terminal, a plain line every few seconds elsewhere. On stderr."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tailor.training.trainer import Listener, StepReport

SECONDS_BETWEEN_LINES = 5.0


def peak_memory() -> int:
    """Most bytes this process has held in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(report: StepReport) -> str:
    """Loss, rate, speed and memory of a step in one line."""
    validated = "" if report.validation_loss is None else f"  validation {report.validation_loss:.4f}"
    return (
        f"loss {report.loss:.4f}{validated}  lr {report.learning_rate:.2e}  "
        f"{report.tokens_per_second:,.0f} tokens/s  {peak_memory() / 2**30:.1f} GiB"
    )


@contextmanager
def show_progress(title: str, num_steps: int, step: int = 0, *, quiet: bool = False) -> Iterator[Listener]:
    """A listener that shows each step's report until the block ends."""
    if quiet:
        yield lambda report: None
    elif sys.stderr.isatty():
        with _bar(title, num_steps, step) as listener:
            yield listener
    else:
        yield _lines(title, step)


@contextmanager
def _bar(title: str, num_steps: int, step: int) -> Iterator[Listener]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=num_steps, completed=step, status="")
        yield lambda report: progress.update(task, completed=report.step, status=describe(report))


def _lines(title: str, step: int) -> Listener:
    last = time.monotonic()
    first = step

    def listener(report: StepReport) -> None:
        nonlocal last
        now = time.monotonic()
        ends = report.step in (first + 1, report.num_steps)
        if ends or report.validation_loss is not None or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{title} {report.step}/{report.num_steps}  {describe(report)}", file=sys.stderr, flush=True)

    return listener
