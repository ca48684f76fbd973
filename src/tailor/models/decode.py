"""Attention of sequences that get one token in a pass, all that stand in one block of a pool in a single call.

n sequences of a block; R query heads for each of G key/value heads; D head size; S the longest sequence's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tailor.data.packing import Segment
from tailor.models.kv_cache import Block, KVCache, RowCache


@dataclass(frozen=True, eq=False)
class Group:
    """The sequences of one block. Tensors are (n,): their `rows`, their `tokens` in the packed row, and where each new
    key goes (`ends`). `asked` (rows,) is the token whose query a row answers; what a row that is not in the pass
    answers is thrown away. `whole`: the tokens are those of the pass, in order; `straight`: and so are the rows."""

    block: Block
    rows: Tensor
    tokens: Tensor
    ends: Tensor
    asked: Tensor
    longest: int
    whole: bool
    straight: bool
    _masks: dict[object, Tensor] = field(default_factory=dict)
    _places: dict[int, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """(rows, 1, 1, S): 0 for the keys that each row's newest token sees, -inf for others."""
        if (window, dtype) not in self._masks:
            newest = torch.zeros_like(self.asked).index_copy_(0, self.rows, self.ends)
            places = torch.arange(self.longest, device=newest.device)[None]
            seen = places <= newest[:, None]
            if window is not None:
                seen &= places > newest[:, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=newest.device).masked_fill_(~seen, float("-inf"))
            self._masks[window, dtype] = mask[:, None, None]
        return self._masks[window, dtype]

    def places(self, num_keys: int) -> Tensor:
        """(n·G,): where the new keys stand among all of a layer's, which are (num·G·size, D)."""
        if num_keys not in self._places:
            heads = self.rows[:, None] * num_keys + torch.arange(num_keys, device=self.rows.device)[None]
            self._places[num_keys] = (heads * self.block.size + self.ends[:, None]).flatten()
        return self._places[num_keys]

    def of_the_pass(self, tensor: Tensor) -> Tensor:
        """(T, …) of the pass's tokens → (n, …) of the group's."""
        return tensor if self.whole else tensor.index_select(0, self.tokens)


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
        groups = tuple(_group(members, segments[-1].end, device) for members in found.values())
        tokens = [start for members in found.values() for start, _ in members]
        order = torch.tensor(tokens, device=device, dtype=torch.long).argsort()
        return Decoding(groups, tuple(left), order)

    def answered(self, parts: Sequence[Tensor]) -> Tensor:
        """(T, …) in the order of the tokens, of the groups' (n, …); for a pass of which nothing is left."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts)).index_select(0, self.order)


def _group(members: Sequence[tuple[int, RowCache]], num_tokens: int, device: torch.device) -> Group:
    rows = [cache.row for _, cache in members]
    ends = [cache.end for _, cache in members]
    tokens = [start for start, _ in members]
    asked = [0] * (max(rows) + 1)
    for start, cache in members:
        asked[cache.row] = start
    block = members[0][1].block
    assert block is not None

    def ids(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device)

    in_order = list(range(num_tokens))
    whole = tokens == in_order
    return Group(
        block, ids(rows), ids(tokens), ids(ends), ids(asked), max(ends) + 1, whole, straight=whole and rows == in_order
    )


class Options(NamedTuple):
    """What a model says of its attention: the factor on scores (1/√D for None), the window, the soft-capping."""

    scaling: float | None
    window: int | None
    softcap: float | None


def decode(group: Group, layer: int, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """Keep the new keys and values, attend: q (T, H, D), k and v (T, G, D) of the whole pass → (n, H, D)."""
    (num_keys, size), heads = key.shape[1:], query.shape[1]
    keys, values = group.block.layer(layer, key, value)
    places = group.places(num_keys)
    for kept, new in ((keys, key), (values, value)):
        kept.view(-1, size).index_copy_(0, places, group.of_the_pass(new).reshape(-1, size))
    num = len(group.asked)
    q = (query if group.straight else query.index_select(0, group.asked)).reshape(num, num_keys, heads // num_keys, -1)
    seen_keys, seen_values = keys[:num, :, : group.longest], values[:num, :, : group.longest]
    window = options.window
    mask = group.mask(window if window is not None and group.longest > window else None, query.dtype)
    if options.softcap is None:
        out = F.scaled_dot_product_attention(q, seen_keys, seen_values, attn_mask=mask, scale=options.scaling)
    else:
        scores = q @ seen_keys.transpose(2, 3) * (size**-0.5 if options.scaling is None else options.scaling)
        scores = options.softcap * torch.tanh(scores / options.softcap)
        wide = torch.promote_types(scores.dtype, torch.float32)
        out = (scores + mask).softmax(dim=-1, dtype=wide).to(q.dtype) @ seen_values
    out = out.reshape(num, heads, -1)
    return out if group.straight else out.index_select(0, group.rows)
