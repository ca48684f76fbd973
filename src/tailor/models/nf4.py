"""A frozen linear layer kept in 4 bits (NF4), as QLoRA has it: Dettmers et al. 2023, arXiv:2305.14314, section 3.

A weight is cut into blocks of 64 numbers. A block keeps its largest magnitude, and for every number the nearest of 16
levels, which are quantiles of a normal distribution (appendix E); the magnitudes are kept in 8 bits themselves (double
quantisation). That is 4.13 bits a number. The weight is computed from them where a product needs it, in the forward
and again in the backward pass, and not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tailor.errors import require

BLOCK = 64
"""Numbers that share a magnitude; magnitudes share theirs in blocks of 256 (arXiv:2305.14314, section 3)."""

CHUNK = BLOCK << 12
"""Numbers quantised at a time: on a CPU, bitsandbytes compares every number with all 16 levels at once."""


def quantise(weight: Tensor) -> tuple[Tensor, Any]:
    """(bytes, state) of a weight (O, I), as bitsandbytes' `quantize_4bit` gives them, in pieces."""
    functional: Any = require("bitsandbytes.functional", "quant")
    pieces = [
        functional.quantize_4bit(piece, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
        for piece in weight.detach().contiguous().view(-1).split(CHUNK)
    ]
    magnitudes = torch.cat([state.absmax for _, state in pieces])
    offset = magnitudes.mean()
    small, nested = functional.quantize_blockwise(magnitudes - offset, blocksize=256)
    state = functional.QuantState(
        absmax=small,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=pieces[0][1].code,
        quant_type="nf4",
        offset=offset,
        state2=nested,
    )
    return torch.cat([packed for packed, _ in pieces]), state


class NF4Linear(nn.Module):
    """Stands for a Linear or a Conv1D (`transposed`: its weight is stored as (I, O)).

    `packed` and `state` are what bitsandbytes made of the weight (O, I), in its own layout; `weight` has the layout of
    the layer that this one stands for.
    """

    def __init__(self, packed: Tensor, state: Any, bias: nn.Parameter | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.packed: Tensor
        self.like: Tensor
        self.register_buffer("packed", packed)
        self.register_buffer("like", torch.empty(0, dtype=state.dtype, device=packed.device), persistent=False)
        self.state = state
        self.bias = bias
        self.transposed = transposed
        self.out_features, self.in_features = (int(size) for size in state.shape)
        # bitsandbytes cuts the flat weight into blocks, but on a CPU (0.50.2) it puts them together row by row: wrong
        # numbers wherever a row is no multiple of a block, so a row shall be a block
        blocks = (-1, state.blocksize) if self.num_weights % state.blocksize == 0 else (1, -1)
        state.shape = torch.empty(self.num_weights, device="meta").view(blocks).shape

    @staticmethod
    def of(layer: nn.Module, *, transposed: bool = False) -> NF4Linear:
        """The layer, quantised."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        packed, state = quantise(weight.t() if transposed else weight)
        return NF4Linear(packed, state, layer.bias, transposed=transposed)  # type: ignore[arg-type]

    @torch.no_grad()
    def dense(self) -> Tensor:
        """(O, I): the weight, computed anew at every call. Its values do not depend on the precision asked for."""
        functional: Any = require("bitsandbytes.functional", "quant")
        blocks: Tensor = functional.dequantize_4bit(self.packed, self.state)
        return blocks.view(self.out_features, self.in_features).to(self.like)

    @property
    def weight(self) -> Tensor:
        """`dense`, in the layout of the layer that this one stands for."""
        return self.dense().t() if self.transposed else self.dense()

    @property
    def num_weights(self) -> int:
        """Numbers that the 4 bits stand for; the bias is a parameter and not among them."""
        return self.in_features * self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        return _FrozenProduct.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.state.to(self.packed.device)
        return self


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b, where W is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.dense(), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad @ ctx.layer.dense(), None


def nf4_layers(model: nn.Module) -> dict[str, NF4Linear]:
    """The quantised layers of a model, by the names they have without wrappers."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear))
    return {name.removesuffix(".base"): module for name, module in found}
