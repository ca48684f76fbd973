"""The service: many callers at once, each with an answer of their own; loading, unloading and failing beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor.artifacts.artifact import save
from tailor.errors import ConflictError, DataError, NotFoundError, OverloadedError, ResourceError, TailorError
from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.engine import EngineSettings
from tailor.inference.library import Library
from tailor.inference.local import LocalBackend
from tailor.inference.service import Service
from tailor.models.base import Base, load_base
from tailor.techniques.full import Full
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tailor.techniques.technique import Technique
from tailor.text.messages import user

MODEL = "tailor-nano"
KINDS: dict[str, Technique] = {
    "lora": LoRA(rank=2),
    "ia3": IA3(),
    "soft": PromptTuning(num_virtual_tokens=4, init="random"),
    "polite": Prompting(system="Be polite.", shots=0),
    "voted": Prompting(system="Say a number.", shots=0, votes=3, answer_pattern=r"(\w+)"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an artifact of every kind, and one full fine-tune."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(folder))
        for name, technique in {**KINDS, "whole": Full()}.items():
            base = load_base(MODEL, dtype="float32")
            slot = base.host.attach([technique], seed=1)
            slot.bake()
            with torch.no_grad():
                for parameter in slot.parameters.values():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            save(name, base, slot, [technique], {})
    return folder


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILOR_HOME", str(home))


def with_service(talk: Callable[[Service], Awaitable[Any]], **settings: Any) -> Any:
    """What a conversation with a service of its own comes to."""
    limits = settings.pop("limits", {})

    async def run() -> Any:
        library = Library([load_base(MODEL, dtype="float32")], settings=EngineSettings(**limits), **settings)
        service = Service(library)
        try:
            return await talk(service)
        finally:
            await service.close()

    return asyncio.run(run())


def ask(text: str, **sampling: Any) -> Request:
    return Request((user(text),), sampling=SamplingParams(**{"max_new_tokens": 8, **sampling}))


def alone(base: Base, name: str, request: Request) -> Completion:
    from tailor.artifacts.artifact import attach, find

    slots = {} if name == MODEL else {name: attach(base, find(name))}
    return LocalBackend(base, slots).generate([replace(request, artifact=None if name == MODEL else name)])[0]


def test_many_callers_of_many_customizations_get_their_own_answers() -> None:
    names = [MODEL, *KINDS]
    asked = [(names[k % len(names)], ask(f"Tell me about number {k}", temperature=k % 2, seed=k)) for k in range(24)]

    async def talk(service: Service) -> list[tuple[str, Completion]]:
        async def one(name: str, request: Request) -> tuple[str, Completion]:
            stream = await service.stream(name, request)
            text = ""
            async for piece in stream:
                text += piece.text
            assert stream.completion is not None
            return text, stream.completion

        return await asyncio.gather(*(one(*pair) for pair in asked))

    answers = with_service(talk, limits={"max_sequences": 7, "chunk_size": 16})
    base = load_base(MODEL, dtype="float32")
    for (name, request), (text, completion) in zip(asked, answers, strict=True):
        expected = alone(base, name, request)
        assert (text, completion.token_ids) == (expected.text, expected.token_ids)
        assert completion.num_outvoted_tokens == expected.num_outvoted_tokens
        assert (completion.num_outvoted_tokens > 0) == (name == "voted")


def test_a_full_fine_tune_is_a_further_base_and_the_least_used_makes_room(home: Path) -> None:
    async def talk(service: Service) -> tuple[Any, ...]:
        first = (await service.complete("whole", [ask("Hello")]))[0]
        plain = (await service.complete(MODEL, [ask("Hello")]))[0]
        return first, plain, next(card for card in service.models() if card.id == "whole").status

    first, plain, status = with_service(talk)
    assert first.token_ids != plain.token_ids
    assert status == "loaded"
    with pytest.raises(ResourceError, match="more than the server may hold"):
        with_service(lambda service: service.complete("whole", [ask("Hello")]), max_base_bytes=1000)


def test_stopping_early_frees_memory_at_once() -> None:
    async def talk(service: Service) -> tuple[float, float, float]:
        stream = await service.stream(MODEL, ask("Hello", max_new_tokens=400, ignore_stop=True))
        await anext(stream)
        used = service.metrics()["kv_bytes_used"]
        stream.cancel()
        while service.metrics()["running"]:
            await asyncio.sleep(0.01)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return used, service.metrics()["kv_bytes_used"], service.metrics()["cancelled"]

    used, left, cancelled = with_service(talk)
    assert used > 0
    assert (left, cancelled) == (0, 1)


def test_what_is_wrong_is_said_before_the_first_token() -> None:
    async def talk(service: Service) -> None:
        with pytest.raises(NotFoundError, match="no model 'lroa'") as caught:
            await service.stream("lroa", ask("Hello"))
        assert "did you mean 'lora'" in str(caught.value.hint)
        with pytest.raises(DataError, match="is not in the vocabulary"):
            await service.stream(MODEL, Request((), prompt=(1, 1 << 30)))
        with pytest.raises(ResourceError, match="leaves no room"):
            await service.stream(MODEL, Request((), prompt=(5,) * service.context(MODEL)))
        assert (await service.complete(MODEL, [ask("Hello")]))[0].token_ids

    with_service(talk)


def test_too_many_that_wait_are_told_so() -> None:
    async def talk(service: Service) -> int:
        long = ask("Hello", max_new_tokens=200, ignore_stop=True)
        streams = [await service.stream(MODEL, long)]
        await anext(streams[0])
        refused = 0
        for _ in range(4):
            try:
                streams.append(await service.stream(MODEL, long))
            except OverloadedError:
                refused += 1
        for stream in streams:
            stream.cancel()
        return refused

    assert with_service(talk, limits={"max_sequences": 1, "max_waiting": 2}) == 2


def test_unloading_ends_its_answers_and_nobody_elses() -> None:
    async def talk(service: Service) -> str:
        mine = await service.stream("lora", ask("Hello", max_new_tokens=500, ignore_stop=True))
        others = asyncio.ensure_future(service.complete("ia3", [ask("Hello", max_new_tokens=30, ignore_stop=True)]))
        await anext(mine)
        await service.unload("lora")
        with pytest.raises(TailorError, match="lora was unloaded"):
            async for _ in mine:
                pass
        assert len((await others)[0].token_ids) == 30
        with pytest.raises(ConflictError, match="is a base"):
            await service.unload(MODEL)
        again = (await service.complete("lora", [ask("Hello")]))[0]  # it is on disk, and comes back when asked for
        return again.text

    assert with_service(talk) == alone(load_base(MODEL, dtype="float32"), "lora", ask("Hello")).text


def test_another_name_and_another_folder(home: Path, tmp_path: Path) -> None:
    aliases = {"ft:nano:x:1": "lora"}

    async def talk(service: Service) -> None:
        by_alias, by_name = [(await service.complete(n, [ask("Hi")]))[0].text for n in ("ft:nano:x:1", "lora")]
        assert by_alias == by_name
        assert [service.card(name).artifact for name in ("ft:nano:x:1", "lora")] == ["lora", "lora"]
        listed = [card.id for card in service.models()]
        assert "ft:nano:x:1" in listed  # once, by the name that its job gave it
        assert "lora" not in listed
        card = await service.load("copy", home / "artifacts" / "ia3")
        assert (card.id, card.status) == ("copy", "loaded")
        assert (await service.complete("copy", [ask("Hi")]))[0].text == (await service.complete("ia3", [ask("Hi")]))[
            0
        ].text
        with pytest.raises(ConflictError, match="already"):
            await service.load("copy", home / "artifacts" / "ia3")
        with pytest.raises(NotFoundError):
            await service.load("nothing", tmp_path)

    with_service(talk, alias=aliases.get, aliases=lambda: aliases)


def test_tokens_and_vectors() -> None:
    async def talk(service: Service) -> None:
        await service.warm("soft")
        ids = await service.tokenize("soft", ask("Hello"))
        assert sum(token >= 1 << 30 for token in ids) == 4
        words = await service.tokenize(MODEL, Request((), prompt="Hello there"))
        assert await service.detokenize(MODEL, words) == "Hello there"
        assert b"".join(service.token_bytes(MODEL, token) for token in words) == b"Hello there"
        vectors, num = await service.embed(MODEL, ["Hello", tuple(words)])
        assert vectors.shape == (2, 256)
        assert num > len(words)
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
        assert service.vocab_size(MODEL) > max(words)

    with_service(talk)


def test_closing_ends_what_runs() -> None:
    async def talk() -> None:
        service = Service(Library([load_base(MODEL, dtype="float32")]))
        stream = await service.stream(MODEL, ask("Hello", max_new_tokens=500, ignore_stop=True))
        await anext(stream)
        await service.close()
        with pytest.raises(TailorError, match="shutting down"):
            async for _ in stream:
                pass
        with pytest.raises(TailorError, match="shutting down"):
            await service.stream(MODEL, ask("Hello"))
        assert not service.alive

    asyncio.run(talk())
