"""Attention of sequences that get one token in a pass, all that stand in one block of a pool in a single call.

n sequences of a block; R query heads for each of G key/value heads; D head size; S the longest sequence's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tailor.data.packing import Segment
from tailor.models.kv_cache import Block, KVCache, RowCache


@dataclass(frozen=True, eq=False)
class Group:
    """The sequences of one block. Tensors are (n,): their `rows`, their `tokens` in the packed row, and where each new
    key goes (`ends`). `asked` (rows,) is the token whose query a row answers; what a row that is not in the pass
    answers is thrown away."""

    block: Block
    rows: Tensor
    tokens: Tensor
    ends: Tensor
    asked: Tensor
    longest: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """(rows, 1, 1, S) booleans: the keys that each row's newest token sees."""
        if window not in self._masks:
            newest = torch.zeros_like(self.asked).index_copy_(0, self.rows, self.ends)
            places = torch.arange(self.longest, device=newest.device)[None]
            seen = places <= newest[:, None]
            if window is not None:
                seen &= places > newest[:, None] - window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]


@dataclass(frozen=True, eq=False)
class Decoding:
    """What of a pass is decoded in groups, and the numbers of the segments that are `left` for attention one by one.

    `order` (T,) puts the groups' answers, one after the other, into the order of the tokens, when nothing is left.
    """

    groups: tuple[Group, ...]
    left: tuple[int, ...]
    order: Tensor

    @staticmethod
    def of(segments: Sequence[Segment], caches: Sequence[KVCache | RowCache | None], device: torch.device) -> Decoding:
        """Segments of one token whose cache is a row with tokens in it go into groups."""
        found: dict[int, list[tuple[int, RowCache]]] = {}
        left = []
        for number, (segment, cache) in enumerate(zip(segments, caches, strict=True)):
            if isinstance(cache, RowCache) and segment.length == 1 and cache.length > 0:
                found.setdefault(id(cache.block), []).append((segment.start, cache))
            else:
                left.append(number)
        groups = tuple(_group(members, device) for members in found.values())
        tokens = [start for members in found.values() for start, _ in members]
        order = torch.tensor(tokens, device=device, dtype=torch.long).argsort()
        return Decoding(groups, tuple(left), order)


def _group(members: Sequence[tuple[int, RowCache]], device: torch.device) -> Group:
    rows = [cache.row for _, cache in members]
    ends = [cache.end for _, cache in members]
    asked = [0] * (max(rows) + 1)
    for start, cache in members:
        asked[cache.row] = start
    block = members[0][1].block
    assert block is not None

    def ids(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device)

    return Group(block, ids(rows), ids([start for start, _ in members]), ids(ends), ids(asked), max(ends) + 1)


def decode(  # noqa: PLR0913  (those of attention)
    group: Group,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Keep the new keys and values, attend: q (1, H, T, D), k and v (1, G, T, D) of the whole pass → (n, H, D)."""
    keys, values = group.block.layer(layer, key, value)
    keys[group.rows, :, group.ends] = key[0, :, group.tokens].transpose(0, 1)
    values[group.rows, :, group.ends] = value[0, :, group.tokens].transpose(0, 1)
    num, heads, num_keys = len(group.asked), query.shape[1], keys.shape[1]
    q = query[0].index_select(1, group.asked).transpose(0, 1).reshape(num, num_keys, heads // num_keys, -1)
    seen_keys, seen_values = keys[:num, :, : group.longest], values[:num, :, : group.longest]
    limited = window if window is not None and group.longest > window else None
    mask = group.mask(limited)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, seen_keys, seen_values, attn_mask=mask, scale=scaling)
    else:
        scores = q @ seen_keys.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = softcap * torch.tanh(scores / softcap)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=wide)
        out = weights.to(q.dtype) @ seen_values
    return out.reshape(num, heads, -1).index_select(0, group.rows)
