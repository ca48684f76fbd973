"""The small operations between the matrix products, in fewer passes over memory and with less kept for backward.

N rows (tokens), H hidden size, D head size. transformers writes them out in single steps; under autograd a norm alone
is about twenty passes over its input, several of them in float32. `fuse` gives instances of known forms a forward of
their own. The name alone does not make a form: the new forward must give the old one's numbers on a probe, else the
module stays as it is. Nothing else is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tailor.models.nf4 import NF4Linear

CHUNK = 1 << 17
"""Numbers per chunk of a norm: its float32 copies stay in the core's own cache."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """(…, H): (offset + weight) · x / sqrt(mean(x²) + eps), inside in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467).

    `offset` is 1 for Gemma, whose weights are kept around zero.
    """
    if torch.is_grad_enabled() or x.numel() > CHUNK:
        return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-any-return, no-untyped-call]
    # a step of generation: as few calls as can be, and a mean is a slow one
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = torch.addcmul(_constant(eps, wide), length, length, value=1 / x.shape[-1]).rsqrt_()
    normed = (x * inverse).mul_(weight + offset if offset else weight)
    return normed if x.dtype == wide else normed.to(x.dtype)


@cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor (1, 1) on the CPU."""
    return torch.full((1, 1), value, dtype=dtype)


class _RMSNorm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x²) + eps) and g the gradient times the weight: r·g - x·r³·mean(g·x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        out = torch.empty_like(flat)
        inverse = flat.new_empty(len(flat), 1, dtype=wide)
        scale = weight.to(wide) + offset
        for rows, into, r in zip(*_chunks(flat, out, inverse), strict=True):
            values = rows.to(wide)
            torch.linalg.vector_norm(values, dim=-1, keepdim=True, out=r)
            r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            into.copy_((values * r).mul_(scale))
        ctx.offset = offset
        ctx.save_for_backward(x, weight, inverse)
        return out.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        flat, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        wide = inverse.dtype
        scale = weight.to(wide) + ctx.offset
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        out = torch.empty_like(flat)
        grad_weight = torch.zeros_like(scale) if needs_weight else None
        for rows, rows_grad, r, into in zip(*_chunks(flat, flat_grad, inverse, out), strict=True):
            normed, g = rows.to(wide).mul(r), rows_grad.to(wide)
            if grad_weight is not None:
                grad_weight += (g * normed).sum(dim=0)
            if needs_x:
                g = g * scale
                mean = (g * normed).mean(dim=-1, keepdim=True)
                into.copy_(g.addcmul_(normed, mean, value=-1).mul_(r))
        grad_x = out.view_as(x) if needs_x else None
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of (N, …) tensors in equal chunks of about CHUNK numbers of the first."""
    rows = max(1, CHUNK // tensors[0].shape[-1])
    return [tensor.split(rows) for tensor in tensors]


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, keeping its two inputs only (Shazeer 2020, arXiv:2002.05202, section 2)."""
    if not torch.is_grad_enabled():
        return nn.functional.silu(gate).mul_(up)
    return _SiluGate.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), grad_up


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.4.2) of q and k (1, heads, N, D).

    cos and sin (1, N, ≤ D) hold every angle twice, in their first and second half; what lies beyond is not turned.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if not torch.is_grad_enabled():
        return rotated(q, cos, sin), rotated(k, cos, sin)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)  # type: ignore[no-untyped-call]


class _Rotary(torch.autograd.Function):
    """A rotation; its gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, sin, -1.0), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float = 1.0) -> Tensor:
    """x (…, D) turned by angles that are broadcast against it; `direction` -1 turns it back."""
    wide = torch.promote_types(x.dtype, cos.dtype)
    if wide != x.dtype:  # OLMo 2 keeps its angles in float32
        return rotated(x.to(wide), cos, sin, direction).to(x.dtype)
    size = cos.shape[-1]
    half, sine = size // 2, sin[..., : size // 2]
    first, second = x[..., :half], x[..., half:size]
    out = x * cos if size == x.shape[-1] else torch.cat([x[..., :size] * cos, x[..., size:]], dim=-1)
    out[..., :half].addcmul_(second, sine, value=-direction)
    out[..., half:size].addcmul_(first, sine, value=direction)
    return out


@torch.no_grad()
def fuse(model: nn.Module) -> None:
    """Give the norms, gated MLPs and rotary embeddings of `model` that have a known form their fused forward."""
    found: dict[type[nn.Module], Callable[..., Any] | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in found:
            found[kind] = _fused_norm(module) or _fused_mlp(module) or _fused_attention(module)
        if (forward := found[kind]) is not None:
            module.forward = MethodType(forward, module)


def _fused_norm(module: nn.Module) -> Callable[..., Any] | None:
    """rms_norm, when that is what this module computes."""
    weight = getattr(module, "weight", None)
    name = next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or name is None:
        return None
    small = _small(module, weight=nn.Parameter(_probe(6)))
    for offset in (0.0, 1.0):

        def forward(self: Any, hidden_states: Tensor, offset: float = offset) -> Tensor:
            return rms_norm(hidden_states, self.weight, getattr(self, name), offset)

        if _same(small(_probe(5, 6)), forward(small, _probe(5, 6))):
            return forward
    return None


def _fused_mlp(module: nn.Module) -> Callable[..., Any] | None:
    """down(silu(gate(x)) · up(x)), when that is what this module computes."""
    parts = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}
    if not all(isinstance(getattr(module, name, None), nn.Linear | NF4Linear) for name in parts):
        return None

    def forward(self: Any, hidden_states: Tensor) -> Any:
        return self.down_proj(silu_gate(self.gate_proj(hidden_states), self.up_proj(hidden_states)))

    small = _small(module, **{name: nn.utils.skip_init(nn.Linear, *sizes) for name, sizes in parts.items()})
    for seed, (name, (size_in, size_out)) in enumerate(parts.items()):
        layer = small.get_submodule(name)
        layer.weight, layer.bias = nn.Parameter(_probe(size_out, size_in, seed=seed)), nn.Parameter(_probe(size_out))
    return forward if _same(small(_probe(5, 6)), forward(small, _probe(5, 6))) else None


ROTARY = "apply_rotary_pos_emb"


def _fused_attention(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own forward with its name for the rotary embedding bound to ours, when both compute the same."""
    own = type(module).forward
    if not isinstance(own, FunctionType) or ROTARY not in own.__code__.co_names or ROTARY not in own.__globals__:
        return None
    theirs = own.__globals__[ROTARY]
    q, k = _probe(1, 2, 3, 8), _probe(1, 1, 3, 8, seed=1)
    found = []
    for size in (8, 4):  # all of a head is turned, or a part of it where the function allows that
        angles = _probe(1, 3, size // 2).repeat(1, 1, 2)
        try:
            expected = theirs(q, k, angles.cos(), angles.sin())
        except (RuntimeError, TypeError, ValueError):
            continue
        found.append(all(map(_same, expected, rotary(q, k, angles.cos(), angles.sin()))))
    if not found or not all(found):
        return None
    names = {**own.__globals__, ROTARY: rotary}
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def _small(module: nn.Module, **parts: nn.Module | nn.Parameter) -> nn.Module:
    """A copy with small parts in place of its own: it computes the same form, on any device and of any size."""
    small = copy.copy(module)
    small._modules, small._parameters = dict(module._modules), dict(module._parameters)
    for name, part in parts.items():
        setattr(small, name, part)
    return small


def _probe(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _same(theirs: Any, ours: Any) -> bool:
    """Equal up to some units in the last place of the largest number."""
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        return False
    limit = 8 * torch.finfo(theirs.dtype).eps * float(theirs.abs().max())
    return bool((theirs - ours).abs().max() <= limit)
