"""What is known of the machine, and that freed memory is kept where the C library can."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from tailor.machine import describe_machine, memory, usable_cores

FAULTS = """
import resource, sys, torch
from tailor.machine import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def passes():
    for _ in range(20):
        a = torch.ones(3 << 20)
        b = torch.ones(3 << 20)
        del a, b
passes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
passes()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str, **more: str) -> int:
    """Page faults of 20 passes that make and free two tensors of 12 MiB."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    ran = subprocess.run(
        [sys.executable, "-c", FAULTS, way], env={**plain, **more}, capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no mallopt in this C library")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    pages = 20 * 2 * (12 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults("kept") < pages // 10
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="65536") > pages // 2
    assert faults("as it was", MALLOC_MMAP_THRESHOLD_="65536") > pages // 2


def test_a_machine_has_cores_and_memory() -> None:
    found = memory()
    assert found is None or 0 < found[0] <= found[1]
    cores = usable_cores()
    assert cores is None or cores >= 1
    assert describe_machine()["cores"] == cores
