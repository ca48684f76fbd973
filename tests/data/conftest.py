"""A TAILOR_HOME for every test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_home(own_home: Path) -> Path:
    """Large files are kept in the test's own home."""
    return own_home
