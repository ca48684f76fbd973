"""What another server or program deletes or replaces on disk is not answered from memory any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch

from tailor.artifacts.artifact import find, save, update_manifest
from tailor.errors import NotFoundError
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.library import Library
from tailor.inference.service import Service
from tailor.models.base import Base, load_base
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.prompting import Prompting
from tailor.techniques.technique import Technique
from tailor.text.messages import user

MODEL = "tailor-nano"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(MODEL, dtype="float32")


def make(base: Base, name: str, technique: Technique, *, seed: int = 1, force: bool = False) -> None:
    slot = base.host.attach([technique], seed=seed)
    slot.bake()
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    save(name, base, slot, [technique], {}, force=force)
    base.host.detach(slot)


def with_two(talk: Callable[[Service, Service], Awaitable[None]]) -> None:
    """A conversation with two servers of one home."""

    async def run() -> None:
        one, other = (Service(Library([load_base(MODEL, dtype="float32")])) for _ in range(2))
        try:
            await talk(one, other)
        finally:
            await one.close()
            await other.close()

    asyncio.run(run())


async def say(service: Service, model: str) -> str:
    request = Request((user("Where is my parcel?"),), sampling=SamplingParams(max_new_tokens=8, ignore_stop=True))
    (answer,) = await service.complete(model, [request])
    return answer.text


@pytest.mark.parametrize(
    "technique", [LoRA(rank=2), Prompting(system="Be polite.", shots=0), Full()], ids=lambda t: t.type
)
def test_what_one_server_deletes_the_other_does_not_answer_for(
    own_home: Path, base: Base, technique: Technique
) -> None:
    make(base if technique.traits.frozen_base else load_base(MODEL, dtype="float32"), "mine", technique)

    async def talk(one: Service, other: Service) -> None:
        assert await say(one, "mine") == await say(other, "mine")
        await one.delete("mine")
        for service in (one, other):
            with pytest.raises(NotFoundError, match="no model 'mine'"):
                await say(service, "mine")
            assert [card.id for card in service.models()] == [MODEL]
        assert other.library.outdated() == []
        assert await say(other, MODEL) == await say(one, MODEL)

    with_two(talk)


def test_what_is_replaced_is_loaded_anew_and_new_facts_are_not(own_home: Path, base: Base) -> None:
    make(base, "mine", LoRA(rank=2))

    async def talk(one: Service, other: Service) -> None:
        before = await say(one, "mine")
        slot = one.library.loaded[MODEL].backend.slots["mine"]
        update_manifest(find("mine"), metrics={"score": 1.0})
        assert await say(one, "mine") == before
        assert one.library.loaded[MODEL].backend.slots["mine"] is slot
        make(base, "mine", LoRA(rank=3), seed=2, force=True)
        after = await say(one, "mine")
        assert after == await say(other, "mine") != before
        assert list(one.library.loaded[MODEL].backend.slots) == ["mine"]

    with_two(talk)


def test_an_adapter_from_a_folder_stays_until_it_is_unloaded(own_home: Path, base: Base, tmp_path: Path) -> None:
    make(base, "mine", LoRA(rank=2))
    folder = tmp_path / "elsewhere"
    find("mine").folder.rename(folder)

    async def talk(one: Service, other: Service) -> None:
        await one.load("far", folder)
        before = await say(one, "far")
        (folder / "tailor.json").unlink()
        assert await say(one, "far") == before

    with_two(talk)
