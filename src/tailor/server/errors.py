"""What went wrong, in OpenAI's envelope: statuses, types, codes, and headers that tell a client whether to retry."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tailor.errors import (
    AuthError,
    ConflictError,
    DamageError,
    MissingDependencyError,
    NotFoundError,
    OverloadedError,
    ResourceError,
    TailorError,
    UnavailableError,
)

NO_RETRY: Mapping[str, str] = {"x-should-retry": "false"}
"""The official client repeats 409 and 5xx answers by itself; this tells it that it would be in vain."""

TYPES = {403: "permission_error", 409: "conflict_error", 429: "rate_limit_error"}
"""The envelope's `type` by status; other 4xx are `invalid_request_error`, 5xx are `server_error`."""

UNSUPPORTED_MEDIA = "unsupported_media_type"

POSTGRESQL_FULL = "53100"

_PATH = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:()]+[/\\])+([^\s/\\'\",;:()]*)")


class ApiError(Exception):
    """An answer that is an error. `type` follows from the status unless it is given."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type or TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The envelope with its status and headers."""
        return JSONResponse(self.envelope(), self.status, self.headers)


def unsupported(param: str, reason: str) -> ApiError:
    """A parameter of OpenAI's that this server does not have (400)."""
    return ApiError(400, f"Unsupported parameter: {param!r}: {reason}", code="unsupported_parameter", param=param)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A value that cannot be used (400)."""
    return ApiError(400, message, code=code, param=param)


def as_api_error(error: Exception) -> ApiError:
    """How any exception is answered. What is no error for people says nothing about itself: it may hold secrets."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TailorError):
        return _of_tailor(error)
    if isinstance(error, RequestValidationError):
        return of_validation(error.errors())
    if isinstance(error, HTTPException):
        return _of_status(error)
    if is_full(error):
        return storage_full()
    return ApiError(500, "The server had an error while processing your request.", code="internal_error")


def is_full(error: Exception) -> bool:
    """Whether a disk has no room, for a file or for the database."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = getattr(error, "orig", None)  # SQLAlchemy's errors have the driver's
    code = getattr(cause, "sqlite_errorcode", None) or getattr(cause, "sqlstate", None)
    return code in (sqlite3.SQLITE_FULL, POSTGRESQL_FULL)


def storage_full() -> ApiError:
    """The server's disk is full (507); asking again is in vain."""
    return ApiError(507, "The server has no room for this.", code="storage_full", headers=NO_RETRY)


def _of_tailor(error: TailorError) -> ApiError:
    if isinstance(error, UnavailableError):  # its words are for the server's log
        message = "The server's database does not answer for now."
        return ApiError(503, message, code="database_unavailable", headers={"retry-after": "2"})
    message = without_paths(error.message if error.hint is None else f"{error.message} ({error.hint})")
    if isinstance(error, OverloadedError):
        return ApiError(503, message, code="overloaded", headers={"retry-after": "1"})
    if isinstance(error, ResourceError):
        return ApiError(400, message, code="context_length_exceeded", param="messages")
    if isinstance(error, NotFoundError):
        return ApiError(404, message, code="model_not_found", param="model")
    if isinstance(error, ConflictError):
        return ApiError(409, message, code="conflict", headers=NO_RETRY)
    if isinstance(error, AuthError):
        return ApiError(403, message, code="model_not_allowed")
    if isinstance(error, DamageError):  # the client did nothing wrong, and cannot mend it
        message = "The files of this model are damaged; the server's log says which."
        return ApiError(500, message, code="model_damaged", headers=NO_RETRY)
    if isinstance(error, MissingDependencyError):
        return ApiError(500, message, code=error.code, headers=NO_RETRY)
    if type(error) is TailorError:  # the root alone: the engine ended under the request
        return ApiError(503, message, code="unavailable", headers={"retry-after": "1"})
    return ApiError(400, message, code="invalid_value")


def without_paths(text: str) -> str:
    """The text with only the last part of every absolute path: where things lie is nobody's business over HTTP."""
    return _PATH.sub(r"…/\1", text)


def _of_status(error: HTTPException) -> ApiError:
    """Starlette's own: unknown routes, wrong methods, unreadable bodies."""
    headers = error.headers or {}
    if error.status_code == 404:
        return ApiError(404, "Unknown request URL. The routes are listed under /docs.", code="unknown_url")
    if error.status_code == 405:
        allowed = headers.get("allow", "another one")
        return ApiError(405, f"This URL takes {allowed}.", code="method_not_supported", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


def of_validation(problems: Sequence[Any]) -> ApiError:
    """The one of pydantic's problems that says most, as OpenAI words it."""
    problem = _telling(problems)
    location = [part for part in problem["loc"] if part not in ("body", "query", "path") and _is_name(part)]
    param, kind = show(location) or None, problem["type"]
    if kind == "json_invalid":
        return invalid(None, "We could not parse the JSON body of your request.", "invalid_json")
    if kind == "unknown_parameter":
        param = show([*location, problem["ctx"]["name"]])
        return invalid(param, f"Unrecognized request argument supplied: {param}{problem['msg']}", kind)
    if kind == "missing":
        what = f"parameter: {param!r}" if param else "body: a JSON object"
        return invalid(param, f"Missing required {what}.", "missing_required_parameter")
    if param is None and isinstance(problem.get("input"), bytes):
        return ApiError(415, "The body must be JSON: send Content-Type: application/json.", code=UNSUPPORTED_MEDIA)
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    reason = str(problem["msg"]).removeprefix("Value error, ")
    return invalid(param, f"Invalid value for {param!r}: {reason}." if param else f"{reason}.", code)


def _telling(problems: Sequence[Any]) -> Any:
    """A misspelt name explains a missing one; else the first, or where it is about a union, its nearest miss."""
    for problem in problems:
        if problem["type"] == "unknown_parameter":
            return problem
    place = problems[0]["loc"][:2]
    return max((p for p in problems if p["loc"][:2] == place), key=lambda p: len(p["loc"]))


def _is_name(part: Any) -> bool:
    """Whether this is in the body, and not pydantic's name for a member of a union."""
    return isinstance(part, int) or (part.isidentifier() and part.islower() and part not in ("str", "int", "bool"))


def show(location: Any) -> str:
    """A place in a body as OpenAI writes it.

    >>> show(["messages", 0, "role"])
    'messages[0].role'
    """
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
