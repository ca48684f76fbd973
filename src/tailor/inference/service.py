"""Answers for many callers at once: one thread runs the passes, everybody else asks it from an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from tailor.artifacts.artifact import find, remove
from tailor.errors import ConflictError, NotFoundError, OverloadedError, TailorError
from tailor.inference.backend import Completion, Request
from tailor.inference.engine import Engine
from tailor.inference.library import Library, ModelCard
from tailor.inference.local import LocalBackend
from tailor.inference.orders import Orders, closing, in_thread
from tailor.inference.scheduler import Running
from tailor.inference.streams import Stream, TokenStream, VotedStream
from tailor.inference.votes import sampled

T = TypeVar("T")


class Service:
    """Answers requests by model name, continuously batched, whatever customizations they are for.

    Passes run in a thread of its own, or without `own_thread` in that of whoever calls `work`. A process that only
    serves should do that in its main thread: GNU OpenMP counts the threads that have computed, and once they and their
    helpers are more than the processors, everybody waits for helpers by sleeping; steps took up to four times as long
    (docs/log.md). For the same reason models are loaded in threads that end.
    """

    def __init__(self, library: Library, *, own_thread: bool = True) -> None:
        self.library = library
        self.started = time.monotonic()
        self._orders = Orders()
        self._streams: dict[Running, TokenStream] = {}
        self._loader = ThreadPoolExecutor(1, "loader")
        self._num = {"requests": 0, "finished": 0, "cancelled": 0, "failed": 0, "prompt_tokens": 0, "cached_tokens": 0}
        self._ended = threading.Event()
        if own_thread:
            threading.Thread(target=self.work, name="engine", daemon=True).start()

    async def stream(self, model: str, request: Request) -> Stream:
        """An answer in pieces; one that is voted on comes in one.

        Raises NotFoundError for an unknown model, DataError or ConfigError for a request that makes no sense,
        ResourceError for one that is too long, OverloadedError when too many wait.
        """
        backend, artifact = await self._backend(model)
        named = replace(request, artifact=artifact)
        with _unloading_told(backend, artifact):
            votes = backend.votes(named)
        if votes is None:
            return await self._begin(backend, named)
        streams: list[TokenStream] = []
        try:
            for sample in sampled(named, votes):
                streams.append(await self._begin(backend, sample))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return VotedStream(streams)

    async def _begin(self, backend: LocalBackend, request: Request) -> TokenStream:
        """A stream whose sequence waits for its turn."""
        loop = asyncio.get_running_loop()
        with _unloading_told(backend, request.artifact):
            # what rewrites prompts may ask the base for vectors: not beside a pass
            if backend.composes(request.artifact):
                stream = await self._between_passes(lambda: TokenStream(self, backend, request, loop))
            else:
                stream = await asyncio.to_thread(TokenStream, self, backend, request, loop)

        def begin() -> None:
            self._check_there(backend, request, stream.running)
            backend.engine.add(stream.running)
            self._streams[stream.running] = stream
            self._num["requests"] += 1

        try:
            await self._between_passes(begin)
        except BaseException:  # whoever is cancelled here may have begun already
            stream.cancel()
            raise
        return stream

    async def complete(self, model: str, requests: Sequence[Request]) -> list[Completion]:
        """Whole answers, in order; when one of them fails, the others are cancelled."""
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(await self.stream(model, request))
            for stream in streams:
                async for _ in stream:
                    pass
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return [stream.completion for stream in streams if stream.completion is not None]

    async def embed(self, model: str, inputs: Sequence[str | tuple[int, ...]]) -> tuple[Tensor, int]:
        """(n, hidden) unit vectors, and how many tokens were read. Raises NotFoundError, DataError, ResourceError."""
        backend, _ = await self._backend(model)
        return await self._between_passes(lambda: backend.embed_inputs(inputs))

    def models(self) -> list[ModelCard]:
        """Everything that can be asked for."""
        return self.library.cards()

    def card(self, model: str) -> ModelCard:
        """What is known of a model. Raises NotFoundError."""
        return self.library.card(model)

    async def load(self, name: str, path: str | Path | None = None) -> ModelCard:
        """Have a model in memory; with `path` an artifact that lies there, under a new name.

        Raises NotFoundError, ConflictError, DataError.
        """
        if path is not None:
            await asyncio.to_thread(self.library.add, name, Path(path))
        try:
            await self._backend(name)
        except BaseException:
            if path is not None:
                await self._between_passes(lambda: self.library.drop(name))
            raise
        return self.card(name)

    async def unload(self, name: str) -> None:
        """Let a customization go; its running answers end. Raises NotFoundError, and ConflictError for a base."""
        own = self._artifact(name)
        await self._between_passes(lambda: self._drop(own))

    async def delete(self, name: str) -> None:
        """Unload an artifact and remove it from disk.

        Raises as `unload` does, and ConflictError for one that was loaded from a folder: it can only be unloaded.
        """
        own, folder = self._artifact(name), self.card(name).root
        self.library.check_own(own)

        def take_away() -> None:
            remove(find(folder))
            self._orders.ask(lambda: self._drop(own)).result()

        await self._beside_passes(take_away)  # nobody loads it again before its files are gone

    async def tokenize(self, model: str, request: Request) -> list[int]:
        """The token ids of a request's prompt, virtual ones included."""
        backend, artifact = await self._backend(model)
        named = replace(request, artifact=artifact)
        with _unloading_told(backend, artifact):
            if backend.composes(artifact):
                return await self._between_passes(lambda: list(backend.running(named).prompt_ids))
            return await asyncio.to_thread(lambda: list(backend.running(named).prompt_ids))

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        backend, artifact = await self._backend(model)
        with _unloading_told(backend, artifact):
            return backend.rendering(artifact).renderer.tokenizer.decode(token_ids)

    def token_bytes(self, model: str, token_id: int) -> bytes:
        """The bytes of one token; the model must be in memory."""
        backend, artifact = self._ready(model)
        with _unloading_told(backend, artifact):
            return backend.rendering(artifact).renderer.tokenizer.token_bytes(token_id)

    def context(self, model: str) -> int:
        """Tokens that prompt and answer may have together; the model must be in memory."""
        backend, artifact = self._ready(model)
        with _unloading_told(backend, artifact):
            return backend.base.room(backend.slot(artifact))

    def vocab_size(self, model: str) -> int:
        """Ids below this are words; the model must be in memory."""
        backend, artifact = self._ready(model)
        with _unloading_told(backend, artifact):
            return backend.rendering(artifact).renderer.tokenizer.vocab_size

    def takes_effort(self, model: str) -> bool:
        """Whether a request can say how long to think first; the model must be in memory."""
        backend, artifact = self._ready(model)
        with _unloading_told(backend, artifact):
            return backend.takes_effort(artifact)

    async def warm(self, model: str) -> None:
        """Have the model in memory before its facts are asked for. Raises as `stream` does."""
        await self._backend(model)

    def metrics(self) -> Mapping[str, float]:
        """Counts since the start, and what is in use now."""
        engines = self.library.engines
        return {
            **self._num,
            "running": sum(len(e.scheduler.active) for e in engines),
            "waiting": sum(len(e.scheduler.waiting) for e in engines),
            "kv_bytes_used": sum(e.pool.used_bytes for e in engines),
            "kv_bytes": sum(e.pool.num_bytes for e in engines),
            "kv_bytes_max": sum(e.pool.max_bytes or 0 for e in engines),
            "prefix_cache_bytes": sum(e.prefixes.num_bytes for e in engines),
            "prefilled_tokens": sum(e.num_prefilled for e in engines),
            "generated_tokens": sum(e.num_generated for e in engines),
            "uptime_seconds": time.monotonic() - self.started,
        }

    @property
    def alive(self) -> bool:
        """Whether passes can still run."""
        return not self._ended.is_set()

    def forget(self, backend: LocalBackend, running: Running) -> None:
        """Take a sequence out at the next pass."""

        def take_out() -> None:
            backend.engine.cancel(running)
            if self._streams.pop(running, None) is not None:
                self._num["cancelled"] += 1

        self._orders.put(take_out)

    async def close(self) -> None:
        """Have `work` end, and wait for it; answers on their way end with an error."""
        self.stop()
        await asyncio.to_thread(self._ended.wait)

    def stop(self) -> None:
        """Have `work` end; from any thread, any number of times."""
        self._orders.put(None)
        self._loader.shutdown(wait=False)

    def _artifact(self, name: str) -> str:
        """The artifact behind a name. Raises NotFoundError, and ConflictError for a base."""
        own = self.card(name).artifact
        if own is None:
            raise ConflictError(f"{name} is a base: it is served as long as the server runs")
        return own

    def _ready(self, model: str) -> tuple[LocalBackend, str | None]:
        found = self.library.ready(model)
        if found is None:
            raise _unloaded()
        return found

    async def _backend(self, model: str) -> tuple[LocalBackend, str | None]:
        """The backend of a model, which is loaded if need be beside running passes."""
        found = self.library.ready(model)
        if found is not None:
            return found
        # a thread of its own, however many wait: they would use up the loop's threads and keep the one that loads out
        return await self._beside_passes(lambda: self._load(model))

    def _load(self, model: str) -> tuple[LocalBackend, str | None]:
        """Load a model that may be there by now; in the loader's thread, where nobody loads it a second time.

        What others have deleted or replaced on disk goes first.
        """
        for name in self.library.outdated():
            self._orders.ask(partial(self._drop, name)).result()
        return self.library.ready(model) or self._orders.ask(self.library.fetch(model)).result()

    def _check_there(self, backend: LocalBackend, request: Request, running: Running) -> None:
        """Raise OverloadedError for a model that was unloaded after the request had found it; between passes."""
        slot = None if request.artifact is None else backend.slots.get(request.artifact)
        same = request.artifact is None or (slot is not None and slot.number == running.slot)
        if not same or backend.engine not in self.library.engines:
            raise _unloaded()

    async def _beside_passes(self, work: Callable[[], T]) -> T:
        """Run something beside the passes, one at a time. Raises TailorError when the service ends."""

        def run() -> T:
            if self._orders.closed:
                raise closing()
            return in_thread(work)

        try:
            future = self._loader.submit(run)
        except RuntimeError:  # it takes nothing any more
            raise closing() from None
        return await asyncio.wrap_future(future)

    async def _between_passes(self, order: Callable[[], T]) -> T:
        """Run something in the engine's thread, when no pass runs."""
        return await asyncio.wrap_future(self._orders.ask(order))

    def work(self) -> None:
        """Run orders and passes until the service is stopped."""
        try:
            self._work()
        finally:
            self._ended.set()

    def _work(self) -> None:
        """Orders first, then one pass of every base that has something to do."""
        while True:
            busy = [engine for engine in self.library.engines if not engine.idle]
            while not busy or not self._orders.empty:
                order = self._orders.take()
                if order is None:
                    self._end()
                    return
                self._obey(order)
                busy = [engine for engine in self.library.engines if not engine.idle]
            for engine in busy:
                self._pass(engine)

    def _obey(self, order: Callable[[], None]) -> None:
        """Run an order; whatever it raises, the thread goes on."""
        try:
            order()
        except BaseException as error:
            traceback.print_exception(error, file=sys.stderr)

    def _pass(self, engine: Engine) -> None:
        """One pass of an engine. When it fails, so do all its answers, also those that had just left its scheduler."""
        try:
            moved = engine.step()
        except BaseException as error:
            self._fail([r for r, stream in self._streams.items() if stream._backend.engine is engine], error)
            for running in [*engine.scheduler.active, *engine.scheduler.waiting]:
                self._obey(partial(engine.cancel, running))
            return
        for running in moved:
            try:
                self._tell(running)
            except BaseException as error:
                self._fail([running], error)

    def _tell(self, running: Running) -> None:
        stream = self._streams.get(running)
        if stream is None:
            return
        stream.tell()
        if running.ended_at_all:
            del self._streams[running]
            self._num["finished" if running.error is None else "failed"] += 1
            self._num["prompt_tokens"] += len(running.prompt_ids)
            self._num["cached_tokens"] += running.num_cached

    def _fail(self, sequences: Sequence[Running], error: BaseException) -> None:
        """Something failed: whoever was part of it is told, and the thread goes on."""
        if not isinstance(error, Exception):  # it would end the loop of whoever reads
            error = RuntimeError(f"the engine's thread was told to end: {error!r}")
        for running in sequences:
            if (stream := self._streams.pop(running, None)) is not None:
                self._obey(partial(stream._backend.engine.cancel, running))
                stream.put(error)
                self._num["failed"] += 1

    def _drop(self, name: str) -> None:
        """Unload, after those that are being answered have been told."""
        own = self.library.loaded.get(name)
        engine = None if own is None else own.backend.engine
        mine = [r for r, s in self._streams.items() if s._request.artifact == name or s._backend.engine is engine]
        self._fail(mine, TailorError(f"{name} was unloaded while it answered"))
        self.library.drop(name)

    def _end(self) -> None:
        self._orders.close()
        while not self._orders.empty:
            if (order := self._orders.take()) is not None:
                self._obey(order)
        self._fail(list(self._streams), closing())


def _unloaded() -> OverloadedError:
    return OverloadedError("the model was unloaded while the request came in", hint="try again")


@contextlib.contextmanager
def _unloading_told(backend: LocalBackend, artifact: str | None) -> Iterator[None]:
    """Raise OverloadedError where a model is not found because it was unloaded after the request had found it."""
    try:
        yield
    except NotFoundError as error:
        if artifact is None or artifact in backend.slots:
            raise
        raise _unloaded() from error
