"""What every test gets: fixed seeds, no network, hypothesis without deadlines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import postgres_server

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


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server: the one of TAILOR_TEST_POSTGRES, or one that is started for the tests."""
    if url := os.environ.get(postgres_server.VARIABLE):
        yield url
        return
    with postgres_server.server() as server:
        yield server.url


@pytest.fixture
def postgresql_database(postgresql: str) -> Iterator[str]:
    """The URL of an empty database of PostgreSQL."""
    with postgres_server.empty_database(postgresql) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> str | None:
    """The URL of an empty database: None for SQLite in TAILOR_HOME, and once more one of PostgreSQL."""
    return None if request.param == "sqlite" else str(request.getfixturevalue("postgresql_database"))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def module_database(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """As `database`, one for all tests of a file."""
    if request.param == "sqlite":
        yield None
        return
    with postgres_server.empty_database(str(request.getfixturevalue("postgresql"))) as url:
        yield url


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
