"""What a line of progress says, and whose memory it counts."""

from __future__ import annotations

import sys

import pytest
import torch

from tailor.training.progress import Track, describe, peak_memory, show_progress
from tailor.training.trainer import StepReport

REPORT = StepReport("mine", 1, 2, 1.25, 0.5, 1e-3, 1234.0, 0.1, 2.5)


def test_the_memory_of_this_process() -> None:
    before = peak_memory()
    assert 2**20 < before < 2**50
    assert before <= peak_memory(torch.device("cpu")) <= peak_memory()


def test_a_cuda_base_counts_what_tensors_hold_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 3 * 2**30)
    device = torch.device("cuda:1")
    assert peak_memory(device) == 3 * 2**30
    assert describe(REPORT, device) == "loss 1.2500  validation 2.5000  lr 1.00e-03  1,234 tokens/s  3.0 GiB"
    assert asked == [device, device]


def test_unknown_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows: importing it fails
    assert peak_memory() == 0
    assert describe(REPORT).endswith("1,234 tokens/s")


def test_lines_go_to_stderr_and_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with show_progress([Track("mine", 2)], quiet=quiet, device=torch.device("cpu")) as show:
            show(REPORT)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mine 1/2  loss 1.2500")
    assert err.count("\n") == 1
