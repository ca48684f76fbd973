from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tailor.evaluation import memory
from tailor.evaluation.memory import highest, peak_of
from tailor.training.progress import peak_memory

MB = 1_000_000


def peak_of_nothing() -> int:
    with peak_of() as peak:
        pass
    return peak.bytes


def peak_of_tensor(size: int) -> int:
    with peak_of() as peak:
        tensor = torch.ones(size, dtype=torch.uint8)
        assert int(tensor[-1]) == 1
        del tensor
    return peak.bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process lower its high-water mark")
def test_a_block_is_charged_for_its_own_highest_point_and_the_next_one_is_not() -> None:
    if not memory._lower_mark():
        pytest.skip("this system does not let the mark be lowered")
    before = peak_of_nothing()
    inside = peak_of_tensor(200 * MB)
    after = peak_of_nothing()
    assert before > 0
    assert inside - before >= 195 * MB  # pages in use before that were dropped meanwhile count against it
    assert inside - before < 300 * MB
    assert inside - after >= 150 * MB


def test_what_is_held_before_the_block_counts() -> None:
    held = torch.ones(100 * MB, dtype=torch.uint8)
    assert peak_of_nothing() >= held.numel()


@pytest.mark.parametrize("missing", ["CLEAR_REFS", "STATUS"])
def test_without_a_mark_that_can_be_lowered_it_is_the_peak_of_the_process(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, missing, tmp_path / "nowhere" / "file")
    first = peak_of_tensor(50 * MB)
    assert first == peak_memory()
    assert peak_of_nothing() >= first


def test_a_block_that_fails_still_has_its_peak() -> None:
    with pytest.raises(RuntimeError), peak_of(torch.device("cpu")) as peak:
        raise RuntimeError
    assert peak.bytes > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_tensors_there_count() -> None:
    device = torch.device("cuda")
    with peak_of(device) as first:
        torch.ones(50 * MB, dtype=torch.uint8, device=device)
    with peak_of(device) as second:
        pass
    assert first.bytes - second.bytes >= 50 * MB


def test_the_highest_point_so_far_can_be_asked_inside_the_block() -> None:
    with peak_of() as peak:
        before = highest()
        tensor = torch.ones(150 * MB, dtype=torch.uint8)
        assert int(tensor[-1]) == 1
        del tensor
        after = highest()
    assert after - before >= 140 * MB
    assert peak.bytes >= after
