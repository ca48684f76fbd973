from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_likelihood import by_logits, shaken
from torch.utils.flop_counter import FlopCounterMode

from tailor.data.examples import Example
from tailor.data.packing import Segment
from tailor.errors import DataError, NotFoundError, QualityError, ResourceError
from tailor.evaluation import probes
from tailor.evaluation.probes import forgetting, general_texts, latency, mixed_batch, request_flops
from tailor.inference.backend import Request, SamplingParams, TokenLogprob
from tailor.inference.engine import Engine
from tailor.inference.local import LocalBackend
from tailor.inference.scheduler import Running
from tailor.models.base import Base
from tailor.models.kv_cache import KVCache
from tailor.models.plan import Plan
from tailor.techniques import LoRA, PromptTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompting import Prompting, Shot
from tailor.text.messages import Message, user
from tiny_models import tiny_base

PROMPTS = [(user("hello there"),), (user("the quick brown fox"),), (user("how are you?"),)]
TEXTS = ["the quick brown fox jumps over the lazy dog", "hello there, how are you? " * 3, "fox"]
NAMES = ["prompting", "soft", "lora"]


def backend_of(base: Base) -> LocalBackend:
    shots = (Shot(prompt="fox", completion="dog"),)
    slots = {
        "prompting": base.host.attach([Prompting(system="Be quick.", shots=1, examples=shots)]),
        "soft": shaken(base.host.attach([PromptTuning(num_virtual_tokens=5)])),
        "lora": shaken(base.host.attach([LoRA(rank=2)])),
    }
    return LocalBackend(base, slots)


@pytest.fixture(scope="module")
def backend() -> LocalBackend:
    return backend_of(tiny_base())


def prompt_lengths(backend: LocalBackend, name: str | None) -> list[int]:
    return [len(backend.rendering(name).prompt(prompt)) for prompt in PROMPTS]


@contextmanager
def passes() -> Iterator[list[Plan]]:
    """The plan of every pass over any base while the block runs."""
    seen: list[Plan] = []
    inner = Base.hidden

    def hidden(self: Base, plan: Plan, *args: Any) -> torch.Tensor:
        seen.append(plan)
        return inner(self, plan, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Base, "hidden", hidden)
        yield seen


# ------------------------------------------------------------------------------------------------ latency


def test_latency_counts_tokens_as_the_base_sees_them(backend: LocalBackend) -> None:
    found = latency(backend, [None, *NAMES], PROMPTS, max_new_tokens=5, repeats=1)
    assert list(found) == [None, *NAMES]
    for name, measured in found.items():
        lengths = prompt_lengths(backend, name)
        assert measured.prompt_tokens == pytest.approx(sum(lengths) / 3)
        assert (measured.completion_tokens, measured.num_requests) == (5.0, 3)
        flops = [request_flops(backend.base, backend.slot(name), length, 5) for length in lengths]
        assert measured.flops_per_request == pytest.approx(sum(flops) / 3)
        assert min(measured.time_to_first_token, measured.seconds_per_token, measured.seconds_per_request) > 0
    assert found["soft"].prompt_tokens == pytest.approx(found[None].prompt_tokens + 5)
    assert found["prompting"].prompt_tokens > found[None].prompt_tokens == found["lora"].prompt_tokens


def test_latency_times_what_it_says(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by 1 s for each pass with a prompt in it, 0.1 s for each pass of single tokens."""
    now = 0.0
    inner = Base.hidden

    def hidden(self: Base, plan: Plan, *args: Any) -> torch.Tensor:
        nonlocal now
        now += 1.0 if any(segment.position0 == 0 for segment in plan.segments) else 0.1
        return inner(self, plan, *args)

    monkeypatch.setattr(Base, "hidden", hidden)
    monkeypatch.setattr(probes.time, "perf_counter", lambda: now)
    for measured in latency(backend, [None, "soft"], PROMPTS, max_new_tokens=10, repeats=2).values():
        assert measured.time_to_first_token == pytest.approx(1.0)
        assert measured.seconds_per_token == pytest.approx(0.1)
        assert measured.seconds_per_request == pytest.approx((1.0 + 9 * 0.1) / 3)
        assert json.loads(json.dumps(measured.to_dict()))["completion_tokens"] == 10.0


def test_the_first_token_after_another_request_skips_what_both_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by 1 s for each token of a pass."""
    now = 0.0
    inner = Base.hidden

    def hidden(self: Base, plan: Plan, *args: Any) -> torch.Tensor:
        nonlocal now
        now += plan.segments[-1].end
        return inner(self, plan, *args)

    monkeypatch.setattr(Base, "hidden", hidden)
    monkeypatch.setattr(probes.time, "perf_counter", lambda: now)
    base = tiny_base()
    shots = (Shot(prompt="fox", completion="dog"), Shot(prompt="the lazy dog", completion="hello there"))
    backend = LocalBackend(base, {"shots": base.host.attach([Prompting(system="Be quick.", examples=shots, shots=2)])})
    questions = [(user("are you?"),), (user("over the dog"),)]
    lengths = [len(backend.rendering("shots").prompt(q)) for q in questions]
    found = latency(backend, ["shots"], questions, repeats=1)["shots"]
    assert found.time_to_first_token == pytest.approx(sum(lengths) / 2)
    assert found.time_to_first_shared is not None
    own = [len(backend.rendering(None).prompt(q)) for q in questions]
    assert found.time_to_first_shared <= max(own) < min(lengths)


def test_names_take_turns_and_no_answer_stops_early() -> None:
    base = tiny_base()
    stop = base.renderer.stop[0]
    with torch.no_grad():  # every answer would end at once
        base.model.get_output_embeddings().weight.zero_()[stop] = 1.0  # type: ignore[operator]
    backend = backend_of(base)
    with passes() as seen:
        latency(backend, [None, "lora"], PROMPTS, max_new_tokens=4, repeats=2)
    lora = backend.slots["lora"].number
    # single requests: 4 passes each and 2 with another before, the plain base's before lora's, prompt by prompt; then
    # both batches
    single, batches = [[0]] * 6 + [[lora]] * 6, [[0] * 3] * 4 + [[lora] * 3] * 4
    expected = (single * 3 + batches) * 2
    assert [[segment.slot for segment in plan.segments] for plan in seen[4:]] == expected
    assert [plan.spans[0].slot for plan in seen[:4]] == [0, 0, lora, lora]


def test_prompts_without_room_are_left_out_for_all(backend: LocalBackend) -> None:
    room = backend.base.max_seq_len - 8
    long = (user("x" * (room - len(backend.base.renderer.prompt([user("")])))),)
    assert [len(backend.rendering(name).prompt(long)) for name in (None, "soft")] == [room, room + 5]
    found = latency(backend, [None, "soft"], [long, PROMPTS[0]], max_new_tokens=8, repeats=1)
    assert {measured.num_requests for measured in found.values()} == {1}
    with pytest.raises(ResourceError, match=r"none of 1 prompts leaves room for 8 tokens.*\(0 do with soft\)"):
        latency(backend, [None, "soft"], [long], max_new_tokens=8, repeats=1)


@pytest.mark.parametrize("probe", [latency, mixed_batch, forgetting])
def test_probes_need_something_to_probe(backend: LocalBackend, probe: Callable[..., Any]) -> None:
    with pytest.raises(DataError):
        probe(backend, [None], [])
    with pytest.raises(NotFoundError, match="'lroa'"):
        probe(backend, ["lroa"], PROMPTS if probe is not forgetting else TEXTS)


# ------------------------------------------------------------------------------------------------ computation


@torch.no_grad()
def counted_flops(base: Base, prompt_tokens: int, completion_tokens: int) -> int:
    """Every matrix product of one request, counted while it runs with attention written as two of them."""
    from tailor.models import attention

    def plainly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any) -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        return (query @ key.transpose(2, 3)).softmax(-1) @ value

    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(attention, "attention", plainly)
        cache = KVCache()
        for k in range(completion_tokens):
            # one token at a time from the start, so that none is multiplied with what it may not see
            new = range(prompt_tokens) if k == 0 else [0]
            for step, _ in enumerate(new):
                plan = Plan.of([Segment(0, 1, position0=cache.length)], caches=[cache])
                with base.host.run(plan):
                    hidden = base.hidden(plan, torch.tensor([7]), torch.tensor([cache.length]))
                    if step == len(new) - 1:
                        base.head.logits(hidden)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi3", "qwen3"])
def test_operations_are_those_that_a_counter_sees(model_type: str) -> None:
    base = tiny_base(model_type)
    rotary = 2 * (8 // 2) * (7 + 4 - 1)  # the counter sees the angles as a matrix product, one for each token
    assert request_flops(base, None, 7, 4) == pytest.approx(counted_flops(base, 7, 4), abs=rotary)


def test_operations_by_hand() -> None:
    base = tiny_base("llama")  # 3 layers, hidden 32, ffn 48, 4 heads of 8, 2 key/value heads, 320 words
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48
    n = 10 + 4 - 1
    plain = 2 * n * 3 * layer + 4 * 3 * 32 * (n * (n + 1) / 2) + 2 * 4 * 320 * 32
    assert request_flops(base, None, 10, 4) == plain
    lora = base.host.attach([LoRA(rank=2, target_modules="query-value")])
    assert request_flops(base, lora, 10, 4) == plain + 2 * n * 3 * 2 * ((32 + 32) + (32 + 16))
    prefix = base.host.attach([PrefixTuning(num_virtual_tokens=5)])  # every token looks at 5 positions more
    assert request_flops(base, prefix, 10, 4) == plain + 4 * 3 * 32 * n * 5


def test_a_token_meets_only_its_experts() -> None:
    base = tiny_base("qwen3_moe")  # 2 of 4 experts of size 16
    attention = 32 * 32 * 2 + 2 * 32 * 16
    layer = attention + 4 * 32 + 2 * 3 * 32 * 16
    assert request_flops(base, None, 1, 1) == 2 * 3 * layer + 4 * 3 * 32 + 2 * 320 * 32


# ------------------------------------------------------------------------------------------------ mixed batch


def test_all_requests_share_every_pass(backend: LocalBackend) -> None:
    with passes() as seen:
        found = mixed_batch(backend, NAMES, PROMPTS, max_new_tokens=6)
    together = seen[12 * 6 :]  # 3 prompts under 4 names ran alone before
    assert {len(plan.segments) for plan in seen[: 12 * 6]} == {1}
    assert len(together) == 6
    numbers = sorted([0, *(slot.number for slot in backend.slots.values())] * 3)
    assert all([segment.slot for segment in plan.segments] == numbers for plan in together)
    assert (found.passed, found.same_tokens, found.num_requests) == (True, True, 12)
    assert found.names == ("base", *NAMES) == tuple(found.per_name)
    assert 0 < found.max_difference <= found.tolerance == 1e-4
    assert found.max_difference == max(mixed.max_difference for mixed in found.per_name.values())
    assert json.loads(json.dumps(found.to_dict()))["per_name"]["lora"]["passed"] is True


def test_a_delta_that_reaches_its_neighbours_is_found(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    number, inner = backend.slots["lora"].number, Plan.of

    def leaking(segments: Sequence[Segment], **settings: Any) -> Plan:
        plan = inner(segments, **settings)
        spans = tuple(span._replace(slot=number) for span in plan.spans)
        return Plan(plan.segments, spans, plan.caches) if len(spans) > 1 else plan

    monkeypatch.setattr(Plan, "of", staticmethod(leaking))
    found = mixed_batch(backend, ["lora"], PROMPTS)
    assert not found.passed
    assert (found.per_name["base"].passed, found.per_name["lora"].passed) == (False, True)
    assert found.per_name["base"].max_difference > 1e-3
    assert found.max_difference == found.per_name["base"].max_difference


def test_texts_may_part_at_near_ties_only() -> None:
    base, prompt = tiny_base(), [1, 4, 70, 71, 6, 5]
    alone = Running(prompt, 0, SamplingParams(max_new_tokens=3))
    Engine(base, ()).run([alone])
    logprobs = base.logits([*prompt, alone.token_ids[0]])[-1].log_softmax(0)
    (best, second), (_, runner_up) = logprobs.topk(2)
    gap = float(best - second)
    # in company the runner-up won by a hair: what comes after it cannot be compared
    tokens = [alone.token_ids[0], int(runner_up), 7]
    other = Running(prompt, 0, alone.sampling, token_ids=tokens)
    logprobs = [alone.logprobs[0], float(second), -50.0]
    other.tokens = [TokenLogprob(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]
    found = probes._compare(base, [(alone, other)], gap / 2)
    assert (found.same_tokens, found.passed) == (False, False)
    assert found.max_difference < 1e-5
    assert probes._compare(base, [(alone, other)], gap * 2).passed
    other.tokens[1] = TokenLogprob(tokens[1], float(second) + 3 * gap)  # won by more than a hair
    assert not probes._compare(base, [(alone, other)], gap * 2).passed
    assert probes._compare(base, [(alone, other)], gap * 2).max_difference == pytest.approx(3 * gap, rel=1e-3)


def test_coarse_precision_is_judged_by_its_own_noise() -> None:
    backend = backend_of(tiny_base(dtype=torch.bfloat16))
    found = mixed_batch(backend, NAMES, PROMPTS)
    assert 0.02 <= found.tolerance <= 1.0
    assert found.passed


def test_a_customization_without_numbers_is_named() -> None:
    backend = backend_of(tiny_base())
    next(iter(backend.slots["lora"].parameters.values())).data.fill_(math.nan)
    with pytest.raises(QualityError, match="lora gives logprobs that are NaN"):
        mixed_batch(backend, NAMES, PROMPTS)
    with pytest.raises(QualityError, match="lora gives logprobs that are NaN"):
        forgetting(backend, [None, "lora"], TEXTS)


def test_probes_leave_the_backend_as_it_was(backend: LocalBackend) -> None:
    engine, requests = backend.engine, [Request(PROMPTS[0], name) for name in (None, *NAMES)]
    before = [completion.token_ids for completion in backend.generate(requests)]
    latency(backend, NAMES, PROMPTS, max_new_tokens=2, repeats=1)
    mixed_batch(backend, NAMES, PROMPTS, max_new_tokens=2)
    assert backend.engine is engine
    assert [completion.token_ids for completion in backend.generate(requests)] == before


# ------------------------------------------------------------------------------------------------ forgetting


def test_perplexity_is_that_of_the_text_behind_the_virtual_tokens(backend: LocalBackend) -> None:
    found = forgetting(backend, [None, *NAMES], TEXTS)
    ids = [backend.base.tokenizer.encode(text) for text in TEXTS]
    counted = sum(len(text) - 1 for text in ids)  # this tokenizer puts nothing before a text
    for name in (None, "soft", "lora"):
        slot = backend.slot(name)
        lead = list(slot.virtual_ids) if slot else []
        examples = [Example(lead + text, [0] * (len(lead) + 1) + [1] * (len(text) - 1)) for text in ids]
        logprobs = [by_logits(backend.base, example, slot) for example in examples if any(example.loss_mask)]
        expected = math.exp(-float(torch.cat(logprobs).double().mean()))
        assert found[name].perplexity == pytest.approx(expected, rel=1e-4)
        assert found[name].num_tokens == counted
    assert found["prompting"] == found[None] != found["lora"]
    assert found[None].to_dict() == {"perplexity": found[None].perplexity, "num_tokens": counted}


def test_prompting_beside_a_delta_still_forgets(backend: LocalBackend) -> None:
    techniques = [Prompting(system="Be quick.", shots=0), LoRA(rank=2)]
    backend.slots["both"] = shaken(backend.base.host.attach(techniques))
    found = forgetting(backend, [None, "both"], TEXTS)
    assert found["both"] != found[None]


def test_what_the_tokenizer_puts_before_a_text_leads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend(tiny_base())
    monkeypatch.setattr(backend.base.tokenizer, "leading_ids", lambda: [1])
    ids = backend.base.tokenizer.encode(TEXTS[0])
    logprobs = by_logits(backend.base, Example([1, *ids], [0] + [1] * len(ids)))
    found = forgetting(backend, [None], TEXTS[:1])[None]
    assert found.num_tokens == len(ids)
    assert found.perplexity == pytest.approx(math.exp(-float(logprobs.mean())), rel=1e-4)


@pytest.mark.parametrize("technique", [PromptTuning, PrefixTuning])
def test_long_texts_are_cut_into_the_same_windows_for_all(technique: type[PromptTuning | PrefixTuning]) -> None:
    base = tiny_base(max_position_embeddings=20)
    soft = base.host.attach([technique(num_virtual_tokens=5)])
    backend = LocalBackend(base, {"soft": soft})
    ids = base.tokenizer.encode("hello there, how are you? " * 9)
    sizes = [min(15, len(ids) - start) for start in range(0, len(ids), 15)]
    found = forgetting(backend, [None, "soft"], ["hello there, how are you? " * 9])
    assert len(sizes) > 2
    assert {each.num_tokens for each in found.values()} == {sum(size - 1 for size in sizes)}
    windows = [ids[start : start + 15] for start in range(0, len(ids), 15)]
    logprobs = [by_logits(base, Example(w, [0] + [1] * (len(w) - 1))) for w in windows if len(w) > 1]
    assert found[None].perplexity == pytest.approx(math.exp(-float(torch.cat(logprobs).mean())), rel=1e-4)


@pytest.mark.parametrize("technique", [PromptTuning, PrefixTuning])
def test_texts_and_contexts_that_leave_nothing_to_predict_are_refused(
    technique: type[PromptTuning | PrefixTuning],
) -> None:
    base = tiny_base(max_position_embeddings=20)
    backend = LocalBackend(base, {"soft": base.host.attach([technique(num_virtual_tokens=19)])})
    with pytest.raises(DataError, match="no token to predict"):
        forgetting(backend, [None], ["", "x"])
    with pytest.raises(ResourceError, match="19 virtual tokens"):
        forgetting(backend, ["soft"], TEXTS)


def test_a_hopeless_customization_still_gets_a_number() -> None:
    backend = backend_of(tiny_base())
    with torch.no_grad():
        backend.base.model.get_output_embeddings().weight.mul_(1e6)  # type: ignore[operator]
    assert forgetting(backend, [None], TEXTS)[None].perplexity == pytest.approx(math.exp(700))


def test_the_general_texts_are_short_passages_all_different() -> None:
    texts = general_texts()
    assert 50 <= len(texts) == len(set(texts)) <= 80
    assert all(40 <= len(text.split()) <= 90 for text in texts)
    assert all(isinstance(Message("user", text).content, str) and text.isascii() for text in texts)
