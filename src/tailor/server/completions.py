"""POST /v1/completions: texts and token arrays continued as they stand, echoed with logprobs (for lm-eval)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tailor.inference.backend import Completion, FinishReason, Request, TokenLogprob
from tailor.server import responses
from tailor.server.answers import Fingerprints, TextLogprobs, headers_of, new_id, now, usage_of
from tailor.server.errors import invalid, unsupported
from tailor.server.protocol import CompletionRequest
from tailor.server.settings import ServerSettings
from tailor.server.stream import EventStream, Stopping, collect, completions_of, interleaved, open_all, while_connected
from tailor.server.translate import asked, check_count, check_ids, sampling_of, structure_of, task_of, variants, words

if TYPE_CHECKING:
    from tailor.inference.service import Service
    from tailor.inference.streams import Stream

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"model": responses.TextCompletion, "content": {"text/event-stream": {"schema": {"type": "string"}}}},
}

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


@dataclass(frozen=True)
class Prompt:
    """A text as its tokens, and as it is echoed: without the first `num_unseen` characters of the tokens."""

    text: str
    token_ids: tuple[int, ...]
    given: str | tuple[int, ...]
    num_unseen: int = 0


@dataclass
class Texts:
    """One request, read and checked. `requests` are prompt-major: all of the first prompt, then of the second."""

    body: CompletionRequest
    prompts: list[Prompt]
    requests: list[Request]
    per_prompt: int
    fingerprint: str = ""
    completion_id: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=now)

    @property
    def num_answers(self) -> int:
        """To return for each prompt; `per_prompt` may be more, of which the best are taken."""
        return self.body.n or 1

    def prompt_of(self, index: int) -> Prompt:
        """That of a choice."""
        return self.prompts[index // self.num_answers]


async def read(service: Service, settings: ServerSettings, body: CompletionRequest) -> Texts:
    """Check everything that can be known before the engine is asked. Raises ApiError, NotFoundError."""
    await service.warm(body.model)
    if body.suffix is not None:
        raise unsupported("suffix", "models here continue texts; they do not fill gaps.")
    per_prompt = max(body.best_of or 1, body.n or 1)
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise invalid("best_of", f"best_of ({body.best_of}) must be at least n ({body.n}).")
    if body.stream and per_prompt > (body.n or 1):
        raise invalid("best_of", "The best of several answers is known at the end: it cannot be streamed.")
    prompts = await _prompts(service, body)
    check_count(len(prompts) * per_prompt, settings.max_choices, "prompt" if len(prompts) > 1 else "n")
    longest = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = sampling_of(service, body, max(longest, 1), body.logprobs or 0, structure_of(body))
    echo = bool(body.echo) and body.logprobs is not None
    task = task_of(body.tailor)
    wanted = [Request((), sampling=sampling, task=task, prompt=prompt.given, echo=echo) for prompt in prompts]
    return Texts(body, prompts, [each for one in wanted for each in variants(one, per_prompt)], per_prompt)


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    given = body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    return [await _prompt(service, body, each) for each in several]


async def _prompt(service: Service, body: CompletionRequest, given: str | list[int]) -> Prompt:
    """Token arrays are checked against the vocabulary; a text is tokenised here only to tell its logprobs."""
    if isinstance(given, list):
        check_ids(service, body.model, given, "prompt")
        return Prompt(await service.detokenize(body.model, given) if body.echo else "", tuple(given), tuple(given))
    if not body.echo or body.logprobs is None:
        return Prompt(given, (), given)
    ids = words(service, body.model, await service.tokenize(body.model, asked((), prompt=given)))
    spelled = b"".join(service.token_bytes(body.model, token_id) for token_id in ids).decode("utf-8", "replace")
    return Prompt(given, tuple(ids), tuple(ids), len(spelled) - len(given) if spelled.endswith(given) else 0)


def completions_router(service: Service, settings: ServerSettings, stopping: Stopping) -> APIRouter:
    """The route of text completions."""
    router, fingerprints = APIRouter(tags=["inference"]), Fingerprints(service)

    @router.post("/v1/completions", responses=STREAMED, response_class=JSONResponse)
    async def create_completion(body: CompletionRequest, request: HttpRequest) -> Response:
        """Continue one or several texts or token arrays. With `stream` as server-sent events."""
        texts, headers = await read(service, settings, body), headers_of(body.model)
        texts.fingerprint = fingerprints.of(body.model)
        opening = open_all(service, body.model, texts.requests, "prompt")
        streams = await while_connected(request, stopping, opening)
        if body.stream:
            return EventStream(_events(service, texts, streams), stopping, settings.heartbeat, headers)
        completions = await while_connected(request, stopping, collect(streams))
        return JSONResponse(_answer(service, texts, completions).to_dict(), headers=headers)

    return router


def _answer(service: Service, texts: Texts, completions: Sequence[Completion]) -> responses.TextCompletion:
    chosen: list[Completion] = []
    for start in range(0, len(completions), texts.per_prompt):
        chosen += _best(completions[start : start + texts.per_prompt], texts.num_answers)
    choices = [_whole(service, texts, index, completion) for index, completion in enumerate(chosen)]
    return _made(texts, choices, _usage(texts, completions))


def _best(completions: Sequence[Completion], count: int) -> list[Completion]:
    """Those with the highest logprob per token, best first; all in their order when none is to be left out."""
    if len(completions) == count:
        return list(completions)
    return sorted(completions, key=lambda c: -sum(c.logprobs) / max(len(c.logprobs), 1))[:count]


def _whole(service: Service, texts: Texts, index: int, completion: Completion) -> responses.TextChoice:
    choice = _Choice(service, texts, index)
    opening = choice.opening(completion.prompt_tokens)
    return choice.piece(opening, completion.text, completion.tokens, completion.finish_reason)


class _Choice:
    """One continuation as it grows."""

    def __init__(self, service: Service, texts: Texts, index: int) -> None:
        self.index = index
        self.prompt = texts.prompt_of(index)
        self.echo = bool(texts.body.echo)
        self.opened = False
        self.silent = texts.body.max_tokens == 0
        count = texts.body.logprobs
        self.logprobs = (
            None if count is None else TextLogprobs(service, texts.body.model, count, self.prompt.num_unseen)
        )

    def opening(self, prompt_tokens: Sequence[TokenLogprob | None]) -> responses.TextChoice | None:
        """The echoed prompt."""
        self.opened = True
        if not self.echo:
            return None
        told = None if self.logprobs is None else self.logprobs.of(self.prompt.token_ids, prompt_tokens)
        return responses.TextChoice(index=self.index, text=self.prompt.text, logprobs=told, finish_reason=None)

    def piece(
        self,
        before: responses.TextChoice | None,
        text: str,
        tokens: Sequence[TokenLogprob],
        finish_reason: FinishReason | None,
    ) -> responses.TextChoice:
        """The next piece, behind `before`. Nothing of it is told when no token was asked for."""
        if self.silent:
            text, tokens = "", ()
        told = None if self.logprobs is None else self.logprobs.of([token.token_id for token in tokens], tokens)
        if before is not None:
            text = before.text + text
            told = None if told is None or before.logprobs is None else _joined(before.logprobs, told)
        reason = "length" if self.silent and finish_reason is not None else finish_reason
        return responses.TextChoice(index=self.index, text=text, logprobs=told, finish_reason=reason)


def _joined(one: responses.TextLogprobs, other: responses.TextLogprobs) -> responses.TextLogprobs:
    return responses.TextLogprobs(
        tokens=one.tokens + other.tokens,
        token_logprobs=one.token_logprobs + other.token_logprobs,
        top_logprobs=one.top_logprobs + other.top_logprobs,
        text_offset=one.text_offset + other.text_offset,
    )


def _usage(texts: Texts, completions: Sequence[Completion]) -> responses.Usage:
    """Each prompt counts once, whatever n and best_of are."""
    firsts = completions[:: texts.per_prompt]
    said = 0 if texts.body.max_tokens == 0 else sum(completion.num_sampled_tokens for completion in completions)
    prompts, cached = sum(c.num_prompt_tokens for c in firsts), sum(c.num_cached_tokens for c in firsts)
    return usage_of(prompts, said, cached)


def _made(texts: Texts, choices: list[responses.TextChoice], usage: responses.Usage | None) -> responses.TextCompletion:
    made = responses.TextCompletion(
        id=texts.completion_id,
        object="text_completion",
        created=texts.created,
        model=texts.body.model,
        system_fingerprint=texts.fingerprint,
        choices=choices,
    )
    if usage is not None:
        made.usage = usage
    return made


async def _events(service: Service, texts: Texts, streams: Sequence[Stream]) -> AsyncGenerator[str, None]:
    """The chunks as JSON text; with `include_usage` the usage at the end."""
    options = texts.body.stream_options
    with_usage = options is not None and bool(options.include_usage)

    def chunk(*choices: responses.TextChoice) -> str:
        made = _made(texts, list(choices), None)
        return (made.model_copy(update={"usage": None}) if with_usage else made).event()

    growing = [_Choice(service, texts, index) for index in range(len(streams))]
    try:
        async with aclosing(interleaved(streams)) as pieces:
            async for index, piece in pieces:
                choice, opening = growing[index], None
                if not choice.opened:  # an echoed prompt's logprobs are known from the first piece on
                    opening = choice.opening(streams[index].prompt_tokens)
                made = choice.piece(opening, piece.text, piece.tokens, piece.finish_reason)
                if made.text or made.finish_reason or (made.logprobs and made.logprobs.tokens):
                    yield chunk(made)
        if with_usage:
            yield _made(texts, [], _usage(texts, completions_of(streams))).event()
    finally:
        for stream in streams:
            stream.cancel()
