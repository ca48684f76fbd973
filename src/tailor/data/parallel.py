"""The same work on many rows, by several processes where the system can fork; the results come in order."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tailor.data.progress import Progress, silent
from tailor.errors import ResourceError

Result = TypeVar("Result")

MANY_ROWS = 5_000
"""From here on rows are kept on disk and worked on by several processes; below, neither is worth its start."""

ROWS_PER_TASK = 500
MAX_WORKERS = 16

_work: Callable[[range], Any]
"""What a worker process does; set in workers only."""


def in_ranges(
    work: Callable[[range], Result], num_rows: int, stage: str, progress: Progress = silent
) -> Iterator[Result]:
    """`work` on consecutive ranges that make up `num_rows` rows, in order; of many rows `progress` is told.

    Workers are forked, so they see all that the caller sees and are sent nothing but ranges; what they return must be
    picklable. An exception of `work` is raised in its turn. Raises ResourceError when a worker is killed.
    """
    tasks = [range(start, min(start + ROWS_PER_TASK, num_rows)) for start in range(0, num_rows, ROWS_PER_TASK)]
    many = num_rows >= MANY_ROWS
    num_workers = min(_processors(), len(tasks)) if many else 1
    results = _forked(work, tasks, num_workers) if num_workers > 1 else map(work, tasks)
    for task, result in zip(tasks, results, strict=True):
        yield result
        if many:
            progress(stage, task.stop, num_rows)


def _forked(work: Callable[[range], Result], tasks: Sequence[range], num_workers: int) -> Iterator[Result]:
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), initializer=_begin, initargs=(work, os.getpid())
    )
    try:
        with _ready_to_fork():
            waiting: deque[Future[Result]] = deque([pool.submit(_run, tasks[0])])  # this starts all workers
        for task in tasks[1:]:
            if len(waiting) > 2 * num_workers:  # results that nobody has asked for yet would pile up
                yield waiting.popleft().result()
            waiting.append(pool.submit(_run, task))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ResourceError("a process that worked on the rows was killed, most likely for want of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    """Processes to share the work; 1 where forking is unknown, unsafe, or forbidden (in a daemon)."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


@contextlib.contextmanager
def _ready_to_fork() -> Iterator[None]:
    """Keep two packages calm while the workers start.

    `tokenizers` prints a warning in every forked process unless told that it need not use threads there. Python 3.12
    warns of forks beside threads, for locks that a thread may hold: the workers use none of torch's.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _begin(work: Callable[[range], Any], caller: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent = 1  # PR_SET_PDEATHSIG of linux/prctl.h; a caller that is killed cannot end them
    ctypes.CDLL(None).prctl(die_with_parent, signal.SIGTERM)
    if os.getppid() != caller:
        os._exit(1)
    gc.freeze()  # a collection would write to, and so copy, every page that is shared with the caller


def _run(rows: range) -> Any:
    return _work(rows)
