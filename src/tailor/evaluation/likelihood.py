"""Logprobs of given tokens: one packed pass as in training, and every label scored as the completion of every row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tailor.data.examples import Example
from tailor.data.packing import Placed, pack
from tailor.inference.backend import Backend, Request
from tailor.models.base import Base
from tailor.models.slots import BASE_SLOT, Slot
from tailor.text.messages import Message

PROMPTS_PER_CALL = 16


def slot_number(slot: Slot | None) -> int:
    """The slot's number; None is the plain base."""
    return BASE_SLOT if slot is None else slot.number


def packed_logprobs(
    base: Base,
    slot: Slot | None,
    examples: Sequence[Example],
    *,
    tokens_per_batch: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Logprobs of each example's counted tokens, one (n,) per example, packed as the trainer packs them."""
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    done = 0
    for batch in pack([Placed(e, slot_number(slot), k) for k, e in enumerate(examples)], tokens_per_batch):
        for segment, logprobs in zip(batch.segments, base.score_by_segment(batch), strict=True):
            found[segment.index] = logprobs
        done += len(batch.segments)
        if progress is not None:
            progress(done)
    return found


def completion_logprobs(
    backend: Backend,
    artifact: str | None,
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    *,
    ends: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """(num_prompts, num_completions): the summed logprob of every completion after every prompt.

    The tokens of a prompt are computed once for all its completions. With `ends` the end-of-turn token counts, so that
    a completion that begins another one does not win for being short; without, more text follows what is given.
    """
    rows = []
    for start in range(0, len(prompts), PROMPTS_PER_CALL):
        chunk = prompts[start : start + PROMPTS_PER_CALL]
        requests = [Request(prompt, artifact) for prompt in chunk for _ in completions]
        scores = backend.logprobs(requests, list(completions) * len(chunk))
        rows += [float((s if ends else s[:-1]).double().sum()) for s in scores]
        if progress is not None:
            progress(start + len(chunk))
    return torch.tensor(rows, dtype=torch.float64).view(len(prompts), len(completions))
