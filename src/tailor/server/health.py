"""Whether the server lives, whether it is ready, what it counts (Prometheus), and its tokenizer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Response

from tailor.server.errors import ApiError, invalid
from tailor.server.protocol import DetokenizeRequest, TokenizeRequest
from tailor.server.responses import Detokenized, Status, Tokenized
from tailor.server.translate import asked, check_ids, messages_of, words

if TYPE_CHECKING:
    from tailor.inference.service import Service

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds in seconds of the latency histogram."""


class Meters:
    """Requests by route, method and status, and how long they took. Unknown routes share one label."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._buckets: Counter[tuple[str, float]] = Counter()
        self._seconds: Counter[str] = Counter()

    def observe(self, scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
        """Count a finished request; status 0 means that the client left before the answer began."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if route != "other" else "other"
        bound = next((bound for bound in BUCKETS if seconds <= bound), float("inf"))
        with self._lock:
            self._requests[route, method, status] += 1
            self._buckets[route, bound] += 1
            self._seconds[route] += seconds  # type: ignore[assignment]  # a Counter adds floats as well

    def lines(self) -> Iterable[str]:
        """The counts in Prometheus' text format."""
        with self._lock:
            requests, buckets, seconds = dict(self._requests), dict(self._buckets), dict(self._seconds)
        yield "# HELP tailor_http_requests_total Answered requests."
        yield "# TYPE tailor_http_requests_total counter"
        for (route, method, status), count in sorted(requests.items()):
            yield f'tailor_http_requests_total{{route="{route}",method="{method}",status="{status}"}} {count}'
        yield "# HELP tailor_http_request_seconds Time from the request to the end of its answer."
        yield "# TYPE tailor_http_request_seconds histogram"
        for route in sorted(seconds):
            total = 0
            for bound in (*BUCKETS, float("inf")):
                total += buckets.get((route, bound), 0)
                shown = "+Inf" if bound == float("inf") else f"{bound:g}"
                yield f'tailor_http_request_seconds_bucket{{route="{route}",le="{shown}"}} {total}'
            yield f'tailor_http_request_seconds_sum{{route="{route}"}} {seconds[route]:.6f}'
            yield f'tailor_http_request_seconds_count{{route="{route}"}} {total}'


def exposition(meters: Meters, engine: Mapping[str, float]) -> str:
    """The HTTP counts and the engine's figures in Prometheus' text format."""
    lines = list(meters.lines())
    for name, value in sorted(engine.items()):
        lines += [f"# TYPE tailor_{name} untyped", f"tailor_{name} {value}"]  # every digit: rates are differences
    return "\n".join(lines) + "\n"


class Readiness:
    """Whether new requests should come here; a server that stops says no before it goes."""

    def __init__(self) -> None:
        self.stopping = False


def health_router(service: Service, meters: Meters, readiness: Readiness) -> APIRouter:
    """/health, /ready, /metrics, /tokenize and /detokenize (the last two as vLLM has them)."""
    router = APIRouter(tags=["server"])

    @router.get("/health", response_model=Status)
    async def health() -> Status:
        """The process lives."""
        return Status(status="ok")

    @router.get("/ready", response_model=Status)
    async def ready() -> Status:
        """Requests are taken; 503 while the server stops, or when its engine has died."""
        if readiness.stopping:
            raise ApiError(503, "The server is stopping.", code="stopping", headers={"retry-after": "5"})
        if not service.alive:
            raise ApiError(503, "The engine does not run: restart the server.", code="engine_dead")
        return Status(status="ready")

    @router.get("/metrics", response_model=None, responses={200: {"content": {"text/plain": {"schema": {}}}}})
    async def metrics() -> Response:
        """Counts for Prometheus."""
        text = exposition(meters, service.metrics())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.post("/tokenize", response_model=Tokenized, response_model_exclude_unset=True)
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """The token ids of a text, or of messages in the chat template."""
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "Give either `prompt` or `messages`.")
        request = asked(messages_of(body.messages or ()), prompt=body.prompt)
        ids = words(service, body.model, await service.tokenize(body.model, request))
        shown = Tokenized(count=len(ids), max_model_len=service.context(body.model), tokens=ids)
        if body.return_token_strs:
            shown.token_strs = [service.token_bytes(body.model, i).decode("utf-8", "replace") for i in ids]
        return shown

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids."""
        await service.warm(body.model)
        check_ids(service, body.model, body.tokens, "tokens")
        return Detokenized(prompt=await service.detokenize(body.model, body.tokens))

    return router
