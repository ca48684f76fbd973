"""Linear layers that read the same input, their weights side by side and laid out as the processor wants them.

A step of generation multiplies few rows with every weight of the model: its time is that of reading the weights, and of
the calls. oneDNN reads half-precision weights faster in a layout of its own; float32 ones are stored by inputs.

n rows, I inputs, O outputs: the sum of the layers'. What is packed is a copy of the weights as they are now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

ROWS = 16
"""Rows that oneDNN is told to expect; any number is right."""


class Product(Protocol):
    """What multiplies with the weights of some layers: x (n, I) → (n, O), biases included."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The layers' output sizes."""

    @property
    def bias(self) -> Tensor | None:
        """(O,), if one of the layers has one."""

    def __call__(self, x: Tensor) -> Tensor:
        """The product."""


class Weight:
    """A weight (O, I) that nobody learns, with its bias; kept for `few_rows` where those are what it will meet."""

    def __init__(self, dense: Tensor, bias: Tensor | None = None, *, few_rows: bool = True) -> None:
        self.bias = bias
        self._packed = few_rows and packs(dense.dtype) and dense.device.type == "cpu"
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(dense, ROWS)
        else:  # stored by inputs: up to twice as quick for 4 to 16 rows, the same for one
            self._weight = dense.t().contiguous().t() if few_rows else dense

    def __call__(self, x: Tensor) -> Tensor:
        """x W' + bias: (n, I) → (n, O)."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self.bias, "none", [], "")  # type: ignore[no-any-return]
        return nn.functional.linear(x, self._weight, self.bias)

    def add(self, y: Tensor, x: Tensor, scale: float = 1.0) -> None:
        """y (n, O) += scale · x W', in place, for a weight without bias."""
        if self._packed:
            y.add_(self(x), alpha=scale)
        else:
            y.addmm_(x, self._weight.t(), alpha=scale)


class PackedLinear(Weight):
    """The product in the weights' own precision."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(*_joined(layers))
        self.sizes = tuple(layer.out_features for layer in layers)


class Int8Linear:
    """The product of integers: weights rounded to 8 bits with a scale per output, x with a scale per row.

    Symmetric absmax quantisation, as in LLM.int8() without its outliers (Dettmers et al. 2022, arXiv:2208.07339,
    section 2.1): y = (s_x ⊙ s_w) · round(x / s_x) round(W / s_w)', with s = max|·| / 127 over I. Integers add up
    exactly, so a row's result does not depend on the other rows.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.sizes = tuple(layer.out_features for layer in layers)
        dense, self.bias = _joined(layers)
        self._scales = _absmax(dense.float())
        levels = (dense.float() / self._scales).round_().to(torch.int8)
        self._scales = self._scales[:, 0]
        self._weight = torch.ops.onednn.qlinear_prepack(levels, None)
        self._zeros = torch.empty(0, dtype=torch.int64)  # none: symmetric

    def __call__(self, x: Tensor) -> Tensor:
        """(n, I) → (n, O)."""
        scale = _absmax(x.float())
        levels = (x / scale).round_().to(torch.int8)
        if len(x) == 1:  # for one row of some sizes there is only oneDNN's reference, hundreds of times slower
            levels = levels.expand(2, -1)
        y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            *(levels, 1.0, 0, self._weight, self._scales, self._zeros, None, 1.0, 0, x.dtype, "none", [], "")
        )
        y = y[: len(x)].mul_(scale.to(x.dtype))
        return y if self.bias is None else y.add_(self.bias)


def _absmax(rows: Tensor) -> Tensor:
    """(n, 1): what 127 stands for in each row, over 127; rows of zeros stay zeros."""
    return rows.abs().amax(-1, True).clamp_(min=1e-12).mul_(1 / 127)


def _joined(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weights (O, I) and biases (O,) of layers side by side."""
    weights = [layer.weight.detach() for layer in layers]
    dense = weights[0] if len(weights) == 1 else torch.cat(weights)
    if all(layer.bias is None for layer in layers):
        return dense, None
    biases = [dense.new_zeros(f.out_features) if f.bias is None else f.bias.detach() for f in layers]
    return dense, torch.cat(biases)


def has_int8(dtype: torch.dtype) -> bool:
    """Whether products of integers are there for this precision, and right on this processor (some saturate)."""
    if dtype not in (torch.float32, torch.bfloat16) or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    layer = nn.utils.skip_init(nn.Linear, 64, 32, bias=False, dtype=dtype)
    layer.weight.data.fill_(1.0)  # 127 · 127 · 64 is what an accumulator of 16 bits has no room for
    try:
        return bool((Int8Linear([layer])(torch.ones(3, 64, dtype=dtype)) == 64).all())
    except (RuntimeError, AttributeError):
        return False


def packs(dtype: torch.dtype) -> bool:
    """Whether weights of this precision have a layout of their own here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
