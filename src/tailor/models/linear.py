"""A frozen linear layer with one low-rank delta per slot, all slots in one autograd function.

Notation: T packed tokens, I and O the layer's input and output sizes, r the rank, x_TI etc.

    y_s = W x_s + b + c · B A dropout(x_s)        for the tokens s of each span

W never gets a gradient here; the base product is one matmul for all slots together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

if TYPE_CHECKING:
    from tailor.models.plan import Plan, Span
    from tailor.models.slots import SlotHost


@dataclass(frozen=True, eq=False)
class LinearDelta:
    """One slot's change of one linear layer: `scale` · B A, with B (O, r) and A (r, I)."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    dropout: float = 0.0

    def weight(self) -> Tensor:
        """The change of W as one (O, I) matrix, in the parameters' precision."""
        return self.scale * (self.b @ self.a)


class _Part(NamedTuple):
    """A span with what the autograd function needs to know of its slot besides the two matrices."""

    start: int
    end: int
    scale: float
    keep: Tensor | None  # (t, I) dropout mask already divided by the keep probability


class SlotLinear(nn.Module):
    """Wraps a Linear or Conv1D. Slots that do not touch it, and the plain base, get the layer's own result."""

    def __init__(self, base: nn.Module, name: str, host: SlotHost) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.deltas: dict[int, LinearDelta] = {}
        self.slot_host = host
        self.transposed = is_conv1d(base)
        self.in_features, self.out_features = linear_sizes(base)

    @property
    def weight(self) -> Tensor:
        """The wrapped layer's weight, in its own layout."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The wrapped layer's bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(…, T, I) → (…, T, O); the tokens must be the running plan's, in its order."""
        plan = self.slot_host.running()
        touched = [(span, self.deltas[span.slot]) for span in plan.spans if span.slot in self.deltas]
        if not touched:
            return self.base(x)  # type: ignore[no-any-return]
        assert x.numel() == plan.segments[-1].end * self.in_features, "these are not the plan's tokens"
        parts = [_Part(span.start, span.end, delta.scale, self._keep(plan, span, delta, x)) for span, delta in touched]
        matrices = [m for _, delta in touched for m in (delta.a, delta.b)]
        weight = self.weight.t() if self.transposed else self.weight
        flat = _SlotAffine.apply(x.reshape(-1, self.in_features), weight, self.bias, parts, *matrices)  # type: ignore[no-untyped-call]
        return flat.view(*x.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    def _keep(self, plan: Plan, span: Span, delta: LinearDelta, x: Tensor) -> Tensor | None:
        if delta.dropout == 0.0 or not plan.training:
            return None
        seed, step = self.slot_host.slots[span.slot].seed, plan.steps.get(span.slot, 0)
        masks = []
        for segment in plan.segments:
            if span.start <= segment.start < span.end:
                key = f"{seed}/{step}/{self.name}/{segment.index}/{segment.group}/{segment.position0}"
                generator = torch.Generator(x.device).manual_seed(stable_seed(key))
                noise = torch.rand(segment.length, self.in_features, generator=generator, device=x.device)
                masks.append((noise >= delta.dropout).to(x.dtype))
        return torch.cat(masks) / (1.0 - delta.dropout)


class _SlotAffine(torch.autograd.Function):
    """The base product plus each span's low-rank product, added in place to its rows of the result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, parts: Sequence[_Part], *matrices: Tensor
    ) -> Tensor:
        y = nn.functional.linear(x, weight, bias)
        saved: list[Tensor] = []
        for k, part in enumerate(parts):
            a, b = matrices[2 * k].to(x.dtype), matrices[2 * k + 1].to(x.dtype)
            rows = x[part.start : part.end]
            rows = rows if part.keep is None else rows * part.keep
            inner = rows @ a.t()
            y[part.start : part.end].addmm_(inner, b.t(), alpha=part.scale)
            saved += [rows, inner]
        ctx.parts = parts
        ctx.num_matrices = len(matrices)
        ctx.save_for_backward(weight, *matrices, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Any, ...]:
        weight, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
        matrices, saved = tensors[: ctx.num_matrices], tensors[ctx.num_matrices :]  # type: ignore[attr-defined]
        needs_x = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        grad_x = grad @ weight if needs_x else None
        grads: list[Tensor] = []
        for k, part in enumerate(ctx.parts):  # type: ignore[attr-defined]
            a, b, rows, inner = matrices[2 * k], matrices[2 * k + 1], saved[2 * k], saved[2 * k + 1]
            rows_grad = grad[part.start : part.end]
            grad_inner = part.scale * (rows_grad @ b.to(grad.dtype))
            grads.append((grad_inner.t() @ rows).to(a.dtype))
            grads.append((part.scale * (rows_grad.t() @ inner)).to(b.dtype))
            if grad_x is None:
                continue
            if part.keep is None:
                grad_x[part.start : part.end].addmm_(grad_inner, a.to(grad.dtype))
            else:
                grad_x[part.start : part.end].addcmul_(grad_inner @ a.to(grad.dtype), part.keep)
        return (grad_x, None, None, None, *grads)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer whose weight is stored (I, O)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """A layer that a LinearDelta can sit on."""
    return isinstance(module, nn.Linear | SlotLinear) or is_conv1d(module)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) sizes of a Linear, Conv1D or SlotLinear."""
    if is_conv1d(module):
        size_in, size_out = module.weight.shape  # type: ignore[misc]
        return int(size_in), int(size_out)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def stable_seed(key: str) -> int:
    """A 63-bit seed from a text; the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
