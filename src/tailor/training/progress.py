"""What a person sees while a run trains: a bar on a terminal, a plain line every few seconds elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tailor.training.trainer import Listener, StepReport

SECONDS_BETWEEN_LINES = 5.0


def peak_memory(device: torch.device | None = None) -> int:
    """Most bytes held so far: on a CUDA `device` by tensors there, else by this process. 0 where nobody counts."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe(report: StepReport, device: torch.device | None = None) -> str:
    """Loss, rate, speed and memory of a step in one line."""
    peak = peak_memory(device)
    memory = f"  {peak / 2**30:.1f} GiB" if peak else ""
    validated = "" if report.validation_loss is None else f"  validation {report.validation_loss:.4f}"
    return (
        f"loss {report.loss:.4f}{validated}  lr {report.learning_rate:.2e}  "
        f"{report.tokens_per_second:,.0f} tokens/s{memory}"
    )


@contextmanager
def show_progress(
    title: str, num_steps: int, step: int = 0, *, quiet: bool = False, device: torch.device | None = None
) -> Iterator[Listener]:
    """A listener that shows each step's report until the block ends, with the memory held on `device`."""
    if quiet:
        yield lambda report: None
    elif sys.stderr.isatty():
        with _bar(title, num_steps, step, device) as listener:
            yield listener
    else:
        yield _lines(title, step, device)


@contextmanager
def _bar(title: str, num_steps: int, step: int, device: torch.device | None) -> Iterator[Listener]:
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
        yield lambda report: progress.update(task, completed=report.step, status=describe(report, device))


def _lines(title: str, step: int, device: torch.device | None) -> Listener:
    last = time.monotonic()
    first = step

    def listener(report: StepReport) -> None:
        nonlocal last
        now = time.monotonic()
        ends = report.step in (first + 1, report.num_steps)
        if ends or report.validation_loss is not None or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{title} {report.step}/{report.num_steps}  {describe(report, device)}", file=sys.stderr, flush=True)

    return listener
