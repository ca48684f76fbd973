"""A service without a model: bytes are tokens, and what it answers follows from what it is asked."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailor.errors import ConflictError, NotFoundError, OverloadedError, ResourceError, nearest
from tailor.inference.backend import Completion, FinishReason, Request, SamplingParams, TokenLogprob
from tailor.text.tokenizer import VIRTUAL

END = 256
VOCAB_SIZE = 257
CONTEXT = 4096
HIDDEN = 8
BASE = "toy-base"
TUNED = "ft:toy-base:org:sum:1a2b3c4d"
WITH_SLASH = "org/name@v1"


class Piece(NamedTuple):
    text: str
    tokens: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Card:
    id: str
    base: str | None
    kind: str
    status: str = "loaded"
    created: int = 1_700_000_000
    root: str = "/srv/models/somewhere/toy"


def logprob(token_id: int, place: int) -> float:
    return -0.125 * ((token_id * 7 + place) % 11 + 1)


def token(token_id: int, place: int, count: int) -> TokenLogprob:
    """Its own logprob, and the likeliest: itself and the next ids."""
    own = logprob(token_id, place)
    others = [((token_id + k) % VOCAB_SIZE, own - k) for k in range(1, count)]
    return TokenLogprob(token_id, own, ((token_id, own), *others) if count else ())


def instance(schema: Mapping[str, Any]) -> Any:
    """Something that follows a simple schema."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return instance(schema["anyOf"][0])
    if schema.get("type", "object") == "object":
        return {name: instance(of) for name, of in schema.get("properties", {}).items()}
    return {"string": "text", "integer": 7, "number": 0.5, "boolean": True, "array": [], "null": None}[schema["type"]]


def answer(asked: str, params: SamplingParams) -> str:
    structure = params.structure
    if structure is not None:
        found = {"regex": "2026", "grammar": "x", "json_object": '{"a": 1}'}.get(structure.kind)
        if structure.kind == "choice":
            return str(structure.content[0])
        return found or json.dumps(instance(json.loads(structure.content)))
    if asked.startswith("say "):
        return asked[4:]
    return f"You said: {asked}" + (f" #{params.seed % 9973}" if params.temperature > 0 else "")


@dataclass
class Stream:
    service: ScriptedService
    request: Request
    prompt_ids: tuple[int, ...]
    prompt_tokens: tuple[TokenLogprob | None, ...]
    num_cached_tokens: int
    completion: Completion | None = None
    cancelled: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids) + 1

    def cancel(self) -> None:
        if self.completion is None and not self.cancelled:
            self.cancelled = True
            self.service.cancelled.append(self.asked)
        self.service.running.discard(id(self))

    @property
    def asked(self) -> str:
        prompt = self.request.prompt
        if prompt is None:
            return self.request.messages[-1].content
        return prompt if isinstance(prompt, str) else bytes(prompt).decode("utf-8", "replace")

    def _plan(self) -> tuple[str, list[int], FinishReason]:
        params = self.request.sampling
        text, finish = answer(self.asked, params), "stop"
        cuts = [at for at in (text.find(stop) for stop in params.stop) if at >= 0]
        text = text[: min(cuts)] if cuts else text
        ids = [*text.encode(), END]
        if len(ids) > params.max_new_tokens:
            ids, finish = ids[: params.max_new_tokens], "length"
            text = bytes(ids).decode("utf-8", "ignore")
        return text, ids, finish  # type: ignore[return-value]

    def _pieces(self, text: str, ids: Sequence[int], finish: FinishReason) -> Iterator[Piece]:
        """One piece per character, the tokens of the end with the last."""
        count, at = self.request.sampling.num_top_logprobs, 0
        tokens = [token(token_id, place, count) for place, token_id in enumerate(ids)]
        for letter in text:
            size = len(letter.encode())
            yield Piece(letter, tuple(tokens[at : at + size]), None)
            at += size
        yield Piece("", tuple(tokens[at:]), finish)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        text, ids, finish = self._plan()
        for number, piece in enumerate(self._pieces(text, ids, finish)):
            if self.cancelled:
                return
            if "fail midway" in self.asked and number == 3:
                raise RuntimeError("a secret of /srv/models/somewhere")
            if "hang" in self.asked and number == 3:
                await asyncio.sleep(60)
            await asyncio.sleep(self.service.pause if "slowly" in self.asked else 0)
            if piece.finish_reason is not None:
                self.completion = self._completion(text, ids, finish)
                self.service.running.discard(id(self))
            yield piece

    def _completion(self, text: str, ids: Sequence[int], finish: FinishReason) -> Completion:
        count = self.request.sampling.num_top_logprobs
        tokens = tuple(token(token_id, place, count) for place, token_id in enumerate(ids))
        return Completion(
            text,
            tuple(ids),
            tuple(t.logprob for t in tokens),
            finish,
            self.num_prompt_tokens,
            text,
            self.num_cached_tokens,
            tokens,
            self.prompt_tokens,
        )


class ScriptedService:
    """What `Service` is to the routes. `cancelled` holds the questions whose streams were cancelled."""

    def __init__(self, *, tools: bool = True, pause: float = 0.01) -> None:
        self.tools = tools
        self.pause = pause
        self.cards = {card.id: card for card in (Card(BASE, None, "base"), Card(TUNED, BASE, "lora"))}
        self.cards[WITH_SLASH] = Card(WITH_SLASH, BASE, "prompting")
        self.requests: list[Request] = []
        self.running: set[int] = set()
        self.cancelled: list[str] = []
        self.seen: set[tuple[str, tuple[int, ...]]] = set()
        self.closed = False
        self.alive = True

    async def stream(self, model: str, request: Request) -> Stream:
        self.card(model)
        self.requests.append(request)
        ids = tuple(self._ids(request))
        if len(ids) >= CONTEXT:
            raise ResourceError(f"a prompt of {len(ids)} tokens leaves no room in the base's context of {CONTEXT}")
        cached = len(ids) if (model, ids) in self.seen else 0
        self.seen.add((model, ids))
        told = [None, *(token(i, k, request.sampling.num_top_logprobs) for k, i in enumerate(ids[1:], 1))]
        stream = Stream(self, request, ids, tuple(told) if request.echo else (), cached)
        if "overload" in stream.asked:
            raise OverloadedError("32 requests wait already")
        if "crash" in stream.asked:
            raise RuntimeError("a secret of /srv/models/somewhere")
        self.running.add(id(stream))
        return stream

    async def embed(self, model: str, inputs: Sequence[str | tuple[int, ...]]) -> tuple[Tensor, int]:
        self.card(model)
        ids = [tuple(each.encode()) if isinstance(each, str) else each for each in inputs]
        rows = [[byte - 127.5 for byte in hashlib.sha256(repr(each).encode()).digest()[:HIDDEN]] for each in ids]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1), sum(map(len, ids))

    def models(self) -> list[Card]:
        return list(self.cards.values())

    def card(self, model: str) -> Card:
        if model not in self.cards:
            raise NotFoundError(f"there is no model {model!r}", hint=nearest(model, self.cards))
        return self.cards[model]

    async def load(self, name: str, path: Path | None = None) -> None:
        if path is not None and not path.exists():
            raise NotFoundError(f"there is no folder {path}")
        self.cards[name] = Card(name, BASE, "lora")

    async def unload(self, name: str) -> None:
        await self.delete(name)

    async def delete(self, model: str) -> None:
        if self.card(model).base is None:
            raise ConflictError(f"{model} is a base")
        del self.cards[model]

    async def warm(self, model: str) -> None:
        self.card(model)

    async def tokenize(self, model: str, request: Request) -> list[int]:
        self.card(model)
        return [VIRTUAL, *self._ids(request)]  # one virtual token leads every prompt

    async def detokenize(self, model: str, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(model, i) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, model: str, token_id: int) -> bytes:
        return b"<end>" if token_id == END else bytes([token_id])

    def vocab_size(self, model: str) -> int:
        return VOCAB_SIZE

    def takes_effort(self, model: str) -> bool:
        return model == TUNED

    def context(self, model: str) -> int:
        return CONTEXT

    def metrics(self) -> Mapping[str, float]:
        return {"running": float(len(self.running)), "waiting": 0.0, "tokens_generated": 12.0}

    async def close(self) -> None:
        self.closed = True

    def _ids(self, request: Request) -> list[int]:
        if isinstance(request.prompt, tuple):
            return list(request.prompt)
        text = "".join(f"{m.role}: {m.content}\n" for m in request.messages)
        tools = json.dumps(list(request.tools)) if self.tools and request.tools else ""
        return list((tools + text if request.prompt is None else request.prompt).encode())
