"""Hosted models by name, `openai:MODEL@URL`: where they are, with which key, and what goes wrong there in our words.

What belongs to an endpoint and not to a model (the key's variable, concurrency, prices) stands in
`TAILOR_HOME/hosted.yaml`; keys themselves are only ever read from the environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from tailor.config import Strict, load_recipe
from tailor.errors import (
    AuthError,
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    OverloadedError,
    ResourceError,
    TailorError,
    require,
)
from tailor.models.files import HOSTED_PREFIX, is_hosted
from tailor.runs import home

DEFAULT_URL = "https://api.openai.com/v1"
KEY = "OPENAI_API_KEY"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Servers there may do without a key."""

_CONTEXT = re.compile(r"(?i)context[ _-]?(length|window|size)|maximum context|too many tokens|prompt is too long")
_NAME = re.compile(rf"{HOSTED_PREFIX}(?P<model>\S+?)(?:@(?P<url>https?://\S+))?")


class Prices(Strict):
    """What a model costs, in US dollars per million tokens."""

    prompt: float = Field(ge=0, description="of a prompt")
    cached: float | None = Field(None, ge=0, description="of a prompt and known already; as others when not given")
    completion: float = Field(ge=0, description="of an answer")


class EndpointSettings(Strict):
    """How one endpoint is used."""

    key: str = Field(KEY, description="the environment variable that holds the key")
    concurrency: int = Field(8, ge=1, le=256, description="requests under way at once")
    max_retries: int = Field(5, ge=0, description="after errors that may pass; waits as long as the endpoint says")
    timeout: float = Field(600.0, gt=0, description="seconds to wait for an answer")
    embedding_model: str | None = Field(None, description="what chooses shots by embedding, there")
    prices: dict[str, Prices] = Field({}, description="by model")


class HostedSettings(Strict):
    """`hosted.yaml`: settings by the endpoint's URL."""

    endpoints: dict[str, EndpointSettings] = Field({}, description="settings by URL")


@dataclass(frozen=True)
class Endpoint:
    """A model at a place. `settings` are the place's; the key is read from the environment when it is needed."""

    model: str
    url: str = DEFAULT_URL
    settings: EndpointSettings = field(default_factory=EndpointSettings)

    @property
    def name(self) -> str:
        """How it is spelled everywhere: holds the URL unless it is OpenAI's."""
        return f"{HOSTED_PREFIX}{self.model}" + ("" if self.url == DEFAULT_URL else f"@{self.url}")

    @property
    def root(self) -> str:
        """The server itself, where routes beside the OpenAI protocol are."""
        return self.url.removesuffix("/v1")

    @property
    def prices(self) -> Prices | None:
        """What the model costs, when the settings say so."""
        return self.settings.prices.get(self.model)

    def of(self, model: str) -> Endpoint:
        """Another model at the same place."""
        return replace(self, model=model)

    def client(self) -> Any:
        """The official client. Raises MissingDependencyError, and AuthError when there is no key."""
        openai = require("openai", "hosted")
        settings = self.settings
        return openai.OpenAI(
            api_key=self._key(), base_url=self.url, max_retries=settings.max_retries, timeout=settings.timeout
        )

    def _key(self) -> str:
        if key := os.environ.get(self.settings.key):
            return key
        if urlsplit(self.url).hostname in LOCAL_HOSTS:
            return "none"  # the client wants one
        raise AuthError(
            f"there is no key for {self.url}: {self.settings.key} is not set",
            hint=f"export {self.settings.key}=…, or name another variable in {home() / 'hosted.yaml'}",
        )

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what the client raises inside the block as errors of ours, the key taken out of their messages."""
        openai = require("openai", "hosted")
        try:
            yield
        except openai.OpenAIError as error:
            raise self.explained(error) from None  # the chain would show the message with the key

    def explained(self, error: Any) -> TailorError:
        """The client's error as one of ours."""
        openai = require("openai", "hosted")
        told = self._told(error)
        if isinstance(error, openai.APITimeoutError):
            waited = f"{self.url} did not answer within {self.settings.timeout:g} s"
            return OverloadedError(waited, hint="try again later, or raise the endpoint's timeout in hosted.yaml")
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return NotFoundError(f"{self.url} cannot be reached: {cause}", hint="check the URL; it mostly ends in /v1")
        status = getattr(error, "status_code", None)
        if status == 400 and self._is_context(error):
            return ResourceError(told, hint="shorten the prompt, use fewer shots, or ask for a shorter answer")
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            return ResourceError(told, hint="the account has no credit left: see the provider's billing page")
        if status in (429, 503, 529):
            asked = error.response.headers.get("retry-after")
            wait = f"wait {asked} s (the endpoint's word)" if asked else "wait"
            return OverloadedError(told, hint=f"{wait}, or lower the endpoint's concurrency in hosted.yaml")
        return self._by_status(status, told, error)

    def _by_status(self, status: int | None, told: str, error: Any) -> TailorError:
        kinds: Mapping[int | None, tuple[type[TailorError], str | None]] = {
            400: (DataError if getattr(error, "param", None) in (None, "messages", "prompt") else ConfigError, None),
            401: (AuthError, f"check the key in {self.settings.key}"),
            402: (ResourceError, "the account has no credit left: see the provider's billing page"),
            403: (AuthError, f"the key in {self.settings.key} may not do this"),
            404: (NotFoundError, f"is {self.model!r} a model of {self.url}? The URL mostly ends in /v1"),
            409: (ConflictError, None),
            413: (ResourceError, None),
            422: (DataError, None),
        }
        kind, hint = kinds.get(status, (TailorError, None))
        return kind(told, hint=hint)

    @staticmethod
    def _is_context(error: Any) -> bool:
        return error.code == "context_length_exceeded" or bool(_CONTEXT.search(str(error.message)))

    def _told(self, error: Any) -> str:
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, dict) else None
        text = f"{self.name}: {message or getattr(error, 'message', None) or error}"
        key = os.environ.get(self.settings.key)
        request = getattr(error, "request_id", None)
        return (text.replace(key, "…") if key else text) + (f" (request {request})" if request else "")


def hosted_endpoint(name: str, *, foreign: bool = False) -> Endpoint:
    """The endpoint of `openai:MODEL@URL`, or of `openai:MODEL` at OPENAI_BASE_URL or OpenAI itself.

    A name of `foreign` origin (an artifact that somebody else made) gets no key unless the user's settings or
    environment name its URL. Raises ConfigError for what is no such name, AuthError for a foreign place.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"{name!r} names no hosted model", hint=f"write {HOSTED_PREFIX}MODEL@https://HOST/v1")
    own = (os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
    url = (match["url"] or own).rstrip("/")
    _check_url(url)
    path = home() / "hosted.yaml"
    found = load_recipe(path, HostedSettings).recipe.endpoints if path.is_file() else {}
    places = {place.rstrip("/"): settings for place, settings in found.items()}
    is_local = urlsplit(url).hostname in LOCAL_HOSTS
    known = url in (own, DEFAULT_URL) or url in places or is_local
    if foreign and not known:
        raise AuthError(
            f"an artifact from elsewhere asks for {url}, and would be given your key",
            hint=f"if you trust it, name the URL under endpoints in {path}",
        )
    return Endpoint(match["model"], url, places.get(url, EndpointSettings()))


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigError(
            f"the URL of a hosted model is a plain one, without user, password or query (host {parts.hostname})",
            hint=f"keys belong into the environment: {KEY}, or the variable that hosted.yaml names",
        )
    if not parts.hostname:
        raise ConfigError(f"{url!r} has no host", hint="write https://HOST/v1")


__all__ = ["Endpoint", "EndpointSettings", "HostedSettings", "Prices", "hosted_endpoint", "is_hosted"]
