"""Around every request: an id, the clock, the guards before the routes, an envelope for what goes wrong."""

from __future__ import annotations

import secrets
import sys
import time
import traceback
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tailor.server.auth import KeyRing, RateLimiter, authenticate, check_host, scope_of
from tailor.server.errors import ApiError, as_api_error
from tailor.server.health import Meters
from tailor.server.settings import ServerSettings

OPENAI_VERSION = "2020-10-01"

MULTIPART_BYTES = 1 << 20
"""What an upload's other fields and boundaries may take beside the file."""


class Outermost:
    """Gives every response `x-request-id`; counts it; turns what escaped into a 500 that tells nothing."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app = app
        self.meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # the same route: a redirect would make a client lose its POST
        scope["path"] = scope["path"].rstrip("/") or "/"
        start, request_id, status = time.perf_counter(), f"req_{secrets.token_hex(16)}", 0
        scope.setdefault("state", {})["request_id"] = request_id

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-version"] = OPENAI_VERSION
                headers["openai-processing-ms"] = str(round((time.perf_counter() - start) * 1000))
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            if not isinstance(error, ApiError):
                print(f"{request_id} {scope['method']} {scope['path']}", file=sys.stderr)
                traceback.print_exception(error, file=sys.stderr)
            if not status:
                await as_api_error(error).response()(scope, receive, answer)
        finally:
            self.meters.observe(scope, status, time.perf_counter() - start)


class Gate:
    """Lets through what comes from where it may, with a key that may, at a rate and of a size that it may."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, ring: KeyRing) -> None:
        self.app = app
        self.settings = settings
        self.ring = ring
        limit = settings.requests_per_minute
        self.limiter = RateLimiter(limit) if limit else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            limits = self._check(scope, headers)
        except Exception as error:  # a list of keys that cannot be read among them
            await as_api_error(error).response()(scope, receive, send)
            return
        largest = self._largest(scope["path"])
        await _Sized(self.app, largest, limits)(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> Mapping[str, str]:
        """The limit headers for the response. Raises ApiError."""
        check_host(self.settings, bool(self.ring.keys()), headers)
        principal = authenticate(self.ring, scope_of(scope["method"], scope["path"]), headers)
        scope.setdefault("state", {})["principal"] = principal
        limits = self.limiter.take(principal.key_id) if self.limiter and scope["path"].startswith("/v1/") else {}
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._largest(scope["path"]):
            raise too_large(self._largest(scope["path"]))
        return limits

    def _largest(self, path: str) -> int:
        uploads = path.startswith(("/v1/files", "/v1/uploads"))
        return self.settings.max_upload_bytes + MULTIPART_BYTES if uploads else self.settings.max_body_bytes


def too_large(limit: int) -> ApiError:
    """A body over the limit (413)."""
    return ApiError(413, f"The request body is larger than {limit} bytes.", code="request_too_large")


class _Sized:
    """One request whose body is counted while it comes in, whatever its headers said."""

    def __init__(self, app: ASGIApp, limit: int, headers: Mapping[str, str]) -> None:
        self.app = app
        self.limit = limit
        self.headers = headers
        self.received = 0
        self.answered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            message = await receive()
            self.received += len(message.get("body", b""))
            if self.received > self.limit:
                raise too_large(self.limit)
            return message

        async def answer(message: Message) -> None:
            if self.answered:
                return
            if message["type"] == "http.response.start":
                if self.received > self.limit:  # whatever a parser made of the exception, this is what happened
                    self.answered = True
                    await too_large(self.limit).response()(scope, receive, send)
                    return
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, counted, answer)
