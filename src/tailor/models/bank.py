"""What many slots do to one linear layer, side by side: what generation and scoring use, where nothing is learned.

t tokens, I and O the layer's sizes, n slots, R the sum of their ranks. Tokens of a slot that are few (a step of
generation has one per sequence) share two matrix products with those of all other slots: x A' is taken for everybody's
A at once, and a mask leaves each token what its own slot has of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

KEPT_BANKS = 8
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

    The last row of i, o and d changes nothing. `ranks` says how many rows of A each slot has.
    """

    ranks: tuple[int, ...]
    a: Tensor | None
    b: Tensor | None
    scale: Tensor | float
    inputs: Tensor | None
    outputs: Tensor | None
    offsets: Tensor | None

    @staticmethod
    @torch.no_grad()
    def of(changes: Sequence[Change], like: Tensor) -> Bank:
        """The bank of some slots' changes in the precision of `like`."""
        pairs = [pair for change in changes for pair in change.low_ranks]
        scales = [scale for _, _, scale in pairs]
        scale: Tensor | float = 1.0
        if len(set(scales)) == 1:
            scale = scales[0]
        elif scales:
            scale = torch.cat([torch.full((a.shape[0],), c, dtype=torch.float64) for a, _, c in pairs]).to(like)
        return Bank(
            tuple(sum(a.shape[0] for a, _, _ in change.low_ranks) for change in changes),
            torch.cat([a.to(like) for a, _, _ in pairs]) if pairs else None,
            torch.cat([b.to(like) for _, b, _ in pairs], dim=1) if pairs else None,
            scale,
            stacked([change.inputs for change in changes], 1.0, like),
            stacked([change.outputs for change in changes], 1.0, like),
            stacked([change.offset for change in changes], 0.0, like),
        )

    @cached_property
    def finite(self) -> bool:
        """Whether all numbers are: what one slot has that is not would reach the others' tokens through the product."""
        every = (self.a, self.b, self.inputs, self.outputs, self.offsets)
        return all(bool(tensor.isfinite().all()) for tensor in every if tensor is not None)

    def before(self, x: Tensor, rows: Rows) -> Tensor:
        """i ⊙ x of (t, I) tokens."""
        return x if self.inputs is None else x * self.inputs.index_select(0, rows.members)

    def after(self, x: Tensor, y: Tensor, bias: Tensor | None, rows: Rows) -> None:
        """Change y = W (i ⊙ x) + bias (t, O) in place."""
        if self.outputs is not None:
            scale = self.outputs.index_select(0, rows.members)
            if bias is None:
                y.mul_(scale)
            else:
                y.sub_(bias).mul_(scale).add_(bias)
        if self.a is not None and self.b is not None:
            inner = x @ self.a.t()
            if not rows.alone:
                inner = inner.masked_fill_(rows.foreign(self.ranks), 0)
            if isinstance(self.scale, Tensor):
                y.addmm_(inner.mul_(self.scale), self.b.t())
            else:
                y.addmm_(inner, self.b.t(), alpha=self.scale)
        if self.offsets is not None:
            y.add_(self.offsets.index_select(0, rows.members))


class Rows:
    """Whose the tokens start to end of a pass are: `members` (t,) numbers the bank's slots, n for nobody's."""

    def __init__(self, start: int, end: int, members: Tensor, num_slots: int, *, alone: bool) -> None:
        self.start = start
        self.end = end
        self.members = members
        self.alone = alone
        self._num_slots = num_slots
        self._foreign: dict[tuple[int, ...], Tensor] = {}

    def foreign(self, ranks: tuple[int, ...]) -> Tensor:
        """(t, R) booleans: the columns of x A' that are not the token's own."""
        if ranks not in self._foreign:
            device = self.members.device
            owners = torch.arange(self._num_slots, device=device)
            owners = owners.repeat_interleave(torch.tensor(ranks, device=device))
            self._foreign[ranks] = self.members[:, None] != owners[None]
        return self._foreign[ranks]


def stacked(rows: Sequence[Tensor | None], neutral: float, like: Tensor) -> Tensor | None:
    """(n + 1, size): each slot's row, `neutral` where it has none and in the last."""
    first = next((row for row in rows if row is not None), None)
    if first is None:
        return None
    nothing = torch.full_like(first, neutral)
    return torch.stack([nothing if row is None else row for row in (*rows, None)]).to(like)
