"""The machine: what a report of measurements must say of it, how much memory is free, and what is done with it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """System, processor, usable cores and memory in bytes."""
    total = found[1] if (found := memory()) is not None else None
    system = f"{platform.system()} {platform.machine()}"
    return {"system": system, "cpu": _processor(), "cores": usable_cores(), "memory": total}


def usable_cores() -> int | None:
    """Processor cores that this process may run on; None where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"^model name\s*:(.*)$", info.read_text("utf-8"), re.MULTILINE)):
        return found[1].strip()
    return platform.processor() or platform.machine()


def memory() -> tuple[int, int] | None:
    """(free, total) bytes, within the limit of a container; None where the system does not say."""
    try:
        page, total_pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    total = free = page * total_pages
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text("utf-8"))):
        free = int(found[1]) * 1024
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    if limit is not None and limit < total:
        used = _number(Path("/sys/fs/cgroup/memory.current")) or 0
        total, free = limit, min(free, limit - used)
    return free, total


def _number(path: Path) -> int | None:
    try:
        text = path.read_text("utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def keep_freed_memory() -> None:
    """Let the C library keep up to 2 GiB that are freed, for the next tensors, instead of returning them at once.

    Each pass makes and frees the same large tensors, and memory that comes back from the system costs a fault for every
    4 KiB: as much as the arithmetic of a prompt's pass, where it was measured (docs/log.md). With glibc only, and not
    where MALLOC_* or GLIBC_TUNABLES in the environment say something else.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter, value in _GLIBC.items():
        mallopt(parameter, value)


_GLIBC = {-1: 2**31 - 1, -3: 2**25}
"""M_TRIM_THRESHOLD, and M_MMAP_THRESHOLD, which may not be more."""
