"""How much memory a block of work needs at its highest point."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor.training.progress import peak_memory

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_PEAK = "5"
"""Written to clear_refs, it sets the process's highest resident size (VmHWM) to what it holds now (proc(5))."""


@dataclass
class Peak:
    """`bytes` is the highest memory held while the block ran: set when it ends, 0 where nobody counts."""

    bytes: int = 0


@contextmanager
def peak_of(device: torch.device | None = None) -> Iterator[Peak]:
    """Measure the highest memory held during the block, what was held before it included. Blocks do not nest.

    On a CUDA `device` that is memory of tensors there. Elsewhere it is the resident memory of this process: on Linux
    memory that is free already goes back to the system first and the system's mark is lowered to what is left (so the
    process's own peak, `peak_memory`, starts again too). Where no mark can be lowered (macOS, a sandbox), it is the
    process's peak since it started, which never falls.
    """
    peak = Peak()
    gc.collect()
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    lowered = not on_gpu and _lower_mark()
    try:
        yield peak
    finally:
        mark = _mark() if lowered else None
        peak.bytes = peak_memory(device) if mark is None else mark


def highest(device: torch.device | None = None) -> int:
    """The highest memory held so far, asked inside a `peak_of` block; 0 where nobody counts."""
    on_gpu = device is not None and device.type == "cuda"
    mark = None if on_gpu else _mark()
    return peak_memory(device) if mark is None else mark


def _lower_mark() -> bool:
    """Whether the process's high-water mark could be set to what it holds now."""
    if _mark() is None:
        return False
    with suppress(OSError, AttributeError):  # the C library is not GNU's
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _mark() -> int | None:
    """The high-water mark of the process's resident memory in bytes, None where the system does not tell."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
