"""What a person sees while a run trains: a bar on a terminal, a plain line every few seconds elsewhere. On stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

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
    stopped = f"  {report.stopped}" if report.stopped else ""
    validated = "" if report.validation_loss is None else f"  validation {report.validation_loss:.4f}"
    return (
        f"loss {report.loss:.4f}{validated}  lr {report.learning_rate:.2e}  "
        f"{report.tokens_per_second:,.0f} tokens/s{memory}{stopped}"
    )


class Track(NamedTuple):
    """A run to show: its name, how many steps it has, and how many it has taken."""

    name: str
    num_steps: int
    step: int = 0


@contextmanager
def show_progress(
    tracks: Sequence[Track], *, quiet: bool = False, device: torch.device | None = None
) -> Iterator[Listener]:
    """A listener that shows the reports of these runs until the block ends, with the memory held on `device`."""
    if quiet:
        yield lambda report: None
    elif sys.stderr.isatty():
        with _bars(tracks, device) as listener:
            yield listener
    else:
        lines = {track.name: _lines(track, device) for track in tracks}
        yield lambda report: lines[report.name](report)


@contextmanager
def _bars(tracks: Sequence[Track], device: torch.device | None) -> Iterator[Listener]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {t.name: bars.add_task(t.name, total=t.num_steps, completed=t.step, status="") for t in tracks}
        yield lambda report: bars.update(
            tasks[report.name],
            completed=report.step,
            status=describe(report, device),
            refresh=report.stopped is not None,
        )


def _lines(track: Track, device: torch.device | None) -> Listener:
    last = time.monotonic()

    def listener(report: StepReport) -> None:
        nonlocal last
        now = time.monotonic()
        ends = report.stopped is not None or report.step in (track.step + 1, report.num_steps)
        if ends or report.validation_loss is not None or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(
                f"{track.name} {report.step}/{report.num_steps}  {describe(report, device)}",
                file=sys.stderr,
                flush=True,
            )

    return listener
