"""Dropout masks that depend on who they are for, not on who else is in the pass. And the seeds they come from."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tailor.models.host import SlotHost
    from tailor.models.plan import Plan, Span


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


def stable_seed(key: str) -> int:
    """A 63-bit seed from a text; the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
