"""Per-token logprobs at loss positions only, chunked, recomputed in backward.

N loss positions, H hidden size, V vocabulary. The (N, V) logits never exist at once: a chunk of rows is projected,
reduced to one number per row, and thrown away; backward projects it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_NUMBERS = 1 << 22
"""Logits of a chunk: 16 MiB in fp32. The C library keeps and reuses pieces of that size, and gives larger ones back."""
MANY_NUMBERS = 1 << 26
"""Where large chunks are better."""


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits: x → cap·tanh(s·(W x + b)/cap).

    `scale` s is 1/logits_scaling for Granite, `softcap` is Gemma 2's final soft-capping (arXiv:2408.00118 section 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(…, H) → (…, V) in fp32 (float64 for a float64 base). `out` is memory of that shape and type to use again."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        wide = torch.promote_types(z.dtype, torch.float32)
        z = z.to(wide) if out is None or z.dtype == wide else out.copy_(z)
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def chunk_rows(weight: Tensor) -> int:
    """How many rows a chunk has for output weights (V, H). Trained ones want few: each adds a whole (V, H) gradient."""
    small = weight.device.type == "cpu" and not weight.requires_grad
    return max(1, (CHUNK_NUMBERS if small else MANY_NUMBERS) // weight.shape[0])


def token_logprobs(hidden: Tensor, head: Head, targets: Tensor, chunk: int | None = None) -> Tensor:
    """Log-probability of each target: hidden (N, H), targets (N,) → (N,) in fp32, differentiable in hidden and head.

    `chunk` rows are projected at a time.
    """
    chunk = chunk or chunk_rows(head.weight)
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, head.scale, head.softcap, chunk)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(z)[target] = z[target] - logsumexp(z), and its gradient (onehot - softmax(z))."""

    @staticmethod
    def forward(  # noqa: PLR0913  (autograd passes them flat)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        head = Head(weight, bias, scale, softcap)
        chosen, totals = [], []
        memory = _memory(hidden, weight, chunk)
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            z = head.logits(rows, memory[: len(rows)])
            chosen.append(z.gather(1, wanted[:, None])[:, 0])
            highest = z.amax(dim=1)
            totals.append(z.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest))
        ctx.head, ctx.chunk, ctx.has_bias = (scale, softcap), chunk, bias is not None
        total = torch.cat(totals)
        ctx.save_for_backward(hidden, weight, targets, total, *([bias] if bias is not None else []))
        return torch.cat(chosen) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, total, *rest = ctx.saved_tensors
        bias = rest[0] if ctx.has_bias else None
        scale, softcap = ctx.head
        head = Head(weight, bias, scale, softcap)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if ctx.needs_input_grad[2] else None
        memory = _memory(hidden, weight, ctx.chunk)
        for start in range(0, hidden.shape[0], ctx.chunk):
            stop = start + ctx.chunk
            rows, wanted, g = hidden[start:stop], targets[start:stop], grad[start:stop, None]
            z = head.logits(rows, memory[: len(rows)])
            slope = None if softcap is None else 1 - (z / softcap) ** 2
            dz = z.sub_(total[start:stop, None]).exp_().mul_(-scale * g)
            dz.scatter_add_(1, wanted[:, None], scale * g)
            dz = (dz if slope is None else dz.mul_(slope)).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[start:stop] = dz @ weight
            if grad_weight is not None:
                grad_weight += dz.t() @ rows
            if grad_bias is not None:
                grad_bias += dz.sum(dim=0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


def _memory(hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Memory for the logits of one chunk: asking for it once, not once per chunk, saves clearing its pages again."""
    shape = min(chunk, hidden.shape[0]), weight.shape[0]
    return torch.empty(shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
