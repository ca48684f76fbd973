"""A server of files and fine-tuning jobs alone, on a port of its own, and the official client in front of it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tailor.errors import TailorError
from tailor.server.errors import ApiError, as_api_error
from tailor.server.health import Meters
from tailor.server.middleware import Outermost


def app_of(routers: Sequence[APIRouter]) -> FastAPI:
    """An app of some routers, with the errors and request ids of the real one."""
    app = FastAPI(redirect_slashes=False)
    for router in routers:
        app.include_router(router)

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (ApiError, TailorError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)
    app.add_middleware(Outermost, meters=Meters())
    return app


@contextlib.contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app while the block runs; yields its base URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def client_of(url: str, **settings: Any) -> Iterator[openai.OpenAI]:
    """The official client, which does not retry."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", **{"max_retries": 0, **settings}) as client:
        yield client
