"""A live server in a thread, on a free port of this machine."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from tailor.server.app import create_app
from tailor.server.chat import Record
from tailor.server.running import Server
from tailor.server.settings import ServerSettings


@dataclass
class Live:
    """A server that listens, its service, and the thread it runs in."""

    service: Any
    server: Server
    thread: threading.Thread

    @property
    def port(self) -> int:
        return self.server.bound_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def start(service: Any, record: Record | None = None, **settings: Any) -> Live:
    """A server on a free port; returns when it listens."""
    chosen = ServerSettings(**{"port": 0, "grace": 0.2, **settings})
    server = Server(create_app(service, chosen, record=record), chosen)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    return Live(service, server, thread)
