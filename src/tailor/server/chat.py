"""POST /v1/chat/completions: whole or streamed, n answers, tools, structure, logprobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from tailor.inference.backend import Completion, Request, TokenLogprob
from tailor.server import responses
from tailor.server.answers import ChatLogprobs, Fingerprints, headers_of, new_id, now, usage_of
from tailor.server.errors import unsupported
from tailor.server.protocol import ChatRequest
from tailor.server.settings import ServerSettings
from tailor.server.stream import EventStream, Stopping, collect, completions_of, interleaved, open_all, while_connected
from tailor.server.tool_calls import Call, CallReader
from tailor.server.translate import (
    Toolbox,
    asked,
    check_count,
    ignored_of,
    messages_of,
    sampling_of,
    structure_of,
    task_of,
    toolbox_of,
    variants,
)

if TYPE_CHECKING:
    from tailor.inference.service import Service
    from tailor.inference.streams import Stream

Record = Callable[[Mapping[str, Any]], None]
"""Takes {"request", "response", "principal"} of a chat that is to be kept. Called in a thread: it may write files."""

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"model": responses.ChatCompletion, "content": {"text/event-stream": {"schema": {"type": "string"}}}},
}


@dataclass
class Chat:
    """One request, read and checked."""

    body: ChatRequest
    tools: Toolbox
    requests: list[Request]
    ignored: list[str]
    fingerprint: str = ""
    chat_id: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=now)

    @property
    def model(self) -> str:
        """As it was asked for."""
        return self.body.model

    @property
    def top_logprobs(self) -> int | None:
        """How many alternatives to tell; None: no logprobs at all."""
        return (self.body.top_logprobs or 0) if self.body.logprobs else None


async def read(service: Service, settings: ServerSettings, body: ChatRequest, *, records: bool) -> Chat:
    """Check everything that can be known before the engine is asked. Raises ApiError, NotFoundError."""
    await service.warm(body.model)
    check_count(body.n or 1, settings.max_choices, "n")
    ignored = ignored_of(body)
    if body.reasoning_effort is not None and not service.takes_effort(body.model):
        ignored.append("reasoning_effort")
    if body.store and not records:
        ignored.append("store")
    tools, structure = toolbox_of(body), structure_of(body)
    request = asked(
        messages_of(body.messages), tools=tools.schemas, task=task_of(body.tailor), effort=body.reasoning_effort
    )
    longest = body.max_completion_tokens or body.max_tokens or await _room(service, body.model, request)
    if tools.functions:
        await _check_template(service, body.model, request)
    sampling = sampling_of(service, body, longest, body.top_logprobs or 0, tools.structure() or structure)
    return Chat(body, tools, variants(replace(request, sampling=sampling), body.n or 1), ignored)


async def _room(service: Service, model: str, request: Request) -> int:
    """The tokens that the context leaves for the answer."""
    return max(1, service.context(model) - len(await service.tokenize(model, request)))


async def _check_template(service: Service, model: str, request: Request) -> None:
    """Raise ApiError 400 when the tools leave no trace in the prompt: they would be ignored without a word."""
    with_tools = await service.tokenize(model, request)
    if with_tools == await service.tokenize(model, replace(request, tools=())):
        raise unsupported("tools", f"the chat template of {model} has no place for tools.")


def chat_router(
    service: Service, settings: ServerSettings, stopping: Stopping, record: Record | None = None
) -> APIRouter:
    """The route of chat completions; `record` is told of chats sent with `store` (or of all, by the settings)."""
    router, fingerprints = APIRouter(tags=["inference"]), Fingerprints(service)

    @router.post("/v1/chat/completions", responses=STREAMED, response_class=JSONResponse)
    async def create_chat_completion(body: ChatRequest, request: HttpRequest) -> Response:
        """Answer a conversation. With `stream` the answer comes as server-sent events."""
        chat = await read(service, settings, body, records=record is not None)
        chat.fingerprint = fingerprints.of(chat.model)
        kept = record if record is not None and (body.store or settings.record_all) else None
        headers = headers_of(chat.model, chat.ignored)
        principal = request.state.principal

        async def keep(answer: responses.ChatCompletion) -> None:
            if kept is not None:
                asked = body.model_dump(by_alias=True, exclude_unset=True)
                told = {"request": asked, "response": answer.to_dict(), "principal": principal.key_id}
                await asyncio.to_thread(kept, told)

        opening = open_all(service, chat.model, chat.requests, "messages")
        streams = await while_connected(request, stopping, opening)
        if body.stream:
            return EventStream(_events(service, chat, streams, keep), stopping, settings.heartbeat, headers)
        completions = await while_connected(request, stopping, collect(streams))
        answer = _answer(service, chat, completions)
        await keep(answer)
        return JSONResponse(answer.to_dict(), headers=headers)

    return router


class _Choice:
    """One answer as it grows: its text, its calls, its logprobs."""

    def __init__(self, service: Service, chat: Chat, index: int) -> None:
        self.index = index
        self.legacy = chat.tools.legacy
        self.reader = CallReader(chat.tools.names, parallel=chat.body.parallel_tool_calls is not False)
        top = chat.top_logprobs
        self.logprobs = None if top is None else ChatLogprobs(service, chat.model, top)
        self.text = ""
        self.told_calls = 0
        self.told_logprobs: list[responses.TokenLogprob] = []
        self._held: list[responses.TokenLogprob] = []
        self.finish_reason: Literal["stop", "length", "tool_calls", "function_call"] = "stop"

    def add(self, text: str, tokens: Sequence[TokenLogprob], finish_reason: str | None) -> tuple[str, list[Call]]:
        """Take a piece; returns the text and the calls to show now."""
        last = finish_reason is not None
        if self.logprobs is not None:
            self._held += self.logprobs.of(text, tokens, last=last).content or ()
        shown = self.reader.feed(text) + (self.reader.finish() if last else "")
        self.text += shown
        calls, self.told_calls = self.reader.calls[self.told_calls :], len(self.reader.calls)
        if last:
            called: Literal["tool_calls", "function_call"] = "function_call" if self.legacy else "tool_calls"
            plain: Literal["stop", "length"] = "length" if finish_reason == "length" else "stop"
            self.finish_reason = called if self.reader.calls else plain
        return shown, calls

    def take_logprobs(self) -> responses.ChatLogprobs | None:
        """Those of the tokens since the last time; None when nobody asked."""
        if self.logprobs is None:
            return None
        held, self._held = self._held, []
        self.told_logprobs += held
        return responses.ChatLogprobs(content=held, refusal=None)

    def whole(self) -> responses.ChatChoice:
        """The finished choice."""
        self.take_logprobs()
        calls = self.reader.calls
        content = self.text if self.text or not calls else None
        message = responses.AnswerMessage(role="assistant", content=content, refusal=None, annotations=[])
        if calls and self.legacy:
            message.function_call = responses.CalledFunction(name=calls[0].name, arguments=calls[0].arguments)
        elif calls:
            message.tool_calls = [_called(call) for call in calls]
        told = None if self.logprobs is None else responses.ChatLogprobs(content=self.told_logprobs, refusal=None)
        return responses.ChatChoice(index=self.index, message=message, finish_reason=self.finish_reason, logprobs=told)


def _called(call: Call) -> responses.CalledTool:
    function = responses.CalledFunction(name=call.name, arguments=call.arguments)
    return responses.CalledTool(id=call.call_id, type="function", function=function)


def _answer(service: Service, chat: Chat, completions: Sequence[Completion]) -> responses.ChatCompletion:
    choices = []
    for index, completion in enumerate(completions):
        choice = _Choice(service, chat, index)
        choice.add(completion.text, completion.tokens, completion.finish_reason)
        choices.append(choice)
    return _whole(chat, choices, completions)


def _whole(chat: Chat, choices: Sequence[_Choice], completions: Sequence[Completion]) -> responses.ChatCompletion:
    return responses.ChatCompletion(
        id=chat.chat_id,
        object="chat.completion",
        created=chat.created,
        model=chat.model,
        choices=[choice.whole() for choice in choices],
        usage=_usage(completions),
        system_fingerprint=chat.fingerprint,
        service_tier="default",
    )


def _usage(completions: Sequence[Completion]) -> responses.Usage:
    """The prompt counts once however many answers it has."""
    return usage_of(
        completions[0].num_prompt_tokens,
        sum(completion.num_sampled_tokens for completion in completions),
        completions[0].num_cached_tokens,
    )


async def _events(
    service: Service, chat: Chat, streams: Sequence[Stream], keep: Callable[[responses.ChatCompletion], Awaitable[None]]
) -> AsyncGenerator[str, None]:
    """The chunks as JSON text: roles, pieces, finish reasons, and with `include_usage` the usage."""
    options = chat.body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    choices = [_Choice(service, chat, index) for index in range(len(streams))]

    def chunk(*found: responses.ChunkChoice, usage: responses.Usage | None = None) -> str:
        made = responses.ChatChunk(
            id=chat.chat_id,
            object="chat.completion.chunk",
            created=chat.created,
            model=chat.model,
            system_fingerprint=chat.fingerprint,
            service_tier="default",
            choices=list(found),
        )
        if with_usage:
            made.usage = usage
        return made.event()

    try:
        for choice in choices:
            yield chunk(_delta(choice, responses.Delta(role="assistant", content="")))
        async with aclosing(interleaved(streams)) as pieces:
            async for index, piece in pieces:
                for made in _pieces(choices[index], piece.text, piece.tokens, piece.finish_reason):
                    yield chunk(made)
        completions = completions_of(streams)
        await keep(_whole(chat, choices, completions))
        if with_usage:
            yield chunk(usage=_usage(completions))
    finally:
        for stream in streams:
            stream.cancel()


def _delta(
    choice: _Choice, delta: responses.Delta, finish_reason: Any = None, logprobs: responses.ChatLogprobs | None = None
) -> responses.ChunkChoice:
    return responses.ChunkChoice(index=choice.index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)


def _pieces(
    choice: _Choice, text: str, tokens: Sequence[TokenLogprob], finish_reason: str | None
) -> list[responses.ChunkChoice]:
    """The chunks that a piece of the answer makes."""
    start = choice.told_calls
    shown, calls = choice.add(text, tokens, finish_reason)
    found = []
    if shown:
        found.append(_delta(choice, responses.Delta(content=shown), logprobs=choice.take_logprobs()))
    for number, call in enumerate(calls, start):
        found += [_delta(choice, delta) for delta in _call_deltas(choice, number, call)]
    if finish_reason is not None:
        rest = choice.take_logprobs()
        rest = rest if rest is not None and rest.content else None
        found.append(_delta(choice, responses.Delta(), choice.finish_reason, rest))
    return found


def _call_deltas(choice: _Choice, number: int, call: Call) -> list[responses.Delta]:
    """A call's fragments: first the id and the name, then the arguments."""
    named = responses.FunctionDelta(name=call.name, arguments="")
    rest = responses.FunctionDelta(arguments=call.arguments)
    if choice.legacy:
        return [responses.Delta(function_call=each) for each in (named, rest)] if number == 0 else []
    return [
        responses.Delta(
            tool_calls=[responses.ToolDelta(index=number, id=call.call_id, type="function", function=named)]
        ),
        responses.Delta(tool_calls=[responses.ToolDelta(index=number, function=rest)]),
    ]
