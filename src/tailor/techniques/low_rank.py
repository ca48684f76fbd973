"""The tensors of the LoRA family: how A and B start, a weight's leading singular vectors, the norms of its rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tailor.models.linear import Terms

Start = Literal["kaiming", "gaussian", "xavier", "normal", "zero"]

EXACT = 512
"""Up to this many rows or columns, whichever are fewer, singular vectors come from the full decomposition."""

POWER_ITERATIONS = 16
PART = 1 << 22
"""Numbers of a weight that are worked on at once in a wider type."""


def started(kind: Start, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A factor's first values. The rank is the first of A's sizes.

    kaiming: uniform within 1/√in (Kaiming with a = √5), as in the authors' code and PEFT. gaussian: N(0, 1/rank²), as
    in PEFT. xavier: N(0, 2 / (rows + columns)), and normal: N(0, 0.2²), as in NeMo.
    """
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "kaiming":
        bound = 1.0 / math.sqrt(shape[1])
        return torch.rand(shape, generator=generator) * (2 * bound) - bound
    deviation = {"gaussian": 1.0 / shape[0], "xavier": math.sqrt(2.0 / sum(shape)), "normal": 0.2}[kind]
    return deviation * torch.randn(shape, generator=generator)


def leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(√S Vᵀ (rank, I), U √S (O, rank)) of the `rank` largest singular values of a weight (O, I), in at least fp32.

    Large weights go through block power iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4) with twice the
    rank, which PiSSA (arXiv:2404.02948, section 3) found good enough. Always from the same random block: training that
    goes on must find the same start.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if min(wide.shape) <= max(EXACT, 2 * rank):
        u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        block = torch.randn(wide.shape[1], 2 * rank, generator=torch.Generator().manual_seed(0))
        q = torch.linalg.qr(wide @ block.to(wide))[0]
        for _ in range(POWER_ITERATIONS):
            q = torch.linalg.qr(wide @ torch.linalg.qr(wide.t() @ q)[0])[0]
        u, s, vh = torch.linalg.svd(q.t() @ wide, full_matrices=False)
        u = q @ u
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def squared_row_norms(weight: Tensor) -> Tensor:
    """(O,) of a weight (O, I), in at least fp32."""
    return torch.cat([part.square().sum(1) for part in _parts(weight)])


def dora_terms(low_rank: Terms, weight: Tensor, squared: Tensor, magnitude: Tensor) -> Terms:
    """m / |W + c B A| as the output's scale, and B multiplied by it (arXiv:2402.09353, equation 5).

    The norm of each row is a constant in the backward pass (section 4.3). It comes in closed form, with no matrix as
    large as W: |W|² + 2c W Aᵀ · B + c² B (A Aᵀ) · B, products of rows; `squared` is |W|². A row of zeros stays one.
    """
    a, b, scale = low_rank.a, low_rank.b, low_rank.scale
    assert a is not None
    assert b is not None
    with torch.no_grad():
        cross = torch.cat([part @ a.t() for part in _parts(weight)])
        change = 2 * scale * (cross * b).sum(1) + scale**2 * ((b @ (a @ a.t())) * b).sum(1)
        norm = (squared + change).clamp_min(torch.finfo(b.dtype).tiny).sqrt()
    ratio = magnitude / norm
    return Terms(a, ratio[:, None] * b, scale, output_scale=ratio)


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """Some rows of a weight after others, in at least fp32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    for rows in weight.split(max(1, PART // weight.shape[1])):
        yield rows.to(wide)
