"""Dropout masks that depend on who they are for, not on who else is in the pass. And the seeds they come from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tailor.models.host import SlotHost
    from tailor.models.plan import Plan, Span
    from tailor.models.slots import Slot


def keep_mask(host: SlotHost, plan: Plan, span: Span, name: str, dropout: float, like: Tensor) -> Tensor:
    """(t, width of `like`) mask of a span's tokens in `like`'s type, already divided by the keep probability.

    Drawn per sequence from (slot seed, step, `name`, the sequence's place in the draw): equal alone, mixed, packed
    otherwise, recomputed and resumed.
    """
    seed, step = host.slots[span.slot].seed, plan.steps.get(span.slot, 0)
    masks = []
    for segment in plan.segments:
        if span.start <= segment.start < span.end:
            key = f"{seed}/{step}/{name}/{segment.index}/{segment.group}/{segment.position0}"
            generator = torch.Generator(like.device).manual_seed(stable_seed(key))
            noise = torch.rand(segment.length, like.shape[-1], generator=generator, device=like.device)
            masks.append((noise >= dropout).to(like.dtype))
    return torch.cat(masks) / (1.0 - dropout)


def keep_mask_of_step(slot: Slot, name: str, dropout: float, like: Tensor) -> Tensor | None:
    """A mask like `like` for what a slot computes once per pass, divided by the keep probability; None: keep all.

    Drawn from (slot seed, step, `name`), so that all micro-batches of a step see the same. Only training passes drop.
    """
    plan = slot.host.plan
    if not dropout or plan is None or not plan.training:
        return None
    key = f"{slot.seed}/{plan.steps.get(slot.number, 0)}/{name}"
    generator = torch.Generator(like.device).manual_seed(stable_seed(key))
    noise = torch.rand(like.shape, generator=generator, device=like.device)
    return (noise >= dropout).to(like.dtype) / (1.0 - dropout)


def stable_seed(key: str) -> int:
    """A 63-bit seed from a text; the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
