"""Freed memory is kept: tensors of a step come from the heap, and the heap does not shrink when they are freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import re, sys
import torch
from tailor.training.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def heap():
    found = re.search(r"^(\\w+)-(\\w+) .*\\[heap\\]$", open("/proc/self/maps").read(), re.MULTILINE)
    return (int(found[2], 16) - int(found[1], 16)) >> 20
before = heap()
tensors = [torch.ones(1 << 22) for _ in range(8)]  # 16 MiB each
held = heap()
del tensors
print(held - before, heap() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_heap_keeps_what_is_freed() -> None:
    def grown(how: str) -> list[int]:
        """MiB by which the heap is larger while the tensors are held, and after."""
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    held, after = grown("kept")
    assert held >= 128
    assert after == held
    assert grown("given back")[1] < 128
