"""Attention in blocks equals the attention of each sequence by itself, forward and backward, in every layout."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tailor.data.packing import Segment
from tailor.models.attention import attention
from tailor.models.block_attention import LONG, SHORT, Blocks, Scores, block_attention

HEADS, GROUPS, SIZE = 4, 2, 8


def side_by_side(*lengths: int, slots: tuple[int, ...] = ()) -> list[Segment]:
    segments, at = [], 0
    for k, length in enumerate(lengths):
        segments.append(Segment(at, at + length, slots[k] if slots else 0))
        at += length
    return segments


def family() -> list[Segment]:
    """A beginning of 150 tokens, two sequences that continue it, the second of them the beginning of two more."""
    lengths, parents, positions = (150, 20, 90, 5, 7), (-1, 0, 0, 2, 2), (0, 150, 150, 240, 240)
    segments, at = [], 0
    for length, parent, position in zip(lengths, parents, positions, strict=True):
        segments.append(Segment(at, at + length, parent=parent, position0=position))
        at += length
    return segments


LAYOUTS = {
    "one token": side_by_side(1),
    "short": side_by_side(3, 5, 1, 40, 30, 2),
    "long": side_by_side(2 * LONG + 17),
    "exact": side_by_side(LONG, SHORT, SHORT),
    "mixed": side_by_side(5, LONG + 1, 7, 60, 300),
    "slots": side_by_side(5, 6, 7, 8, slots=(0, 0, 1, 2)),
    "family": family(),
}


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, segments: list[Segment], window: int | None, softcap: float | None
) -> Tensor:
    """The reference: the keys of each sequence are those of its parents and its own."""
    out = []
    for segment in segments:
        rows, row = [segment], segment
        while row.parent >= 0:
            row = segments[row.parent]
            rows.insert(0, row)
        keys, values = (torch.cat([t[:, s.start : s.end] for s in rows], dim=1)[None] for t in (k, v))
        out.append(attention(q[None, :, segment.start : segment.end], keys, values, None, window, softcap)[0])
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_equal_the_sequences_one_by_one(layout: str, window: int | None, softcap: float | None) -> None:
    segments = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        return torch.randn(heads, segments[-1].end, SIZE, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = draw(HEADS), draw(GROUPS), draw(GROUPS)
    blocks = Blocks.of(segments, len(segments), HEADS // GROUPS, window, torch.float64)
    ours = block_attention(q, k, v, blocks, Scores(SIZE**-0.5, softcap))
    theirs = one_by_one(q, k, v, segments, window, softcap)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    grad = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(theirs, (q, k, v), grad)
    for mine, other in zip(torch.autograd.grad(ours, (q, k, v), grad), expected, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)


def test_every_token_is_the_query_of_one_block_and_blocks_keep_slots_apart() -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.choice((1, 3, 20, 63, 64, 65, 127, 128, 129, 400)) for _ in range(draw.randrange(1, 12))]
        slots = tuple(sorted(draw.randrange(3) for _ in lengths))
        segments = side_by_side(*lengths, slots=slots)
        blocks = Blocks.of(segments, len(segments), 1, None, torch.float32)
        assert [b.start for b in blocks.blocks] == [0, *(b.end for b in blocks.blocks[:-1])]
        assert blocks.blocks[-1].end == sum(lengths)
        for block in blocks.blocks:
            assert block.end - block.start <= LONG
            tokens = {t for start, end in block.ranges for t in range(start, end)} | set(range(block.start, block.end))
            assert len({s.slot for s in segments if tokens & set(range(s.start, s.end))}) == 1
        assert blocks.disjoint == (max(lengths) <= LONG)


def test_bfloat16_is_as_close_to_the_truth_as_the_stock_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    segments = LAYOUTS["mixed"]
    exact = [torch.randn(h, segments[-1].end, 64, generator=generator, dtype=torch.float64) for h in (4, 2, 2)]
    grad = torch.randn(segments[-1].end, 4, 64, generator=generator, dtype=torch.float64)

    def errors(function: str, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.to(dtype).requires_grad_() for t in exact)
        if function == "blocks":
            out = block_attention(q, k, v, Blocks.of(segments, len(segments), 2, None, dtype), Scores(64**-0.5))
        else:
            out = one_by_one(q, k, v, segments, None, None)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(dtype))]

    truth = errors("stock", torch.float64)
    ours, stock = errors("blocks", torch.bfloat16), errors("stock", torch.bfloat16)
    for a, b, t in zip(ours, stock, truth, strict=True):
        assert (a - t).square().mean().sqrt() < 2.0 * (b - t).square().mean().sqrt()
