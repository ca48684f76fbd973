"""Server-sent events: a heartbeat in silence, an error event when it goes wrong, an end when nobody listens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tailor.errors import OverloadedError, ResourceError
from tailor.server.errors import ApiError, as_api_error

if TYPE_CHECKING:
    from tailor.inference.backend import Completion
    from tailor.inference.backend import Request as Asked
    from tailor.inference.service import Service
    from tailor.inference.streams import Piece, Stream

Result = TypeVar("Result")

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

CLIENT_LEFT = 499
"""The status in the metrics of a request whose client left before its answer (nginx's number)."""


class Stopping:
    """Set when the server's grace is over: what still runs is cut with an error."""

    def __init__(self) -> None:
        self.is_set = False
        self._waiting: set[asyncio.Future[None]] = set()

    def set(self) -> None:
        """Cut everything; called in the server's event loop."""
        self.is_set = True
        for future in self._waiting:
            if not future.done():
                future.set_result(None)

    async def wait(self) -> None:
        """Until `set`."""
        if self.is_set:
            return
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)


def stopped() -> ApiError:
    """What a request gets that was cut."""
    headers = {"retry-after": "5"}
    return ApiError(503, "The server stopped before the answer was complete.", code="server_stopped", headers=headers)


class EventStream(Response):
    """Sends each of `events` (JSON text) as `data:`, then `[DONE]`. `events` is closed whatever happens."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        stopping: Stopping,
        heartbeat: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={**STREAM_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self.events = events
        self.stopping = stopping
        self.heartbeat = heartbeat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            cut = await unless(self._send_all(send), disconnected(receive), self.stopping.wait())
            if cut == 2:
                await self._end(send, _event(json.dumps(stopped().envelope())))
        finally:
            await self.events.aclose()

    async def _send_all(self, send: Send) -> None:
        following: asyncio.Task[str] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(anext(self.events))
                done, _ = await asyncio.wait({following}, timeout=self.heartbeat)
                if not done:
                    await _send(send, PING)
                    continue
                text, following = following.result(), None
                await _send(send, _event(text))
        except StopAsyncIteration:
            await self._end(send, DONE)
        except Exception as error:
            await self._end(send, _event(json.dumps(_failed(error).envelope())))
        finally:
            if following is not None and not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _end(self, send: Send, last: bytes) -> None:
        await _send(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"


async def _send(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _failed(error: Exception) -> ApiError:
    known = as_api_error(error)
    if known.status >= 500 and not isinstance(error, ApiError | ResourceError):
        traceback.print_exception(error, file=sys.stderr)
    return known


async def disconnected(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless(work: Coroutine[Any, Any, None], *ends: Coroutine[Any, Any, None]) -> int:
    """Do the work until it is done (0) or one of `ends` comes (its number from 1); what was not done is cancelled."""
    tasks = [asyncio.ensure_future(each) for each in (work, *ends)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = next(k for k, task in enumerate(tasks) if task.done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    tasks[first].result()
    return first


async def while_connected(request: Request, stopping: Stopping, work: Awaitable[Result]) -> Result:
    """The work's result. When the client leaves or the server stops first, it is cancelled and ApiError raised."""
    results: list[Result] = []

    async def run() -> None:
        results.append(await work)

    cut = await unless(run(), disconnected(request.receive), stopping.wait())
    if cut == 0:
        return results[0]
    raise stopped() if cut == 2 else ApiError(CLIENT_LEFT, "The client left.")


async def open_all(service: Service, model: str, requests: Sequence[Asked], param: str) -> list[Stream]:
    """All requests under way. Raises before anything is generated; then none of them is."""
    tasks = [asyncio.ensure_future(service.stream(model, request)) for request in requests]
    try:
        await asyncio.wait(tasks)  # a cancelled `gather` would cancel them, and lose those that have just begun
        streams = [task.result() for task in tasks]
        for stream, request in zip(streams, requests, strict=True):
            _check_room(stream.num_prompt_tokens, request.sampling.max_new_tokens, service.context(model), param)
        return streams
    except BaseException as error:
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, BaseException):
                result.cancel()
        if isinstance(error, ResourceError) and not isinstance(error, OverloadedError):
            known = as_api_error(error)
            raise ApiError(known.status, known.message, code=known.code, param=param) from error
        raise


def _check_room(num_prompt: int, num_new: int, context: int, param: str) -> None:
    """An answer that was promised more tokens than there are would end early without a word."""
    if num_prompt + num_new > context:
        message = f"prompt {num_prompt} tokens + max_completion_tokens {num_new} > context {context}"
        raise ApiError(400, message, code="context_length_exceeded", param=param)


async def collect(streams: Sequence[Stream]) -> list[Completion]:
    """The completions of streams read to their end; cancels them all when this is cancelled or one fails."""
    tasks = [asyncio.ensure_future(_drain(stream)) for stream in streams]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for stream in streams:
            stream.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
    return completions_of(streams)


def completions_of(streams: Sequence[Stream]) -> list[Completion]:
    """Those of streams that were read to their end."""
    return [stream.completion for stream in streams if stream.completion is not None]


async def _drain(stream: Stream) -> None:
    async for _ in stream:
        pass


async def interleaved(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(index, piece) of all streams as they come; cancels what is left when the reader stops or one fails."""
    queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue(maxsize=2 * len(streams))

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for piece in stream:
                await queue.put((index, piece))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for stream in streams:
            stream.cancel()
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
