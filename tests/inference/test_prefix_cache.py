"""What prompts begin with in common is computed once, changes no answer, and never outlives its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tailor.inference.backend import SamplingParams
from tailor.inference.engine import Engine
from tailor.inference.prefix_cache import MAX_ENTRIES, MIN_KEPT, PrefixCache
from tailor.inference.scheduler import Running
from tailor.models.base import Base
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tiny_models import tiny_base

LEAD = list(range(10, 10 + 2 * MIN_KEPT))
TAILS = [[1, 4, 70], [71], [72, 73, 74, 75, 1], [1, 4, 99]]


def sequence(slot: Slot | None, ids: list[int], tokens: int = 5) -> Running:
    lead = list(slot.virtual_ids) if slot else []
    return Running([*lead, *ids], slot.number if slot else 0, SamplingParams(max_new_tokens=tokens))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of every pass."""
    sizes: list[int] = []
    inner = Base.hidden

    def hidden(self: Base, plan: Plan, *args: Any) -> torch.Tensor:
        sizes.append(plan.segments[-1].end)
        return inner(self, plan, *args)

    monkeypatch.setattr(Base, "hidden", hidden)
    yield sizes


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "opt"])
def test_answers_are_those_of_a_full_recompute(model_type: str) -> None:
    base = tiny_base(model_type)
    slots = [None, base.host.attach([LoRA(rank=2)]), base.host.attach([PromptTuning(num_virtual_tokens=3)])]
    with torch.no_grad():
        for slot in slots[1:]:
            for parameter in slot.parameters.values():  # type: ignore[union-attr]
                parameter.add_(0.05 * torch.randn_like(parameter))
    known = Engine(base, ())
    for _ in range(2):  # the second time everything is known
        for slot in slots:
            batch = [sequence(slot, LEAD + tail) for tail in TAILS]
            known.run(batch)
            for own in batch:
                alone = Running(own.prompt_ids, own.slot, own.sampling)
                Engine(base, (), prefixes=PrefixCache(0)).run([alone])
                assert alone.num_cached == 0
                assert own.token_ids == alone.token_ids
                torch.testing.assert_close(torch.tensor(own.logprobs), torch.tensor(alone.logprobs), atol=1e-5, rtol=0)


def test_a_shared_beginning_is_computed_once_in_a_batch_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    engine = Engine(base, ())
    batch = [sequence(None, LEAD + tail, tokens=1) for tail in TAILS]
    with counted(monkeypatch) as sizes:
        engine.run(batch)
        # the last two tails begin with a token of the first
        assert sizes == [len(LEAD) + len(TAILS[0]), sum(map(len, TAILS[1:])) - 2]
        later = sequence(None, [*LEAD, 120, 121], tokens=1)
        engine.run([later])
        assert sizes[-1] == 2
        assert later.num_cached == len(LEAD)
        engine.run([again := sequence(None, [*LEAD, *TAILS[0]], tokens=1)])
        assert sizes[-1] == 1, "the last token of a known prompt: its logits are asked for"
        assert again.num_cached == len(again.prompt_ids) - 1


def test_slots_have_their_own_and_training_ends_it() -> None:
    base = tiny_base()
    first, second = base.host.attach([LoRA(rank=2)], seed=1), base.host.attach([LoRA(rank=2)], seed=2)
    cache = PrefixCache()
    engine = Engine(base, (), prefixes=cache)
    engine.run([sequence(first, LEAD)])
    assert cache.longest(first, [*LEAD, 7]) == len(LEAD)
    assert cache.longest(second, [*LEAD, 7]) == cache.longest(None, [*LEAD, 7]) == 0
    first.touch()  # an optimizer's step
    assert cache.longest(first, [*LEAD, 7]) == 0
    engine.run([sequence(first, LEAD)])
    with torch.no_grad():
        next(iter(first.parameters.values())).add_(1.0)
    assert cache.longest(first, [*LEAD, 7]) == 0


def test_it_holds_no_more_than_it_may() -> None:
    base = tiny_base()
    one = PrefixCache()
    Engine(base, (), prefixes=one).run([sequence(None, LEAD)])
    cache = PrefixCache(max_bytes=2 * one.num_bytes)
    engine = Engine(base, (), prefixes=cache)
    for start in range(4):
        engine.run([sequence(None, [start, *LEAD[1:]])])
    assert cache.num_bytes == 2 * one.num_bytes
    assert [cache.longest(None, [start, *LEAD[1:], 7]) > 0 for start in range(4)] == [False, False, True, True]
    cache.clear()
    assert (cache.num_bytes, cache.longest(None, LEAD)) == (0, 0)
    many = PrefixCache()
    for start in range(MAX_ENTRIES + 3):
        Engine(base, (), prefixes=many).run([sequence(None, [start, *LEAD[1:]], tokens=1)])
    assert many.longest(None, [2, *LEAD[1:]]) == 0 < many.longest(None, [3, *LEAD[1:]])


def test_the_shortest_prompt_is_kept_once() -> None:
    engine = Engine(tiny_base(), ())
    engine.run([sequence(None, LEAD[:MIN_KEPT], tokens=1)])
    held = engine.prefixes.num_bytes
    engine.run([sequence(None, LEAD[:MIN_KEPT], tokens=1)])
    assert engine.prefixes.num_bytes == held > 0


def test_full_fine_tuning_changes_what_the_base_knows() -> None:
    base = tiny_base()
    engine = Engine(base, ())
    engine.run([sequence(None, LEAD, tokens=1)])
    slot = base.host.attach([Full()])
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.mul_(1.5)
    for _ in range(2):  # attached and not: the weights are no longer the base's
        engine.run([known := sequence(None, LEAD)])
        Engine(base, (), prefixes=PrefixCache(0)).run([fresh := sequence(None, LEAD)])
        assert known.token_ids == fresh.token_ids
        torch.testing.assert_close(torch.tensor(known.logprobs), torch.tensor(fresh.logprobs), atol=1e-5, rtol=0)
        base.host.detach(slot)


def test_short_beginnings_are_not_kept() -> None:
    base = tiny_base()
    cache = PrefixCache()
    Engine(base, (), prefixes=cache).run([sequence(None, LEAD[: MIN_KEPT - 1])])
    assert cache.num_bytes == 0
