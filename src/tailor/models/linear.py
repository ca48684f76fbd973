"""A frozen linear layer that every slot may change in its own way, all slots in one autograd function.

Notation: T packed tokens, I and O the layer's input and output sizes, r a rank, x_TI etc. For the tokens of each span

    y = o ⊙ W (i ⊙ x) + c · B A dropout(x) + b'        b' = b + d, or o ⊙ b + d

which is LoRA, rsLoRA, DoRA, PiSSA, VeRA (low rank), IA3 (i or o) and BitFit (d), alone or together, and merges into
W' = diag(o) W diag(i) + c·B A. W never gets a gradient here; its product is one matmul for all slots together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tailor.models.bank import KEPT_BANKS, Bank, Change, changed
from tailor.models.dropout import keep_mask
from tailor.models.nf4 import NF4Linear

if TYPE_CHECKING:
    from tailor.models.host import SlotHost
    from tailor.models.plan import Plan, Span


class Terms(NamedTuple):
    """What a technique does to a layer, as it stands in this pass: the letters of the formula above.

    a (r, I), b (O, r), input_scale i (I,), output_scale o (O,), bias d (O,). `scales_bias`: o multiplies the layer's
    own bias too.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    input_scale: Tensor | None = None
    output_scale: Tensor | None = None
    scales_bias: bool = False
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LinearDelta:
    """One technique's change of one linear layer. `terms()` gives its tensors; `dropout` is on the input of A."""

    terms: Callable[[], Terms]
    dropout: float = 0.0

    @staticmethod
    def of(terms: Terms, dropout: float = 0.0) -> LinearDelta:
        """The change whose tensors are parameters or constants as they are."""
        return LinearDelta(lambda: terms, dropout)

    def num_operations(self) -> int:
        """Multiplications per token on top of the layer's own."""
        return sum(t.numel() for t in self.terms() if isinstance(t, Tensor))


def merged(weight: Tensor, bias: Tensor | None, deltas: Sequence[LinearDelta]) -> tuple[Tensor, Tensor | None]:
    """W' (O, I) and b' (O,) of a layer with its deltas folded in, in at least fp32; b' None with neither b nor d."""
    every = [delta.terms() for delta in deltas]
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    for terms in every:
        if terms.input_scale is not None:
            weight = weight * terms.input_scale
        if terms.output_scale is not None:
            weight = terms.output_scale[:, None] * weight
            bias = terms.output_scale * bias if bias is not None and terms.scales_bias else bias
    for terms in every:
        if terms.a is not None and terms.b is not None:
            weight = weight + terms.scale * (terms.b @ terms.a)
        if terms.bias is not None:
            bias = terms.bias if bias is None else bias + terms.bias
    return weight, bias


class _LowRank(NamedTuple):
    """Where A and B stand among the function's tensors, and what belongs to this pass."""

    a: int
    b: int
    scale: float
    keep: Tensor | None  # (t, I) dropout mask already divided by the keep probability


class _Part(NamedTuple):
    """What happens to the tokens start to end. Numbers are places among the function's tensors, -1 for none."""

    start: int
    end: int
    low_ranks: tuple[_LowRank, ...]
    input_scale: int = -1
    output_scale: int = -1
    bias: int = -1

    @property
    def rows(self) -> slice:
        return slice(self.start, self.end)


class SlotLinear(nn.Module):
    """Wraps a Linear or Conv1D. Slots that do not touch it, and the plain base, get the layer's own result."""

    def __init__(self, base: nn.Module, name: str, host: SlotHost) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.deltas: dict[int, list[LinearDelta]] = {}
        self._banks: OrderedDict[tuple[Any, ...], Bank] = OrderedDict()
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
        touched = [span for span in plan.spans if span.slot in self.deltas]
        if not touched:
            return self.base(x)  # type: ignore[no-any-return]
        assert x.numel() == plan.segments[-1].end * self.in_features, "these are not the plan's tokens"
        flat = x.reshape(-1, self.in_features)
        if not torch.is_grad_enabled() and not plan.training:
            return self._banked(flat, plan, touched).view(*x.shape[:-1], self.out_features)
        tensors: list[Tensor] = []
        parts = [self._part(plan, span, tensors, x) for span in touched]
        weight: Tensor | NF4Linear
        if isinstance(self.base, NF4Linear):
            weight = self.base
        else:
            weight = self.weight.t() if self.transposed else self.weight
        flat = _SlotAffine.apply(flat, weight, self.bias, parts, *tensors)  # type: ignore[no-untyped-call]
        return flat.view(*x.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    def _banked(self, x: Tensor, plan: Plan, touched: Sequence[Span]) -> Tensor:
        """(t, I) → (t, O) without a record for backward; spans of few tokens are changed together."""
        pieces = [(rows, self._bank(plan, slots)) for rows, slots in plan.rows_of(touched, x.device)]
        if not all(bank.finite for _, bank in pieces):
            pieces = [(plan.rows_alone(span, x.device), self._bank(plan, (span.slot,))) for span in touched]
        return changed(self.base, x, self.bias, pieces)

    def _bank(self, plan: Plan, slots: tuple[int, ...]) -> Bank:
        """The slots' changes as their parameters are now; the banks used last are kept."""
        host = self.slot_host
        key = (host.dtype, *((number, plan.state_of(host.slots[number])) for number in slots))
        if key in self._banks:
            self._banks.move_to_end(key)
        else:
            like = next(self.base.parameters(), torch.empty(0, dtype=host.dtype, device=host.device))
            changes = [self.change_of(number) for number in slots]
            self._banks[key] = Bank.of(changes, like.new_empty(0, dtype=host.dtype))
            if len(self._banks) > KEPT_BANKS:
                self._banks.popitem(last=False)
        return self._banks[key]

    def change_of(self, slot: int) -> Change:
        """What the deltas of one slot come to together."""
        low_ranks = []
        inputs, outputs, of_bias, offset = None, None, None, None
        for delta in self.deltas[slot]:
            terms = delta.terms()
            inputs, outputs = _product(inputs, terms.input_scale), _product(outputs, terms.output_scale)
            of_bias = _product(of_bias, terms.output_scale if terms.scales_bias else None)
            if terms.bias is not None:
                offset = terms.bias if offset is None else offset + terms.bias
            if terms.a is not None and terms.b is not None:
                low_ranks.append((terms.a, terms.b, terms.scale))
        if of_bias is not None and self.bias is not None:
            change = self.bias.to(of_bias.dtype) * (of_bias - 1.0)
            offset = change if offset is None else offset + change
        return Change(tuple(low_ranks), inputs, outputs, offset)

    def _part(self, plan: Plan, span: Span, tensors: list[Tensor], x: Tensor) -> _Part:
        """One span's part; its tensors are added to those of the function."""

        def place(tensor: Tensor | None) -> int:
            if tensor is None:
                return -1
            tensors.append(tensor)
            return len(tensors) - 1

        deltas = self.deltas[span.slot]
        change = self.change_of(span.slot)
        ranked = [(k, delta) for k, delta in enumerate(deltas) if delta.terms().a is not None]
        low_ranks = []
        for (number, delta), (a, b, scale) in zip(ranked, change.low_ranks, strict=True):
            keep = None
            if delta.dropout and plan.training:
                name = f"{self.name}/{number}" if number else self.name
                keep = keep_mask(self.slot_host, plan, span, name, delta.dropout, x[..., :0, :])
            low_ranks.append(_LowRank(place(a), place(b), scale, keep))
        others = place(change.inputs), place(change.outputs), place(change.offset)
        return _Part(span.start, span.end, tuple(low_ranks), *others)


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left * right


class _SlotAffine(torch.autograd.Function):
    """The base product, and what each span adds to or multiplies into its own rows, in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | NF4Linear, bias: Tensor | None, parts: Sequence[_Part], *tensors: Tensor
    ) -> Tensor:
        ctx.layer = weight if isinstance(weight, NF4Linear) else None
        narrow = [tensor.to(x.dtype) for tensor in tensors]
        scaled = x
        if any(part.input_scale >= 0 for part in parts):
            scaled = x.clone()
            for part in parts:
                if part.input_scale >= 0:
                    scaled[part.rows] *= narrow[part.input_scale]
        y = nn.functional.linear(scaled, weight.dense() if isinstance(weight, NF4Linear) else weight, bias)
        kept: list[Tensor] = []
        for part in parts:
            rows, out = x[part.rows], y[part.rows]
            if part.output_scale >= 0:
                own = out if bias is None else out - bias
                kept.append(own.clone() if bias is None else own)
                torch.mul(own, narrow[part.output_scale], out=out)
                if bias is not None:
                    out += bias
            for low in part.low_ranks:
                inner = (rows if low.keep is None else rows * low.keep) @ narrow[low.a].t()
                out.addmm_(inner, narrow[low.b].t(), alpha=low.scale)
                kept.append(inner)
            if part.bias >= 0:
                out += narrow[part.bias]
        ctx.parts = parts
        ctx.num_tensors = len(tensors)
        # a quantised weight is computed again: kept, those of all layers would be the whole base once more
        ctx.save_for_backward(x, weight if isinstance(weight, Tensor) else None, *tensors, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, *saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.num_tensors], iter(saved[ctx.num_tensors :])
        grads: list[Tensor | None] = [None] * len(tensors)
        parts: Sequence[_Part] = ctx.parts
        through = grad  # the gradient at W (i ⊙ x)
        if any(part.output_scale >= 0 for part in parts):
            through = grad.clone()
        needs_x = ctx.needs_input_grad[0]
        low_grads: list[tuple[_Part, _LowRank, Tensor]] = []
        for part in parts:
            rows_grad = grad[part.rows]
            if part.output_scale >= 0:
                scale = tensors[part.output_scale]
                grads[part.output_scale] = _sum(rows_grad * next(kept), scale)
                through[part.rows] *= scale.to(grad.dtype)
            if part.bias >= 0:
                grads[part.bias] = _sum(rows_grad, tensors[part.bias])
            for low in part.low_ranks:
                a, b, inner = tensors[low.a], tensors[low.b], next(kept)
                rows = x[part.rows] if low.keep is None else x[part.rows] * low.keep
                grad_inner = low.scale * (rows_grad @ b.to(grad.dtype))
                grads[low.a] = (grad_inner.t() @ rows).to(a.dtype)
                grads[low.b] = (low.scale * (rows_grad.t() @ inner)).to(b.dtype)
                low_grads.append((part, low, grad_inner))
        weight = weight if ctx.layer is None else ctx.layer.dense()
        grad_x = through @ weight if needs_x else None
        for part in parts:
            if part.input_scale >= 0:
                scale = tensors[part.input_scale]
                before = through[part.rows] @ weight if grad_x is None else grad_x[part.rows]
                grads[part.input_scale] = _sum(before * x[part.rows], scale)
                before *= scale.to(grad.dtype)
        for part, low, grad_inner in low_grads if grad_x is not None else []:
            a = tensors[low.a].to(grad.dtype)
            if low.keep is None:
                grad_x[part.rows].addmm_(grad_inner, a)  # type: ignore[index]
            else:
                grad_x[part.rows].addcmul_(grad_inner @ a, low.keep)  # type: ignore[index]
        return (grad_x, None, None, None, *grads)


def _sum(rows: Tensor, like: Tensor) -> Tensor:
    """(t, n) → (n,), summed in the parameter's precision."""
    return rows.sum(0, dtype=like.dtype)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2), quantised or not: a linear layer whose weight is stored (I, O)."""
    if isinstance(module, NF4Linear):
        return module.transposed
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """A layer that a LinearDelta can sit on."""
    return isinstance(module, nn.Linear | SlotLinear | NF4Linear) or is_conv1d(module)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) sizes of a Linear, Conv1D, NF4Linear or SlotLinear."""
    if is_conv1d(module) and not isinstance(module, NF4Linear):
        size_in, size_out = module.weight.shape  # type: ignore[misc]
        return int(size_in), int(size_out)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def weight_of(module: nn.Module) -> Tensor:
    """(O, I): the weight of such a layer, a wrapped one's too; computed anew where it is quantised."""
    base = module.base if isinstance(module, SlotLinear) else module
    return base.weight.t() if is_conv1d(base) else base.weight  # type: ignore[operator, return-value]
