"""Who may do what: hashed API keys with scopes, the Host and Origin a request must have, and requests per minute."""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tailor.errors import ConfigError, DataError, NotFoundError, nearest
from tailor.runs import hold, home
from tailor.server.errors import ApiError
from tailor.server.settings import ServerSettings, is_loopback
from tailor.store import write_json

SCOPES = ("inference", "files", "training", "admin")
"""What a key may be used for; `admin` includes the others."""

PREFIX = "sk-tailor-"

OPEN_PATHS = frozenset({"/health", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""Answered without a key: they say nothing about models or data."""

_SCOPE_OF_PATH = (
    ("/v1/files", "files"),
    ("/v1/uploads", "files"),
    ("/v1/fine_tuning", "training"),
    ("/v1/load_lora_adapter", "admin"),
    ("/v1/unload_lora_adapter", "admin"),
)


@dataclass(frozen=True)
class Principal:
    """Who asks: the key's id and what it may be used for."""

    key_id: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Whether the key has this scope."""
        return scope in self.scopes or "admin" in self.scopes


ANYBODY = Principal("local", frozenset(SCOPES))
"""Who asks a server without keys, which only this machine can reach."""


@dataclass(frozen=True)
class Key:
    """A key as it is kept: enough to recognise it, not to use it."""

    key_id: str
    sha256: str
    start: str
    name: str
    scopes: tuple[str, ...]
    created: int


class KeyRing:
    """The keys of a file (read again whenever it changes) and those given at the start, which have all scopes."""

    def __init__(self, path: Path | None, given: Sequence[str] = ()) -> None:
        self.path = path
        self._given = [Key("given", _hash(key), key[:4], "given at the start", ("admin",), 0) for key in given]
        self._read: tuple[tuple[int, int] | None, list[Key]] = (None, [])

    def keys(self) -> list[Key]:
        """All keys. Raises DataError when the file cannot be read: nobody is let in by mistake."""
        return [*self._given, *self._stored()]

    def find(self, text: str) -> Principal | None:
        """Whose key this is. Takes the same time for every wrong key."""
        digest, found = _hash(text), None
        for key in self.keys():
            if hmac.compare_digest(digest, key.sha256):
                found = Principal(key.key_id, frozenset(key.scopes))
        return found

    def create(self, name: str, scopes: Iterable[str] = ("inference",)) -> tuple[str, Key]:
        """Add a key and return it; this is the only time it can be seen. Raises ConfigError for unknown scopes."""
        wanted = tuple(dict.fromkeys(scopes))
        for scope in wanted:
            if scope not in SCOPES:
                raise ConfigError(f"there is no scope {scope!r}", hint=nearest(scope, SCOPES))
        text = PREFIX + secrets.token_urlsafe(32)
        key = Key(f"key-{secrets.token_hex(4)}", _hash(text), text[: len(PREFIX) + 4], name, wanted, int(time.time()))
        self._change(lambda keys: [*keys, key])
        return text, key

    def revoke(self, key_id: str) -> None:
        """Remove a key of the file. Raises NotFoundError when there is none of that id."""
        known = [key.key_id for key in self._stored()]
        if key_id not in known:
            raise NotFoundError(f"there is no key {key_id!r}", hint=nearest(key_id, known))
        self._change(lambda keys: [key for key in keys if key.key_id != key_id])

    def _change(self, change: Callable[[list[Key]], list[Key]]) -> None:
        assert self.path is not None
        with hold(self.path.with_name(f".{self.path.name}"), "the list of keys", wait=True):
            write_json(self.path, {"keys": [vars(key) for key in change(self._stored())]})
            self.path.chmod(0o600)

    def _stored(self) -> list[Key]:
        if self.path is None:
            return []
        try:
            facts = self.path.stat()
        except FileNotFoundError:
            return []
        stamp = (facts.st_mtime_ns, facts.st_size)
        if self._read[0] != stamp:
            self._read = (stamp, _parse(self.path))
        return self._read[1]


def keys_path() -> Path:
    """Where `tailor keys` keeps them."""
    return home() / "keys.json"


def _parse(path: Path) -> list[Key]:
    try:
        rows = json.loads(path.read_text("utf-8"))["keys"]
        return [Key(**{**row, "scopes": tuple(row["scopes"])}) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no list of API keys: {error}", hint="restore it, or move it away") from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def scope_of(method: str, path: str) -> str | None:
    """What a key must have for this route; None when no key is needed."""
    if path in OPEN_PATHS:
        return None
    if method == "DELETE" and path.startswith("/v1/models"):
        return "admin"
    return next((scope for start, scope in _SCOPE_OF_PATH if path.startswith(start)), "inference")


def authenticate(ring: KeyRing, scope: str | None, headers: Mapping[str, str]) -> Principal:
    """Who asks. Raises ApiError 401 without a valid key, 403 when the key has not the scope."""
    if scope is None or not ring.keys():
        return ANYBODY
    scheme, _, token = headers.get("authorization", "").partition(" ")
    text = token.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")
    if not text:
        raise _unauthorized("You didn't provide an API key: send it as `Authorization: Bearer KEY`.")
    principal = ring.find(text)
    if principal is None:
        raise _unauthorized("Incorrect API key provided.")
    if not principal.may(scope):
        raise ApiError(403, f"This API key lacks the scope {scope!r}.", code="insufficient_scope")
    return principal


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def check_address(settings: ServerSettings, ring: KeyRing) -> None:
    """Raise ConfigError for an address that others can reach while nobody needs a key."""
    if not settings.is_local and not ring.keys():
        raise ConfigError(
            f"{settings.host} can be reached from other machines, and no API key is set",
            hint="give --api-key (or TAILOR_API_KEY), create one with `tailor keys create`, or listen on 127.0.0.1",
        )


def check_host(settings: ServerSettings, has_keys: bool, headers: Mapping[str, str]) -> None:
    """Refuse (403) what a page in somebody's browser may send: a foreign Host (DNS rebinding) or Origin.

    Without keys only this machine's own names will do; with keys any Host will unless `allowed_hosts` says which.
    """
    host = _name(f"//{headers.get('host', '')}")
    allowed = {name.lower() for name in settings.allowed_hosts}
    trusted = has_keys if not allowed else "*" in allowed
    if not (trusted or host in allowed or is_loopback(host) or host == settings.host.lower()):
        raise ApiError(
            403,
            f"This server does not answer for the host {host!r}; allowed_hosts can name it.",
            code="host_not_allowed",
        )
    origin = headers.get("origin")
    if origin is None or origin in settings.cors_origins or "*" in settings.cors_origins:
        return
    if urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        raise ApiError(403, "Pages of this origin may not call; cors_origins can name it.", code="origin_not_allowed")


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:  # an address in brackets that is none
        return ""


class RateLimiter:
    """A bucket of requests per key, filled evenly over the minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key_id: str) -> dict[str, str]:
        """Count one request; returns the limit headers. Raises ApiError 429 when the bucket is empty."""
        now, rate = self._clock(), self.per_minute / 60
        left, since = self._buckets.get(key_id, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - since) * rate)
        taken = left >= 1
        left -= taken
        self._buckets[key_id] = (left, now)
        headers = {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(int(left)),
            "x-ratelimit-reset-requests": duration((self.per_minute - left) / rate),
        }
        if taken:
            return headers
        wait = math.ceil((1 - left) / rate)
        raise ApiError(
            429,
            f"Rate limit reached: {self.per_minute} requests per minute. Please try again in {wait}s.",
            code="rate_limit_exceeded",
            headers={**headers, "retry-after": str(wait)},
        )


def duration(seconds: float) -> str:
    """Seconds as OpenAI's headers write them.

    >>> duration(0.02), duration(7), duration(360)
    ('20ms', '7s', '6m0s')
    """
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def describe(key: Key) -> dict[str, Any]:
    """A key for people to look at: no hash."""
    return {"id": key.key_id, "starts": key.start, "name": key.name, "scopes": list(key.scopes), "created": key.created}
