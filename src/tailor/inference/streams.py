"""Answers on their way from the engine's thread to an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailor.inference.backend import Completion, FinishReason, Request, TokenLogprob
from tailor.inference.local import LocalBackend
from tailor.inference.votes import winner

if TYPE_CHECKING:
    from tailor.inference.service import Service


@dataclass(frozen=True)
class Piece:
    """What is new of an answer: never half a character or the beginning of a stop text. The last has a reason."""

    text: str
    tokens: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None = None


class TokenStream:
    """An answer on its way: iterate over its pieces. Whoever stops early calls `cancel`, which frees its memory."""

    def __init__(
        self, service: Service, backend: LocalBackend, request: Request, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.text = backend.text_stream(request)
        self.running = backend.running(request, self.text)
        self.completion: Completion | None = None
        self._service = service
        self._backend = backend
        self._request = request
        self._loop = loop
        self._pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._over = False

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, virtual ones included."""
        return len(self.running.prompt_ids)

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that had been computed for another request."""
        return self.running.num_cached

    @property
    def prompt_tokens(self) -> tuple[TokenLogprob | None, ...]:
        """An echoed prompt's tokens; complete from the first piece on."""
        return self._backend.echoed(self.running) if self._request.echo else ()

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        piece = await self._pieces.get()
        if isinstance(piece, BaseException):
            self._over = True
            raise piece
        self._over = self._over or piece.finish_reason is not None
        return piece

    async def aclose(self) -> None:
        """Cancel what is left."""
        self.cancel()

    def cancel(self) -> None:
        """Give up: the answer stops at the next pass. Without effect on one that has ended."""
        if self.completion is None and self.running.error is None:
            self._service.forget(self._backend, self.running)
        self._over = True
        self.put(StopAsyncIteration())  # whoever reads at this moment

    def tell(self) -> None:
        """The engine's word that this sequence got a token or ended; in the engine's thread."""
        running = self.running
        if running.error is not None:
            self.put(running.error)
            return
        text, reason = self.text.take(), running.finish_reason
        if reason is not None:
            text += self.text.finish()
            self.completion = self._backend.completion(self._request, running)
        self.put(Piece(text, (running.tokens[-1],), reason))

    def put(self, piece: Piece | BaseException) -> None:
        """Hand a piece to the caller's loop, wherever this is called from."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class VotedStream:
    """An answer that several samples vote on: one piece, when all have ended."""

    def __init__(self, streams: Sequence[TokenStream]) -> None:
        self.completion: Completion | None = None
        self._streams = streams

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, virtual ones included."""
        return self._streams[0].num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Those of them that had been computed for another request."""
        return self._streams[0].num_cached_tokens

    @property
    def prompt_tokens(self) -> tuple[TokenLogprob | None, ...]:
        """An echoed prompt's tokens."""
        return self._streams[0].prompt_tokens

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self.completion is not None:
            raise StopAsyncIteration
        for stream in self._streams:
            async for _ in stream:
                pass
        completions = [stream.completion for stream in self._streams if stream.completion is not None]
        if len(completions) < len(self._streams):  # cancelled
            raise StopAsyncIteration
        self.completion = chosen = winner(completions)
        return Piece(chosen.text, chosen.tokens, chosen.finish_reason)

    async def aclose(self) -> None:
        """Cancel what is left."""
        self.cancel()

    def cancel(self) -> None:
        """Give up all samples."""
        for stream in self._streams:
            stream.cancel()


Stream = TokenStream | VotedStream
"""An answer on its way."""
