"""The programs of benchmarks/ as modules."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import each other by their bare names, as when they are run."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
