"""Live servers over the scripted service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_server import Live, start
from scripted_service import ScriptedService


@pytest.fixture
def serve() -> Iterator[Callable[..., Live]]:
    """Starts servers that stop with the test."""
    running: list[Live] = []

    def run(service: Any = None, **settings: Any) -> Live:
        running.append(start(service or ScriptedService(), **settings))
        return running[-1]

    yield run
    for live in running:
        if live.thread.is_alive():
            live.stop()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One server for a file's tests."""
    running = start(ScriptedService())
    yield running
    running.stop()
