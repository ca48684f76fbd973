"""Per-token logprobs at loss positions only, chunked, recomputed in backward.

N loss positions, H hidden size, V vocabulary. The (N, V) logits never exist at once: a chunk of rows is projected,
reduced to one number per row, and thrown away; backward projects it again.
"""

from __future__ import annotations

from collections.abc import Callable
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
    `new` (n, H) are a slot's own rows, without bias, for the columns from `first` on: in place of W's, or after them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    new: Tensor | None = None
    first: int = 0

    @property
    def num_logits(self) -> int:
        """V: the columns of the logits, a slot's own included."""
        own = 0 if self.new is None else self.first + self.new.shape[0]
        return max(self.weight.shape[0], own)

    def logits(
        self, hidden: Tensor, out: Tensor | None = None, product: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """(…, H) → (…, V) in fp32 (float64 for a float64 base). `out` is memory of that shape and type to use again.

        `product` computes W x + b in another way.
        """
        z = torch.nn.functional.linear(hidden, self.weight, self.bias) if product is None else product(hidden)
        if self.new is not None:
            own = torch.nn.functional.linear(hidden, self.new.to(hidden.dtype))
            z = torch.cat([z[..., : self.first], own, z[..., self.first + own.shape[-1] :]], dim=-1)
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
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, head.new, targets, head, chunk)  # type: ignore[no-any-return, no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(z)[target] = z[target] - logsumexp(z), and its gradient (onehot - softmax(z))."""

    @staticmethod
    def forward(  # noqa: PLR0913  (autograd passes them flat)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        new: Tensor | None,
        targets: Tensor,
        head: Head,
        chunk: int,
    ) -> Tensor:
        chosen, totals = [], []
        memory = _memory(hidden, head, chunk)
        for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            z = head.logits(rows, memory[: len(rows)])
            chosen.append(z.gather(1, wanted[:, None])[:, 0])
            highest = z.amax(dim=1)
            totals.append(z.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest))
        ctx.facts, ctx.chunk = (head.scale, head.softcap, head.first), chunk
        total = torch.cat(totals)
        ctx.save_for_backward(hidden, weight, targets, total, bias, new)
        return torch.cat(chosen) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, total, bias, new = ctx.saved_tensors
        scale, softcap, first = ctx.facts
        head = Head(weight, bias, scale, softcap, new, first)
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if ctx.needs_input_grad[2] else None
        grad_new = torch.zeros_like(new) if new is not None else None
        memory = _memory(hidden, head, ctx.chunk)
        for start in range(0, hidden.shape[0], ctx.chunk):
            stop = start + ctx.chunk
            rows, wanted, g = hidden[start:stop], targets[start:stop], grad[start:stop, None]
            z = head.logits(rows, memory[: len(rows)])
            slope = None if softcap is None else 1 - (z / softcap) ** 2
            dz = z.sub_(total[start:stop, None]).exp_().mul_(-scale * g)
            dz.scatter_add_(1, wanted[:, None], scale * g)
            dz = (dz if slope is None else dz.mul_(slope)).to(hidden.dtype)
            dz, own = _split(dz, head)
            if grad_hidden is not None:
                grad_hidden[start:stop] = dz @ weight
            if new is not None and own is not None:
                grad_new += (own.t() @ rows).to(new.dtype)
                if grad_hidden is not None:
                    grad_hidden[start:stop] += own @ new.to(own.dtype)
            if grad_weight is not None:
                grad_weight += dz.t() @ rows
            if grad_bias is not None:
                grad_bias += dz.sum(dim=0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            grad_new,
            None,
            None,
            None,
        )


def _split(dz: Tensor, head: Head) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logits, cut into those of the base's columns (0 where a slot's stand for them) and a slot's."""
    if head.new is None:
        return dz, None
    columns = slice(head.first, head.first + head.new.shape[0])
    own = dz[:, columns].clone()
    dz[:, columns] = 0
    return dz[:, : head.weight.shape[0]], own


def _memory(hidden: Tensor, head: Head, chunk: int) -> Tensor:
    """Memory for the logits of one chunk: asking for it once, not once per chunk, saves clearing its pages again."""
    shape = min(chunk, hidden.shape[0]), head.num_logits
    return torch.empty(shape, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
