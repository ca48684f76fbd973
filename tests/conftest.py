"""What every test gets: fixed seeds, no network, hypothesis without deadlines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile(
    "tailor", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tailor")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TAILOR_HOME of the test's own; the folder is not there yet."""
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch, own_home: Path) -> int:
    """From so many rows on they are kept on disk and worked on by two processes, three at a time."""
    for module in ("parallel", "readers"):
        monkeypatch.setattr(f"tailor.data.{module}.MANY_ROWS", 8)
    monkeypatch.setattr("tailor.data.parallel.ROWS_PER_TASK", 3)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1}, raising=False)
    return 8


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Tests draw the same numbers in every run and in any order; those that never use torch do not pay for it."""
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
