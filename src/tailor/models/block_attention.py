"""Attention over packed sequences in blocks of tokens: what a CPU runs for training and scoring.

T packed tokens, H query heads, G key/value heads of R = H / G queries each, D head size; a block has Q queries and S
keys.

    segments  │ a a a │ b b b b │ c c c c c c c c c c c c │     block 0: queries a b, keys a b
    blocks    └────── 0 ────────┘└───── 1 ────┘└─── 2 ────┘     block 2: the last queries of c, keys c

A call of a stock attention kernel per sequence costs more in calls than in arithmetic when sequences are short, and its
backward is slow in bfloat16. Here a block is a few matrix products over all heads at once. Short sequences share a
block and a mask keeps them apart; long ones are cut, so that no score of a later key is computed. Backward recomputes
the scores of its block (Dao et al. 2022, arXiv:2205.14135, section 3.1): nothing quadratic is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tailor.data.packing import Segment

LONG = 128
"""Queries of a block of one sequence; measured between 64 and 256 (docs/log.md)."""
SHORT = 64
"""Short sequences are gathered up to this many queries: more would mostly compute scores that the mask hides."""


class Block(NamedTuple):
    """Queries start to end, the ranges of tokens that hold their keys, and a mask (Q·R, S): 0 or -inf."""

    start: int
    end: int
    ranges: tuple[tuple[int, int], ...]
    mask: Tensor


@dataclass(frozen=True)
class Blocks:
    """The blocks of a packed row. `disjoint`: no key is used by two of them, so that its gradient is no sum."""

    blocks: tuple[Block, ...]
    disjoint: bool

    @staticmethod
    def of(
        segments: Sequence[Segment], num_queries: int, repeats: int, window: int | None, dtype: torch.dtype
    ) -> Blocks:
        """Blocks for R = `repeats`. A token sees its sequence up to itself and its parents, `window` tokens back.

        The first `num_queries` segments have queries; others are only seen (prefixes).
        """
        lineage = [_lineage(segments, row) for row in range(len(segments))]
        table = torch.zeros(len(segments), len(segments), dtype=torch.bool)
        for row, rows in enumerate(lineage):
            table[row, rows] = True
        owners = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor([s.length for s in segments]))
        positions = torch.arange(len(owners)) + torch.tensor([s.position0 - s.start for s in segments])[owners]
        blocks = []
        for pieces in _gathered(segments[:num_queries]):
            start, end = pieces[0].start, pieces[-1].end
            ranges = _ranges(segments, lineage, pieces, window)
            keys = torch.cat([torch.arange(a, b) for a, b in ranges])
            ours, theirs = positions[start:end, None], positions[keys][None]
            seen = table[owners[start:end, None], owners[keys][None]] & (theirs <= ours)
            if window is not None:
                seen &= theirs > ours - window
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
            blocks.append(Block(start, end, ranges, mask.repeat_interleave(repeats, dim=0)))
        used = sum(b - a for block in blocks for a, b in block.ranges)
        return Blocks(tuple(blocks), disjoint=used == len(owners))


@dataclass(frozen=True)
class Scores:
    """How scores come from queries and keys: x → cap·tanh(scale·x / cap), without a cap scale·x."""

    scale: float
    softcap: float | None = None


class _Piece(NamedTuple):
    row: int
    start: int
    end: int


def _lineage(segments: Sequence[Segment], row: int) -> list[int]:
    """The row and its parents."""
    rows = [row]
    while segments[rows[-1]].parent >= 0:
        rows.append(segments[rows[-1]].parent)
    return rows


def _gathered(segments: Sequence[Segment]) -> list[list[_Piece]]:
    """Pieces of sequences, block by block: whole short ones together, long ones cut.

    Never of two slots: the NaN of one that diverges would pass a mask (NaN + -inf), and must not reach another.
    """
    blocks: list[list[_Piece]] = []
    room, slot = 0, -1
    for row, segment in enumerate(segments):
        if segment.length <= room and segment.slot == slot:
            blocks[-1].append(_Piece(row, segment.start, segment.end))
            room -= segment.length
            continue
        starts = range(segment.start, segment.end, LONG)
        blocks += [[_Piece(row, start, min(start + LONG, segment.end))] for start in starts]
        room, slot = SHORT - segment.length, segment.slot
    return blocks


def _ranges(
    segments: Sequence[Segment], lineage: Sequence[Sequence[int]], pieces: Sequence[_Piece], window: int | None
) -> tuple[tuple[int, int], ...]:
    """Where the keys of a block stand, in order, touching ranges joined."""
    found: set[tuple[int, int]] = set()
    for piece in pieces:
        own, *parents = lineage[piece.row]
        first = segments[own].start
        found.add((first if window is None else max(first, piece.start - window + 1), piece.end))
        found |= {(segments[row].start, segments[row].end) for row in parents}
    merged: list[tuple[int, int]] = []
    for start, end in sorted(found):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def block_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scores: Scores) -> Tensor:
    """q (H, T, D), k and v (G, T, D) → (T, H, D). Differentiable in all three."""
    return _BlockAttention.apply(query, key, value, blocks, scores)  # type: ignore[no-any-return, no-untyped-call]


class _BlockAttention(torch.autograd.Function):
    """softmax(scores + mask) V block by block, and its gradient from recomputed weights.

    Queries lie as (G, T, R, D): the R heads of a group follow one another, so a block is one (G, Q·R, D) view.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scores: Scores) -> Tensor:
        heads, tokens, _ = query.shape
        groups = key.shape[0]
        q = query.unflatten(0, (groups, -1)).transpose(1, 2).contiguous()
        k, v = key.contiguous(), value.contiguous()
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for block in blocks.blocks:
            weights, _ = _weights(_queries(q, block), _rows(k, block), block.mask, scores)
            torch.bmm(weights, _rows(v, block), out=_queries(out, block))
        ctx.blocks, ctx.scores = blocks, scores
        ctx.save_for_backward(q, k, v)
        return out.transpose(0, 1).reshape(tokens, heads, -1)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        scale, blocks = ctx.scores.scale, ctx.blocks
        by_group = grad.unflatten(1, (k.shape[0], -1)).transpose(0, 1).contiguous()
        grad_q = torch.empty_like(q)
        wide = k.dtype if blocks.disjoint else torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for block in blocks.blocks:
            queries, keys, g = _queries(q, block), _rows(k, block), _queries(by_group, block)
            weights, slope = _weights(queries, keys, block.mask, ctx.scores)
            grad_scores = g @ _rows(v, block).transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_scores, weights, -1, weights.dtype)
            if slope is not None:
                grad_scores *= slope
            torch.bmm(grad_scores, keys, out=_queries(grad_q, block))
            _add(grad_k, block, grad_scores.transpose(1, 2) @ queries)
            _add(grad_v, block, weights.transpose(1, 2) @ g)
        grad_q, grad_k = grad_q.mul_(scale), grad_k.mul_(scale)
        return grad_q.transpose(1, 2).flatten(0, 1), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _weights(q: Tensor, k: Tensor, mask: Tensor, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """(G, Q·R, S) attention weights, and the slope of the soft-capping where there is one."""
    if scores.softcap is None:
        logits: Tensor = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=scores.scale)
        return torch.softmax(logits, -1), None
    capped = (q @ k.transpose(1, 2)).mul_(scores.scale / scores.softcap).tanh_()
    return torch.softmax(mask + scores.softcap * capped, -1), 1 - capped.square()


def _queries(tensor: Tensor, block: Block) -> Tensor:
    """(G, T, R, D) → (G, Q·R, D): a view of the block's rows."""
    return tensor[:, block.start : block.end].flatten(1, 2)


def _rows(tensor: Tensor, block: Block) -> Tensor:
    """(G, T, D) → (G, S, D): the block's keys or values."""
    parts = [tensor[:, start:end] for start, end in block.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add(total: Tensor, block: Block, part: Tensor) -> None:
    """Add (G, S, D) to the block's key rows of (G, T, D)."""
    part = part.to(total.dtype)  # in one go: adding tensors of two types is many times slower
    at = 0
    for start, end in block.ranges:
        total[:, start:end] += part[:, at : at + end - start]
        at += end - start
