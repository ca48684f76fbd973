"""Any mixture of slots, in any order of arrival, with cancellations and little memory: every answer is its own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor.errors import OverloadedError, QualityError, ResourceError
from tailor.inference.backend import SamplingParams
from tailor.inference.engine import Engine, EngineSettings
from tailor.inference.local import LocalBackend
from tailor.inference.prefix_cache import PrefixCache
from tailor.inference.scheduler import Running
from tailor.inference.text_stream import answer_text
from tailor.models.base import Base, load_base
from tailor.models.kv_cache import SMALLEST
from tailor.models.slots import Slot
from tailor.techniques.adapter import Adapter
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tiny_models import tiny_base

NANO = load_base("tailor-nano").renderer

NEAR_TIE = 1e-4
"""Greedy answers may differ where the two best logits are this close."""

TECHNIQUES: list[Any] = [
    LoRA(rank=2),
    LoRA(rank=4, dora=True),
    IA3(),
    Adapter(bottleneck_size=4),
    PrefixTuning(num_virtual_tokens=3),
    PromptTuning(num_virtual_tokens=4),
    PTuning(num_virtual_tokens=2),
    Prompting(system="Be short.", shots=0),
    Adapter(bottleneck_size=3),
    Adapter(bottleneck_size=5, form="parallel", norm="post", bias=True),
    Adapter(bottleneck_size=2, form="parallel", norm="post", bias=True),
]


@functools.cache
def served(model_type: str) -> tuple[Base, list[Slot | None]]:
    """A base with one slot of every kind, each of which changes the answer."""
    base = tiny_base(model_type)
    slots: list[Slot | None] = [None]
    for seed, technique in enumerate(TECHNIQUES):
        slot = base.host.attach([technique], seed=seed)
        slot.bake()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in slot.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        slots.append(slot)
    return base, slots


def prompt(slot: Slot | None, ids: list[int]) -> list[int]:
    return [*(slot.virtual_ids if slot else ()), *ids]


def check(base: Base, sequence: Running, num_tokens: int | None = None) -> None:
    """Every token is the best of a full recompute, or as good as the best."""
    if sequence.token_ids:
        first = len(sequence.prompt_ids) - 1
        logits = base.logits([*sequence.prompt_ids, *sequence.token_ids[:-1]], sequence.slot)[first:]
        found = logits.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        assert float((logits.max(dim=1).values - found).max()) < NEAR_TIE
        torch.testing.assert_close(torch.tensor(sequence.logprobs), found - logits.logsumexp(dim=1), atol=1e-4, rtol=0)
    if num_tokens is not None:
        assert len(sequence.token_ids) == num_tokens


EVENTS = st.lists(
    st.tuples(
        st.integers(0, len(TECHNIQUES)),  # the slot
        st.integers(1, 40),  # tokens of the prompt
        st.booleans(),  # begins like the others
        st.integers(1, 12),  # tokens of the answer
        st.integers(0, 6),  # steps before the next one comes
        st.one_of(st.none(), st.integers(0, 10)),  # cancelled after so many steps
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@settings(max_examples=12, deadline=None)
@given(events=EVENTS, chunk=st.sampled_from([1, 7, 512]), rows=st.sampled_from([None, 3]))
def test_everybody_gets_the_answer_of_a_full_recompute(
    model_type: str, events: list[tuple[Any, ...]], chunk: int, rows: int | None
) -> None:
    base, slots = served(model_type)
    engine = Engine(base, (), EngineSettings(max_sequences=5, chunk_size=chunk))
    if rows is not None:
        engine.pool.max_bytes = rows * 2 * SMALLEST * engine.pool.token_bytes
    everybody: list[tuple[Running, int, int | None]] = []
    steps = 0
    for number, (kind, length, alike, num_new, pause, patience) in enumerate(events):
        slot = slots[kind]
        ids = [(20 + k if alike else 3 * k + number) % 300 + 1 for k in range(length)]
        own = Running(prompt(slot, ids), slot.number if slot else 0, SamplingParams(max_new_tokens=num_new))
        engine.add(own)
        everybody.append((own, num_new, None if patience is None else steps + patience))
        for _ in range(pause):
            engine.step()
            steps += 1
            _lose_patience(engine, everybody, steps)
    while not engine.idle:
        engine.step()
        steps += 1
        _lose_patience(engine, everybody, steps)
        assert steps < 2000
    assert engine.pool.used_bytes == 0
    for own, num_new, patience in everybody:
        assert own.cache is None
        check(base, own, num_new if patience is None else None)


def _lose_patience(engine: Engine, everybody: list[tuple[Running, int, int | None]], steps: int) -> None:
    for own, _, until in everybody:
        if until is not None and steps >= until and own.finish_reason is None:
            engine.cancel(own)
            assert own.cache is None


def test_when_memory_runs_out_the_last_waits_and_its_answer_goes_on() -> None:
    base, _ = served("llama")
    engine = Engine(base, (), prefixes=PrefixCache(0))
    engine.pool.max_bytes = 4 * SMALLEST * engine.pool.token_bytes
    batch = [Running([k + 1] * 60, 0, SamplingParams(max_new_tokens=50)) for k in range(3)]
    for sequence in batch:
        engine.add(sequence)
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, engine.pool.num_bytes)
    assert most <= engine.pool.max_bytes
    assert engine.num_prefilled == 180, "what came back after making room is not counted as a prompt"
    for sequence in batch:
        check(base, sequence, 50)


def test_what_can_never_fit_is_refused_at_once() -> None:
    base, _ = served("llama")
    engine = Engine(base, (), EngineSettings(max_kv_bytes=1))
    with pytest.raises(ResourceError, match="30 tokens need more memory"):
        engine.add(Running([1] * 20, 0, SamplingParams(max_new_tokens=10)))
    engine = Engine(base, (), EngineSettings(max_waiting=2))
    for _ in range(2):
        engine.add(Running([1], 0, SamplingParams()))
    with pytest.raises(OverloadedError, match="2 requests wait already"):
        engine.add(Running([1], 0, SamplingParams()))


def test_no_slots_crowd_keeps_another_out() -> None:
    base, slots = served("llama")
    assert slots[1] is not None
    engine = Engine(base, (), EngineSettings(max_sequences=2))
    crowd = [Running([k + 1] * 5, 0, SamplingParams(max_new_tokens=4)) for k in range(6)]
    late = Running([9] * 5, slots[1].number, SamplingParams(max_new_tokens=4))
    for sequence in (*crowd, late):
        engine.add(sequence)
    engine.step()
    assert late.token_ids, "it is the first of its slot"
    assert sum(bool(s.token_ids) for s in crowd) == 1


def test_one_customization_with_broken_weights_hurts_nobody_else() -> None:
    base = tiny_base()
    good, bad = (base.host.attach([LoRA(rank=2)], seed=s) for s in range(2))
    with torch.no_grad():
        for slot in (good, bad):
            for parameter in slot.parameters.values():
                parameter.add_(0.1)
        next(iter(bad.parameters.values()))[0, 0] = float("nan")
    engine = Engine(base, ())
    batch = [Running([5, 6, 7], number, SamplingParams(max_new_tokens=6)) for number in (0, good.number, bad.number)]
    for sequence in batch:
        engine.add(sequence)
    while not engine.idle:
        engine.step()
    assert isinstance(batch[2].error, QualityError)
    for sequence in batch[:2]:
        check(base, sequence, 6)
    again = [Running([8, 9], 0, SamplingParams(max_new_tokens=3)) for _ in range(3)]
    engine.run(again)
    for sequence in again:
        check(base, sequence, 3)


def test_an_echoed_prompt_has_the_logprobs_of_one_pass() -> None:
    base, _ = served("llama")
    engine = Engine(base, (), EngineSettings(chunk_size=3, tokens_per_pass=4))
    ids = list(range(30, 50))
    sequence = Running(ids, 0, SamplingParams(max_new_tokens=2, num_top_logprobs=3), echoes=True)
    engine.run([Running(ids, 0, SamplingParams(max_new_tokens=1))])
    engine.run([sequence])
    logprobs = base.logits(ids).log_softmax(1)
    assert list(sequence.prompt_tokens) == list(range(1, len(ids)))
    assert [token.token_id for token in sequence.prompt_tokens.values()] == ids[1:]
    for place, token in enumerate(sequence.prompt_tokens.values()):
        assert token.logprob == pytest.approx(float(logprobs[place, ids[place + 1]]), abs=1e-5)
        assert len(token.top) == 3
        assert token.top[0][1] == pytest.approx(float(logprobs[place].max()), abs=1e-5)
    assert sequence.num_cached == 0


def test_prompting_and_soft_prompts_share_the_plain_bases_beginning() -> None:
    base, slots = served("llama")
    soft, prompting = slots[6], slots[8]
    assert soft is not None
    assert prompting is not None
    engine = Engine(base, ())
    lead = list(range(100, 140))
    engine.run([Running([*lead, 1], 0, SamplingParams(max_new_tokens=2))])
    told = Running([*lead, 2, 3], prompting.number, SamplingParams(max_new_tokens=2))
    inside = Running([*lead, *soft.virtual_ids, 4], soft.number, SamplingParams(max_new_tokens=2))
    engine.run([told, inside])
    assert told.num_cached == inside.num_cached == len(lead)
    check(base, told, 2)
    check(base, inside, 2)
    other = Running([*soft.virtual_ids, *lead], soft.number, SamplingParams(max_new_tokens=2))
    engine.run([other])
    assert other.num_cached == 0


def test_an_echo_behind_virtual_tokens_and_one_that_had_to_make_room() -> None:
    base, slots = served("llama")
    soft = slots[6]
    assert soft is not None
    ids = list(range(60, 90))
    behind = Running([*soft.virtual_ids, *ids], soft.number, SamplingParams(max_new_tokens=1), echoes=True)
    Engine(base, ()).run([behind])
    logprobs = base.logits([*soft.virtual_ids, *ids], soft.number).log_softmax(1)
    echoed = LocalBackend(base, {"soft": soft}).echoed(behind)
    assert echoed[0] is None
    for place, token in enumerate(echoed[1:], len(soft.virtual_ids) + 1):
        assert token is not None
        assert token.logprob == pytest.approx(float(logprobs[place - 1, behind.prompt_ids[place]]), abs=1e-5)
    engine = Engine(base, (), prefixes=PrefixCache(0))
    engine.pool.max_bytes = 4 * SMALLEST * engine.pool.token_bytes
    batch = [Running([k + 1] * 60, 0, SamplingParams(max_new_tokens=50), echoes=True) for k in range(3)]
    engine.run(batch)
    assert [len(sequence.prompt_tokens) for sequence in batch] == [59] * 3


def broken(base: Base, technique: Any) -> Slot:
    slot = base.host.attach([technique], seed=3)
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.fill_(float("nan"))
    return slot


def test_what_is_no_number_is_never_kept_for_others() -> None:
    base = tiny_base()
    soft = broken(base, PromptTuning(num_virtual_tokens=2))
    engine = Engine(base, ())
    lead = list(range(100, 140))
    engine.run([Running([*lead, *soft.virtual_ids, 5], soft.number, SamplingParams(max_new_tokens=2))])
    assert engine.prefixes.num_bytes == 0
    engine.run([own := Running([*lead, 7], 0, SamplingParams(max_new_tokens=3))])
    check(base, own, 3)


def test_one_that_leaves_before_its_first_token_leaves_nothing_in_its_row() -> None:
    base = tiny_base()
    bad = broken(base, LoRA(rank=2))
    engine = Engine(base, (), EngineSettings(chunk_size=8, tokens_per_pass=40))
    long = Running(list(range(50)), 0, SamplingParams(max_new_tokens=12))
    engine.add(long)
    while not long.token_ids:
        engine.step()
    engine.add(leaving := Running([9] * 60, bad.number, SamplingParams(max_new_tokens=2)))
    engine.step()
    assert leaving.cache is not None
    engine.cancel(leaving)
    engine.add(short := Running([5, 6], 0, SamplingParams(max_new_tokens=6)))
    while not engine.idle:
        engine.step()
    check(base, long, 12)
    check(base, short, 6)


def test_a_stop_text_that_reaches_into_what_the_template_adds_is_cut_off() -> None:
    renderer = NANO
    said = renderer.tokenizer.encode("yes.", continues=True)
    assert answer_text(renderer, said, ("s.",)) == "ye"
    assert answer_text(renderer, [*said, renderer.stop[0]], ("never",)) == "yes."
