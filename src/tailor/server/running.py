"""The server's process: listen, and on a signal stop in order: nothing new, a grace for what runs, then a cut."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tailor.errors import ConflictError, NotFoundError
from tailor.server.settings import ServerSettings

SECONDS_TO_CUT = 5
"""What requests that were cut have for their last event, before their connections are closed."""


class Server(uvicorn.Server):
    """uvicorn with a grace: after a signal `/ready` says no and running requests may end; then they are cut."""

    def __init__(
        self, app: FastAPI, settings: ServerSettings, on_start: Callable[[int], None] = lambda port: None
    ) -> None:
        """`on_start` is told the port as soon as requests are answered."""
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=int(settings.grace) + SECONDS_TO_CUT,
        )
        super().__init__(config)
        self.state = app.state
        self.grace = settings.grace
        self.on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self.on_start(self.bound_port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests end, and cut them after the grace."""
        self.state.readiness.stopping = True
        cut = asyncio.get_running_loop().call_later(self.grace, self.state.stopping.set)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    @property
    def bound_port(self) -> int:
        """The port it listens on, once it does."""
        return int(self.servers[0].sockets[0].getsockname()[1])


def run_beside(
    server: Server, sockets: list[socket.socket], work: Callable[[], None], stop: Callable[[], None]
) -> None:
    """Run the server in a thread, and in this one, the main thread, `work`, which ends after `stop`.

    A signal ends the server in order, a second Ctrl-C at once; then it is raised again. Raises what the server raised.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            server.run(sockets=sockets)
        except BaseException as error:
            failed.append(error)
        finally:
            stop()

    received: list[int] = []

    def leave(number: int, frame: FrameType | None) -> None:
        received.append(number)
        server.handle_exit(number, frame)

    thread = threading.Thread(target=run, name="http")
    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        work()
    finally:
        server.should_exit = True
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    if failed:
        raise failed[0]
    for again in reversed(received):
        signal.raise_signal(again)


def listen(settings: ServerSettings) -> socket.socket:
    """A socket at the settings' address. Raises ConflictError for a port in use, NotFoundError for no address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise NotFoundError(f"{settings.host!r} is no address of this machine: {error.strerror or error}") from error
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise ConflictError(
            f"{settings.host}:{settings.port} cannot be listened on: {error.strerror}",
            hint="choose another with --port (0: any free one)",
        ) from error
    return found
