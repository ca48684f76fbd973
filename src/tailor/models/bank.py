"""What many slots do to one linear layer, side by side: what generation and scoring use, where nothing is learned.

t tokens, I and O the layer's sizes, n slots, R the sum of their ranks. Tokens of a slot that are few (a step of
generation has one per sequence) share two matrix products with those of all other slots: x A' is taken for everybody's
A at once, and a mask leaves each token what its own slot has of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tailor.models.packed import Weight

KEPT_BANKS = 32
"""Banks of a layer that are kept: sequences come and go, and with them the slots that a pass holds."""


class Change(NamedTuple):
    """One slot's change of the layer, its techniques put together: y = o ⊙ W (i ⊙ x) + Σ c·B A x + d.

    The layer's own bias is added outside of o; where a technique scales it too, d holds the difference.
    """

    low_ranks: tuple[tuple[Tensor, Tensor, float], ...]
    inputs: Tensor | None
    outputs: Tensor | None
    offset: Tensor | None


@dataclass(frozen=True, eq=False)
class Bank:
    """Stacked changes: A (R, I), B (O, R), c (R,) or one number, i (n + 1, I), o (n + 1, O), d (n + 1, O).

    The last row of i, o and d changes nothing. `ranks` says how many rows of A each slot has; `finite` is whether all
    numbers are: what one slot has that is not would reach the others' tokens through the product.
    """

    ranks: tuple[int, ...]
    a: Weight | None
    b: Weight | None
    scale: Tensor | float
    inputs: Tensor | None
    outputs: Tensor | None
    offsets: Tensor | None
    finite: bool

    @staticmethod
    @torch.no_grad()
    def of(changes: Sequence[Change], like: Tensor, *, few_rows: bool = False) -> Bank:
        """The bank of some slots' changes in the precision of `like`, for passes of `few_rows` or any."""
        pairs = [pair for change in changes for pair in change.low_ranks]
        scales = [scale for _, _, scale in pairs]
        scale: Tensor | float = 1.0
        if len(set(scales)) == 1:
            scale = scales[0]
        elif scales:
            scale = torch.cat([torch.full((a.shape[0],), c, dtype=torch.float64) for a, _, c in pairs]).to(like)
        a = torch.cat([a.to(like) for a, _, _ in pairs]) if pairs else None
        b = torch.cat([b.to(like) for _, b, _ in pairs], dim=1) if pairs else None
        rows = (
            stacked([change.inputs for change in changes], 1.0, like),
            stacked([change.outputs for change in changes], 1.0, like),
            stacked([change.offset for change in changes], 0.0, like),
        )
        return Bank(
            tuple(sum(a.shape[0] for a, _, _ in change.low_ranks) for change in changes),
            None if a is None else Weight(a, few_rows=few_rows),
            None if b is None else Weight(b, few_rows=few_rows),
            scale,
            *rows,
            finite=all(bool(tensor.isfinite().all()) for tensor in (a, b, *rows) if tensor is not None),
        )

    def before(self, x: Tensor, rows: Rows) -> Tensor:
        """i ⊙ x of (t, I) tokens."""
        return x if self.inputs is None else x * rows.pick(self.inputs)

    def after(self, x: Tensor, y: Tensor, bias: Tensor | None, rows: Rows) -> None:
        """Change y = W (i ⊙ x) + bias (t, O) in place."""
        if self.outputs is not None:
            scale = rows.pick(self.outputs)
            if bias is None:
                y.mul_(scale)
            else:
                y.sub_(bias).mul_(scale).add_(bias)
        if self.a is not None and self.b is not None:
            inner = self.a(x)
            if not rows.alone:
                inner = inner.masked_fill_(rows.foreign(self.ranks), 0)
            if isinstance(self.scale, Tensor):
                self.b.add(y, inner.mul_(self.scale))
            else:
                self.b.add(y, inner, self.scale)
        if self.offsets is not None:
            y.add_(rows.pick(self.offsets))


Piece = tuple["Rows", Bank]
"""Some tokens of a pass, and the bank of their slots."""


def changed(product: Callable[[Tensor], Tensor], x: Tensor, bias: Tensor | None, pieces: Sequence[Piece]) -> Tensor:
    """(t, O) = `product` of (t, I) tokens, which is W x + bias, with the pieces' changes."""
    scaled = x
    if len(pieces) == 1 and pieces[0][0].of(x) is x:
        scaled = pieces[0][1].before(x, pieces[0][0])
    elif any(bank.inputs is not None for _, bank in pieces):
        scaled = x.clone()
        for rows, bank in pieces:
            scaled[rows.start : rows.end] = bank.before(rows.of(x), rows)
    y = product(scaled)
    for rows, bank in pieces:
        bank.after(rows.of(x), rows.of(y), bias, rows)
    return y


class Rows:
    """Whose the tokens start to end of a pass are: `members` (t,) numbers the bank's slots, n for nobody's."""

    def __init__(self, start: int, end: int, members: Tensor, num_slots: int, *, alone: bool) -> None:
        self.start = start
        self.end = end
        self.members = members
        self.alone = alone
        self._num_slots = num_slots
        self._foreign: dict[tuple[int, ...], Tensor] = {}
        self._picked: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """These tokens of all, (T, …) → (t, …): a view."""
        whole = self.start == 0 and self.end == len(tensor)
        return tensor if whole else tensor[self.start : self.end]

    def pick(self, table: Tensor) -> Tensor:
        """(n + 1, …) → (t, …): each token's own row, kept as long as these rows are."""
        if id(table) not in self._picked:
            self._picked[id(table)] = (table, table.index_select(0, self.members))
        return self._picked[id(table)][1]

    def foreign(self, ranks: tuple[int, ...]) -> Tensor:
        """(t, R) booleans: the columns of x A' that are not the token's own."""
        if ranks not in self._foreign:
            device = self.members.device
            owners = torch.arange(self._num_slots, device=device)
            owners = owners.repeat_interleave(torch.tensor(ranks, device=device))
            self._foreign[ranks] = self.members[:, None] != owners[None]
        return self._foreign[ranks]


def side_by_side(changes: Sequence[Change | None], sizes: Sequence[int]) -> Change | None:
    """One slot's change of layers whose outputs, of these sizes, stand side by side; None for a layer it leaves alone.

    None when one of several changes the input that they have in common.
    """
    if len(changes) > 1 and any(change is not None and change.inputs is not None for change in changes):
        return None
    low_ranks = []
    for k, change in enumerate(changes):
        before, after = sum(sizes[:k]), sum(sizes[k + 1 :])
        for a, b, scale in change.low_ranks if change else ():
            low_ranks.append((a, torch.nn.functional.pad(b, (0, 0, before, after)), scale))
    inputs = changes[0].inputs if changes[0] else None
    outputs = _beside([change.outputs if change else None for change in changes], sizes, 1.0)
    offset = _beside([change.offset if change else None for change in changes], sizes, 0.0)
    return Change(tuple(low_ranks), inputs, outputs, offset)


def _beside(parts: Sequence[Tensor | None], sizes: Sequence[int], neutral: float) -> Tensor | None:
    first = next((part for part in parts if part is not None), None)
    if first is None:
        return None
    pairs = zip(parts, sizes, strict=True)
    return torch.cat([first.new_full((size,), neutral) if part is None else part for part, size in pairs])


def stacked(rows: Sequence[Tensor | None], neutral: float, like: Tensor) -> Tensor | None:
    """(n + 1, size): each slot's row, `neutral` where it has none and in the last."""
    first = next((row for row in rows if row is not None), None)
    if first is None:
        return None
    nothing = torch.full_like(first, neutral)
    return torch.stack([nothing if row is None else row for row in (*rows, None)]).to(like)
