"""Freed memory is kept: a step that takes what the step before gave back touches no new page."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from tailor.training.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    tensors = [torch.ones(1 << 20) for _ in range(64)]  # 256 MiB in pieces of 4 MiB
    del tensors
for _ in range(3):
    work()
before = faults()
for _ in range(4):
    work()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_no_new_pages_are_asked_for() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert 10 * faults("kept") < faults("given back")
