"""Probes: what a customization costs in use, whether it shares a batch with others, and what the base forgot."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from tailor.data.examples import Example
from tailor.errors import DataError, ResourceError
from tailor.evaluation.likelihood import packed_logprobs, slot_number
from tailor.evaluation.parity import COARSE
from tailor.evaluation.passes import finite
from tailor.inference.backend import SamplingParams
from tailor.inference.engine import Engine, EngineSettings
from tailor.inference.local import LocalBackend
from tailor.inference.prefix_cache import PrefixCache
from tailor.inference.scheduler import Running
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.text.messages import Message

Prompts = Sequence[Sequence[Message]]

SINGLE_PROMPTS = 4
"""So many prompts, evenly spread, are also asked alone."""

SINGLE_TOKENS = 6
"""So many tokens of a request that runs alone are timed: the next ones take as long."""

NEAR_TIE = 1e-4
"""In nats: closer than this, rounding decides which of two tokens is the likeliest."""

GENERAL_TEXT = Path(__file__).with_name("general_text.txt")


@dataclass(frozen=True, slots=True)
class Latency:
    """Speed of one customization: seconds, tokens as the base sees them (means), floating-point operations.

    The first three are medians of requests that run alone, `time_to_first_shared` of those that follow another one:
    what both begin with (shots, virtual tokens) is computed already. `seconds_per_request` is that of `num_requests`
    requests which run together, each computed in full. Every request gets `completion_tokens` new tokens.
    """

    time_to_first_token: float
    time_to_first_shared: float | None
    seconds_per_token: float
    prompt_tokens: float
    completion_tokens: float
    seconds_per_request: float
    flops_per_request: float
    num_requests: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return dataclasses.asdict(self)


def latency(
    backend: LocalBackend,
    names: Sequence[str | None],
    prompts: Prompts,
    *,
    models: Mapping[str, LocalBackend] | None = None,
    max_new_tokens: int = 16,
    repeats: int = 3,
) -> dict[str | None, Latency]:
    """How fast each customization (None: the plain base) answers, from messages in to tokens out, greedily.

    `models` are others beside them, each a base of its own (merged, fully fine-tuned). All take turns inside every
    repeat, so that a busy machine slows all of them alike. Answers never stop early: all have `max_new_tokens` tokens
    (at least 2). Prompts that leave no room for them under some name are left out for all names. Raises ResourceError
    when none is left, DataError when there is none.
    """
    assert max_new_tokens >= 2, "the time per further token takes two tokens"
    targets = {name: (backend, name) for name in names} | {name: (own, None) for name, own in (models or {}).items()}
    asked = _fitting(backend, list(dict.fromkeys(names)), prompts, max_new_tokens)
    single = asked[:: -(-len(asked) // SINGLE_PROMPTS)]
    for target in targets.values():
        _answer_one(*target, asked[0], 2)  # the first passes of a process are slow
    firsts: dict[str | None, list[float]] = {name: [] for name in targets}
    shared: dict[str | None, list[float]] = {name: [] for name in targets}
    furthers: dict[str | None, list[float]] = {name: [] for name in targets}
    together: dict[str | None, list[float]] = {name: [] for name in targets}
    for _ in range(repeats):
        for number, prompt in enumerate(single):
            for name, target in targets.items():
                first, further = _answer_one(*target, prompt, min(max_new_tokens, SINGLE_TOKENS))
                firsts[name].append(first)
                furthers[name] += further
                if len(single) > 1:
                    shared[name].append(_answer_one(*target, prompt, 1, single[number - 1])[0])
        for name, target in targets.items():
            together[name].append(_answer_all(*target, asked, max_new_tokens))
    found = {}
    for name, (own, customization) in targets.items():
        lengths = [len(own.rendering(customization).prompt(prompt)) for prompt in asked]
        slot = own.slot(customization)
        found[name] = Latency(
            time_to_first_token=median(firsts[name]),
            time_to_first_shared=median(shared[name]) if shared[name] else None,
            seconds_per_token=median(furthers[name]),
            prompt_tokens=fmean(lengths),
            completion_tokens=float(max_new_tokens),
            seconds_per_request=median(together[name]) / len(asked),
            flops_per_request=fmean(request_flops(own.base, slot, n, max_new_tokens) for n in lengths),
            num_requests=len(asked),
        )
    return found


def request_flops(base: Base, slot: Slot | None, prompt_tokens: int, completion_tokens: int) -> float:
    """Floating-point operations of one request alone, with a cache and nothing shared with other requests.

        n = prompt_tokens + completion_tokens - 1                          tokens that are processed: the last is not
        2 · n · (weights of the decoder's matrices + those of the slot's deltas)       a multiplication and an addition
        + 4 · layers · heads · head_size · (n (n + 1) / 2 + n · prefix)    scores and weighted values, over all before
        + 2 · completion_tokens · (weights of the head)                    logits only where a token is chosen

    As in Kaplan et al. 2020, arXiv:2001.08361, section 2.1 (2N + 2·layers·context·attention size per token), there for
    a mean context. A token meets only its share of the experts. Norms, activations and sliding windows do not count;
    virtual tokens are tokens of the prompt.
    """
    config = base.config
    n = prompt_tokens + completion_tokens - 1
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = n * (n + 1) / 2 + n * (slot.prefix.num if slot and slot.prefix else 0)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_size * seen
    deltas = slot.num_operations() if slot else 0
    head = 2 * completion_tokens * base.head.weight.numel()
    return float(2 * n * (_matrix_weights(base) + deltas) + attention + head)


def _matrix_weights(base: Base) -> float:
    """Weights of the matrices that a token meets between embedding and head."""
    model = base.model
    tables = [p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()]
    apart = {id(parameter) for parameter in [*tables, base.head.weight]}
    total = 0.0
    for parameter in model.parameters():
        if parameter.ndim >= 2 and id(parameter) not in apart:
            experts = parameter.shape[0] if parameter.ndim == 3 else 0
            share = base.config.num_experts_per_tok / experts if experts else 1.0
            total += parameter.numel() * share
    return total


@dataclass(frozen=True, slots=True)
class Mixed:
    """One customization's requests in company against alone: `max_difference` of token logprobs, in nats.

    Texts are compared up to the token at which they part. `passed`: within the tolerance, and parted at near ties only.
    """

    max_difference: float
    same_tokens: bool
    passed: bool


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """Requests of all `names` ("base" is the plain base) in one batch against each request alone."""

    names: tuple[str, ...]
    passed: bool
    max_difference: float
    same_tokens: bool
    per_name: dict[str, Mixed]
    num_requests: int
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {**dataclasses.asdict(self), "names": list(self.names)}


def mixed_batch(
    backend: LocalBackend,
    names: Sequence[str | None],
    prompts: Prompts,
    *,
    max_new_tokens: int = 12,
    tolerance: float | None = None,
) -> MixedBatch:
    """Answer every prompt under every name and the plain base: each request alone, then all of them in one batch.

    All requests enter in one pass, interleaved, and stay together to the end. Tokens may differ only where the two
    likeliest are nearer than the tolerance, logprobs by no more than it: 1e-4 in fp32; in bf16 and fp16, where other
    company means other rounding, what follows from the plain base's own noise (parity's gate). Raises as `latency`
    does, and QualityError when some logprob is no number.
    """
    everyone = list(dict.fromkeys([None, *names]))
    asked = _fitting(backend, everyone, prompts, max_new_tokens)
    order = [(name, prompt) for prompt in asked for name in everyone]
    alone = [_together(backend, [request], max_new_tokens)[0] for request in order]
    in_company = _together(backend, order, max_new_tokens)
    if tolerance is None:
        plain = [sequence for (name, _), sequence in zip(order, alone, strict=True) if name is None]
        tolerance = _tolerance(backend, plain, asked, max_new_tokens)
    per_name: dict[str, Mixed] = {}
    for name in everyone:
        pairs = [(alone[k], in_company[k]) for k, (who, _) in enumerate(order) if who == name]
        for sequence in [sequence for pair in pairs for sequence in pair]:
            finite(torch.tensor([*sequence.logprobs, math.nan] if sequence.error else sequence.logprobs), name)
        per_name[name or "base"] = _compare(backend.base, pairs, tolerance)
    return MixedBatch(
        tuple(per_name),
        all(mixed.passed for mixed in per_name.values()),
        max(mixed.max_difference for mixed in per_name.values()),
        all(mixed.same_tokens for mixed in per_name.values()),
        per_name,
        len(order),
        tolerance,
    )


def _tolerance(backend: LocalBackend, alone: Sequence[Running], asked: Prompts, max_new_tokens: int) -> float:
    """How far apart company alone may bring two runs of the same request, by the precision of the base."""
    if backend.base.dtype in (torch.float32, torch.float64):
        return NEAR_TIE
    packed = _together(backend, [(None, prompt) for prompt in asked], max_new_tokens)
    return COARSE.gate(max(_apart(a, b, _shared(a, b)) for a, b in zip(alone, packed, strict=True)))


def _compare(base: Base, pairs: Sequence[tuple[Running, Running]], tolerance: float) -> Mixed:
    worst, same, near = 0.0, True, True
    for alone, mixed in pairs:
        shared = _shared(alone, mixed)
        worst = max(worst, _apart(alone, mixed, shared))
        if shared < len(alone.token_ids):
            gap, moved = _parting(base, alone, mixed, shared)
            same, near, worst = False, near and gap < tolerance, max(worst, moved)
    return Mixed(worst, same, near and worst <= tolerance)


def _shared(first: Running, second: Running) -> int:
    """How many tokens two answers begin with in common."""
    pairs = list(zip(first.token_ids, second.token_ids, strict=True))
    return next((k for k, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _apart(first: Running, second: Running, length: int) -> float:
    """The largest difference between the logprobs of the first `length` tokens."""
    pairs = zip(first.logprobs[:length], second.logprobs[:length], strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0)


def _parting(base: Base, alone: Running, mixed: Running, k: int) -> tuple[float, float]:
    """Where texts part at place k: by how many nats the likeliest token leads alone, and how far the other's moved."""
    logprobs = base.logits([*alone.prompt_ids, *alone.token_ids[:k]], alone.slot)[-1].log_softmax(dim=0)
    best, second = logprobs.topk(2).values.tolist()
    return float(best - second), abs(float(logprobs[mixed.token_ids[k]]) - mixed.logprobs[k])


@dataclass(frozen=True, slots=True)
class Forgetting:
    """Perplexity over the `num_tokens` counted tokens of texts that are not the task."""

    perplexity: float
    num_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return dataclasses.asdict(self)


def forgetting(
    backend: LocalBackend, names: Sequence[str | None], texts: Sequence[str]
) -> dict[str | None, Forgetting]:
    """Perplexity of each customization (None: the plain base) on plain texts, without a chat template.

    The slot acts as it always does: its virtual tokens lead, its deltas are on. Prompting rewrites chats and leaves a
    plain text alone: its perplexity is the base's, computed once. Longer texts are cut into windows that fit the
    context under every name. The same tokens count for all: those with a token of the text, or what the tokenizer puts
    before it, in front of them. Raises DataError when no token counts, ResourceError when virtual tokens fill the
    context, QualityError when some logprob is no number.
    """
    slots = {name: slot if (slot := backend.slot(name)) and slot.parameters else None for name in names}
    virtual = {slot: slot.virtual_ids if slot else () for slot in slots.values()}
    taken = [len(slot.virtual_ids) + slot.num_prefix for slot in slots.values() if slot]
    windows = _windows(backend, texts, max(taken, default=0))
    found: dict[Slot | None, Forgetting] = {}
    for name, slot in slots.items():
        if slot in found:
            continue
        examples = [Example([*virtual[slot], *ids], [0] * len(virtual[slot]) + mask) for ids, mask in windows]
        scored = packed_logprobs(backend.base, slot, examples, tokens_per_batch=backend.engine.tokens_per_pass)
        logprobs = finite(torch.cat(scored), name).double()
        # held at e^700, so that a hopeless model still gets a number
        found[slot] = Forgetting(math.exp(min(-float(logprobs.mean()), 700.0)), len(logprobs))
    return {name: found[slot] for name, slot in slots.items()}


def _windows(backend: LocalBackend, texts: Sequence[str], num_virtual: int) -> list[tuple[list[int], list[int]]]:
    """(token ids, loss mask) of the texts' windows."""
    base = backend.base
    lead = base.tokenizer.leading_ids()
    before = max(1, len(lead))  # without a lead, the first word has nothing before it
    room = min(base.max_seq_len, backend.engine.tokens_per_pass) - num_virtual - len(lead)
    if room < 2:
        raise ResourceError(f"{num_virtual} virtual tokens leave no room for text in a context of {base.max_seq_len}")
    windows = []
    for text in texts:
        ids = base.tokenizer.encode(text)
        for start in range(0, len(ids), room):
            window = [*lead, *ids[start : start + room]]
            if len(window) > before:
                windows.append((window, [0] * before + [1] * (len(window) - before)))
    if not windows:
        raise DataError("the texts hold no token to predict", hint="give at least one text of a few words")
    return windows


def general_texts() -> list[str]:
    """Short English passages about everything and nothing, written for this project."""
    return [line for line in GENERAL_TEXT.read_text("utf-8").splitlines() if line]


def _fitting(
    backend: LocalBackend, names: Sequence[str | None], prompts: Prompts, max_new_tokens: int
) -> list[Sequence[Message]]:
    """The prompts that leave room for the answer under every name."""
    if not prompts:
        raise DataError("a probe needs at least one prompt")
    fits = {}
    for name in names:
        room = backend.base.room(backend.slot(name)) - max_new_tokens
        fits[name] = [len(backend.rendering(name).prompt(prompt)) <= room for prompt in prompts]
    kept = [prompt for k, prompt in enumerate(prompts) if all(fits[name][k] for name in names)]
    if not kept:
        tightest = min(names, key=lambda name: sum(fits[name]))
        raise ResourceError(
            f"none of {len(prompts)} prompts leaves room for {max_new_tokens} tokens in the base's context of "
            f"{backend.base.max_seq_len} under every name ({sum(fits[tightest])} do with {tightest or 'the base'})",
            hint="probe with shorter prompts",
        )
    return kept


def _sequence(backend: LocalBackend, name: str | None, prompt: Sequence[Message], max_new_tokens: int) -> Running:
    number = slot_number(backend.slot(name))
    return Running(backend.rendering(name).prompt(prompt), number, SamplingParams(max_new_tokens=max_new_tokens))


def _together(
    backend: LocalBackend, requests: Sequence[tuple[str | None, Sequence[Message]]], max_new_tokens: int
) -> list[Running]:
    """Answers that never stop early; all requests are in every pass, from the first to the last."""
    sequences = [_sequence(backend, name, prompt, max_new_tokens) for name, prompt in requests]
    room = sum(len(s.prompt_ids) for s in sequences)
    int8 = backend.engine.settings.int8
    limits = EngineSettings(max_sequences=len(sequences), tokens_per_pass=room, max_prefix_bytes=0, int8=int8)
    Engine(backend.base, (), limits).run(sequences)
    return sequences


def _answer_one(
    backend: LocalBackend,
    name: str | None,
    prompt: Sequence[Message],
    num_tokens: int,
    earlier: Sequence[Message] | None = None,
) -> tuple[float, list[float]]:
    """Seconds to the first token of a request that runs alone, and from each token to the next.

    With `earlier`, another prompt was answered before, and what both begin with is known.
    """
    settings = EngineSettings(int8=backend.engine.settings.int8)
    engine = Engine(backend.base, (), settings, prefixes=PrefixCache(0) if earlier is None else None)
    if earlier is not None:
        engine.run([_sequence(backend, name, earlier, 1)])
    times = [time.perf_counter()]

    def goes_on(_: Sequence[int]) -> bool:  # asked after every token
        times.append(time.perf_counter())
        return False

    sequence = _sequence(backend, name, prompt, num_tokens)
    sequence.ended = goes_on
    engine.run([sequence])
    first, *further = (after - before for before, after in itertools.pairwise(times))
    return first, further


def _answer_all(backend: LocalBackend, name: str | None, prompts: Prompts, num_tokens: int) -> float:
    """Seconds for all requests, batched as they are served."""
    start = time.perf_counter()
    sequences = [_sequence(backend, name, prompt, num_tokens) for prompt in prompts]
    Engine(backend.base, (), backend.engine.settings.model_copy(update={"max_prefix_bytes": 0})).run(sequences)
    return time.perf_counter() - start
