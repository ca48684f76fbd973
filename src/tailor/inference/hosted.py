"""The hosted backend: a model behind an OpenAI-compatible endpoint, asked through the official client.

Prompting is composed on our side; what needs the base's weights or its tokens is refused with the reason. Requests run
in a bounded number of threads, the client tries again what may pass (and waits as long as it is told), and what was
used is counted.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from tailor.errors import ConfigError, DataError, NotFoundError, TailorError, nearest
from tailor.inference.backend import Completion, Request
from tailor.inference.hosted_endpoint import Endpoint
from tailor.inference.hosted_protocol import Wire, answer_text, chat_turn, content_text, finish_of, logprobs_of
from tailor.inference.hosted_score import Scorer
from tailor.inference.hosted_usage import Usage
from tailor.inference.votes import generate_with_votes
from tailor.metrics.answers import extract_answer
from tailor.metrics.votes import Votes
from tailor.models.slots import Compose
from tailor.techniques.prompting import Prompting
from tailor.text.messages import Message

EMBEDDED_AT_ONCE = 128
"""Texts per request for embeddings (the protocol allows 2,048)."""

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class HostedCompletion(Completion):
    """An answer of a hosted model: its token ids are not known, `num_tokens` is what the endpoint counted."""

    num_tokens: int | None = None


@dataclass(frozen=True)
class HostedCustomization:
    """What a request can name: a prompt around the base, or a model that was tuned at the same place."""

    model: str | None = None
    prompting: Prompting | None = None


class HostedBackend:
    """Generates with a hosted model. `usage` counts, `notes` say what the endpoint would not do as asked."""

    def __init__(self, endpoint: Endpoint, customizations: Mapping[str, HostedCustomization] | None = None) -> None:
        self.endpoint = endpoint
        self.customizations = dict(customizations or {})
        self.usage = Usage(endpoint.prices)
        self.wire = Wire(endpoint)
        self._composers: dict[str, Compose] = {}

    @cached_property
    def client(self) -> Any:
        """The official client, made when something is asked for the first time."""
        return self.endpoint.client()

    @property
    def notes(self) -> list[str]:
        """What a reader of the answers must know."""
        return self.wire.notes

    def customization(self, artifact: str | None) -> HostedCustomization:
        """What the name stands for. Raises NotFoundError when there is none of that name."""
        if artifact is None:
            return HostedCustomization()
        if artifact not in self.customizations:
            hint = nearest(artifact, self.customizations)
            raise NotFoundError(f"no customization {artifact!r} of {self.endpoint.name} is known", hint=hint)
        return self.customizations[artifact]

    def answer_pattern(self, artifact: str | None) -> str | None:
        """What reads the answer out of a chain of thought; None where the whole text is the answer."""
        prompting = self.customization(artifact).prompting
        return prompting.pattern if prompting is not None else None

    def messages(self, request: Request) -> tuple[Message, ...]:
        """The turns the endpoint is shown: composed by the prompting, if the request names one."""
        prompting = self.customization(request.artifact).prompting
        if request.artifact is None or prompting is None:
            return request.messages
        compose = self._composers.get(request.artifact)
        if compose is None:
            embedding = self.endpoint.settings.embedding_model
            embed = HostedBackend(self.endpoint.of(embedding)).embed if embedding else None
            compose = self._composers[request.artifact] = prompting.composer(embed)
        return compose(request.messages)

    def model(self, artifact: str | None) -> str:
        """The model that is asked."""
        return self.customization(artifact).model or self.endpoint.model

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion per request, in order; `progress` is told how many are there.

        The first error that the client's tries do not mend ends it; what was answered by then is counted in `usage`.
        """

        def votes(request: Request) -> Votes | None:
            prompting = self.customization(request.artifact).prompting
            return None if prompting is None else prompting.voting

        return generate_with_votes(self._generate, requests, votes, progress)

    def _generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        return in_threads(self._answer, requests, self.endpoint.settings.concurrency, progress)

    def _answer(self, request: Request) -> Completion:
        with self.endpoint.errors():
            raw = self.wire.sent(lambda: self._send(request), request.sampling)
            found = raw.parse()
        choice = self._only_choice(found)
        usage = getattr(found, "usage", None)
        self.usage.add(usage, retries=getattr(raw, "retries_taken", 0), headers=raw.headers)
        text = answer_text(choice)
        for stop in request.sampling.stop:  # more of them than the protocol takes, and endpoints that ignore them
            text = text.split(stop)[0]
        pattern = self.answer_pattern(request.artifact)
        finish = getattr(choice, "finish_reason", None)
        if finish == "content_filter":
            self.wire.note(f"{self.endpoint.name} held back answers (content_filter)")
        return HostedCompletion(
            text=text,
            token_ids=(),
            logprobs=logprobs_of(choice),
            finish_reason=finish_of(finish),
            num_prompt_tokens=getattr(usage, "prompt_tokens", None) or 0,
            answer=text if pattern is None else extract_answer(text, pattern) or "",
            num_tokens=getattr(usage, "completion_tokens", None),
        )

    def _send(self, request: Request) -> Any:
        model, how = self.model(request.artifact), self.wire.arguments(request)
        if request.prompt is not None:
            prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
            return self.client.completions.with_raw_response.create(model=model, prompt=prompt, **how)
        turns = [chat_turn(message) for message in self.messages(request)]
        return self.client.chat.completions.with_raw_response.create(model=model, messages=turns, **how)

    def _only_choice(self, found: Any) -> Any:
        """The first choice. Raises TailorError for a body without one: some gateways put errors there."""
        choices = getattr(found, "choices", None)
        if choices:
            return choices[0]
        error = getattr(found, "error", None)
        if isinstance(error, dict) and error.get("message"):
            raise TailorError(f"{self.endpoint.name}: {error['message']}")
        raise TailorError(
            f"{self.endpoint.name} sent no answer in OpenAI's format", hint="check the URL; it mostly ends in /v1"
        )

    def stream(self, request: Request) -> Iterator[str]:
        """The answer's text in pieces as they come. An error in the middle raises after the pieces before it."""
        turns = [chat_turn(message) for message in self.messages(request)]
        model = self.model(request.artifact)

        def send() -> Any:
            how = self.wire.arguments(request)
            return self.client.chat.completions.create(model=model, messages=turns, stream=True, **how)

        usage = None
        with self.endpoint.errors():
            for chunk in self.wire.sent(send, request.sampling):
                usage = getattr(chunk, "usage", None) or usage
                for choice in (getattr(chunk, "choices", None) or ())[:1]:
                    if piece := content_text(getattr(choice.delta, "content", None)):
                        yield piece
        self.usage.add(usage)

    @cached_property
    def scorer(self) -> Scorer:
        """Logprobs of given texts, where the endpoint has them."""
        return Scorer(self.endpoint, self.client, self.usage)

    def logprobs(self, requests: Sequence[Request], completions: Sequence[str]) -> list[Tensor]:
        """Logprobs of each completion's tokens (end-of-turn token included) after its request, one (n,) per pair.

        Raises ConfigError with the reason where the endpoint cannot tell them.
        """
        if reason := self.unscored:
            raise ConfigError(reason)
        pairs = list(zip(requests, completions, strict=True))

        def score(pair: tuple[Request, str]) -> Tensor:
            request, completion = pair
            model, turns = self.model(request.artifact), [chat_turn(turn) for turn in self.messages(request)]
            return self.scorer.logprobs(model, turns, completion, request.tools)

        return in_threads(score, pairs, self.endpoint.settings.concurrency)

    @property
    def unscored(self) -> str | None:
        """Why the endpoint gives no logprobs of given texts; None when it does. Asked of it once."""
        return self.scorer.obstacle

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(num_texts, hidden) unit vectors of the endpoint's embedding model. Raises DataError for an empty text."""
        if empty := [k for k, text in enumerate(texts) if not text]:
            raise DataError(f"text {empty[0]} is empty, so it has no embedding")
        parts = [list(texts[k : k + EMBEDDED_AT_ONCE]) for k in range(0, len(texts), EMBEDDED_AT_ONCE)]
        rows = in_threads(self._embedded, parts, self.endpoint.settings.concurrency)
        if not rows:
            return torch.empty(0, 0)
        return torch.nn.functional.normalize(torch.cat(rows), dim=1)

    def _embedded(self, texts: list[str]) -> Tensor:
        with self.endpoint.errors():
            found = self.client.embeddings.create(model=self.endpoint.model, input=texts)
        data = sorted(getattr(found, "data", None) or (), key=lambda item: item.index)
        if len(data) != len(texts):
            raise TailorError(f"{self.endpoint.name} sent {len(data)} embeddings of {len(texts)} texts")
        self.usage.add(getattr(found, "usage", None))
        return torch.tensor([item.embedding for item in data], dtype=torch.float32)


def in_threads(
    work: Callable[[Item], Found], items: Sequence[Item], threads: int, progress: Callable[[int], None] | None = None
) -> list[Found]:
    """`work` on every item, in order, by so many threads. The first error stops the others' next items and is raised.

    The threads are daemons: after Ctrl-C nobody waits for a slow endpoint.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Found | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for k in range(len(items)):
        waiting.put(k)

    def run() -> None:
        while not stopped.is_set():
            try:
                k = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((k, work(items[k]), None))
            except BaseException as error:
                done.put((k, None, error))

    for _ in range(min(threads, len(items))):
        threading.Thread(target=run, daemon=True).start()
    found: dict[int, Any] = {}
    try:
        while len(found) < len(items):
            k, value, error = done.get()
            if error is not None:
                raise _counted(error, len(found), len(items))
            found[k] = value
            if progress is not None:
                progress(len(found))
    finally:
        stopped.set()
    return [found[k] for k in range(len(items))]


def _counted(error: BaseException, done: int, total: int) -> BaseException:
    """The error, saying how many of several requests were answered before."""
    if isinstance(error, TailorError) and total > 1:
        return type(error)(f"{error.message} ({done} of {total} requests were answered)", hint=error.hint)
    return error
