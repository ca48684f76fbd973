"""The app: all routes over one service, behind the guards, with every error in one envelope."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from tailor import __version__
from tailor.errors import TailorError
from tailor.server.adapters import adapter_router
from tailor.server.auth import KeyRing, check_address
from tailor.server.chat import Record, chat_router
from tailor.server.completions import completions_router
from tailor.server.embeddings import embeddings_router
from tailor.server.errors import ApiError, as_api_error
from tailor.server.health import Meters, Readiness, health_router
from tailor.server.middleware import Gate, Outermost
from tailor.server.model_routes import model_router
from tailor.server.responses import ErrorAnswer
from tailor.server.settings import ServerSettings
from tailor.server.stream import Stopping

if TYPE_CHECKING:
    from tailor.inference.service import Service

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in (
        *((400, "The request cannot be understood"), (401, "No valid API key"), (403, "Not allowed")),
        *((404, "There is no such thing"), (409, "In conflict with what is there"), (413, "Too large")),
        *((415, "Not JSON"), (429, "Too many requests"), ("4XX", "The request is wrong")),
        *((500, "The server failed"), (503, "Overloaded, or stopping"), ("5XX", "The server failed")),
    )
}

EXPOSED = (
    *("x-request-id", "openai-processing-ms", "openai-version", "openai-model", "x-ignored-params", "retry-after"),
    *(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")),
)
"""Headers that pages of `cors_origins` may read."""


def create_app(
    service: Service,
    settings: ServerSettings,
    *,
    routers: Sequence[APIRouter] = (),
    record: Record | None = None,
    lifespans: Sequence[Lifespan] = (),
) -> FastAPI:
    """The app of one service. `lifespans` run around it (a worker of jobs); at its end the service is closed.

    `app.state` holds `keys`, `meters`, `readiness` and `stopping`. Raises ConfigError when the settings would serve
    other machines without a key.
    """
    ring = KeyRing(settings.keys_file, settings.api_keys)
    check_address(settings, ring)
    meters, readiness, stopping = Meters(), Readiness(), Stopping()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(service.close)
            for each in lifespans:
                await stack.enter_async_context(each())
            yield

    app = FastAPI(
        title="tailor",
        version=__version__,
        description="One base and all its customizations, over the OpenAI protocol.",
        lifespan=lifespan,
        responses=ERRORS,
        redirect_slashes=False,
    )
    app.state.keys, app.state.meters, app.state.readiness, app.state.stopping = ring, meters, readiness, stopping
    own = (
        chat_router(service, settings, stopping, record),
        completions_router(service, settings, stopping),
        embeddings_router(service, stopping),
        model_router(service),
        adapter_router(service, settings),
        health_router(service, meters, readiness),
    )
    for router in (*own, *routers):
        app.include_router(router)
    for kind in (ApiError, TailorError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer_error)
    _add_middleware(app, settings, ring, meters)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    """The answer to an error that is known. Faults of the server's own stand in its log, with paths and hints."""
    answer = as_api_error(error)
    if answer.status == 500:
        told = f"{error} ({error.hint})" if isinstance(error, TailorError) and error.hint else str(error)
        print(f"{request.state.request_id} {request.method} {request.url.path}: {told}", file=sys.stderr)
    return answer.response()


def _add_middleware(app: FastAPI, settings: ServerSettings, ring: KeyRing, meters: Meters) -> None:
    """The last added is the outermost."""
    app.add_middleware(Gate, settings=settings, ring=ring)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED),
        )
    app.add_middleware(Outermost, meters=meters)
