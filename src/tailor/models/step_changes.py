"""What slots change in a decoding step: their banks, for linear layers that are computed side by side.

Made again only when slots come that are in no bank at hand, or learn; the order of the tokens is all that a pass adds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from tailor.models.bank import Bank, Piece, Rows, side_by_side

if TYPE_CHECKING:
    from tailor.models.host import SlotHost
    from tailor.models.plan import Plan

KEPT_STACKS = 4
"""Stacks that are kept: requests come and go, and with them the slots that a step holds."""


class Joined(NamedTuple):
    """Linear layers whose outputs stand side by side: their names, and the sizes of those outputs."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]


class _Stacked(NamedTuple):
    """The bank of some joined layers, and the slots that are in it."""

    slots: tuple[int, ...]
    bank: Bank


@dataclass(frozen=True, eq=False)
class _Stack:
    """What some slots do, as their parameters were at these epochs: None for joined layers they leave alone.

    No `banks` at all where joined layers do not have what one of the slots does, or where a number of it is none: that
    would reach other slots' tokens.
    """

    epochs: Mapping[int, int]
    banks: tuple[_Stacked | None, ...] | None


class StepChanges:
    """The changes of all joined layers of a decoder, in their order."""

    def __init__(self, host: SlotHost, layers: Sequence[Joined]) -> None:
        self.host = host
        self.layers = tuple(layers)
        self._nothing: tuple[tuple[Piece, ...], ...] = ((),) * len(self.layers)
        self._stacks: OrderedDict[tuple[int, ...], _Stack] = OrderedDict()
        self._last: tuple[object, tuple[tuple[Piece, ...], ...] | None] = (None, None)

    def of(self, plan: Plan) -> tuple[tuple[Piece, ...], ...] | None:
        """By joined layers, what the slots of this pass change; kept while the same slots stand in the same order.

        None when it cannot be done side by side.
        """
        slots = self.host.slots
        present = [span.slot for span in plan.spans if span.slot in slots and slots[span.slot].deltas]
        if not present:
            return self._nothing
        key = (plan.spans, tuple(plan.state_of(slots[number]) for number in present))
        if self._last[0] != key:
            stack = self._stack(plan, present)
            self._last = (key, None if stack.banks is None else self._placed(plan, stack.banks))
        return self._last[1]

    def _placed(self, plan: Plan, banks: Sequence[_Stacked | None]) -> tuple[tuple[Piece, ...], ...]:
        """The banks with the tokens of this pass."""
        owners = [span.slot for span in plan.spans for _ in range(span.end - span.start)]
        rows: dict[tuple[tuple[int, ...], bool], Rows | None] = {}
        found: list[tuple[Piece, ...]] = []
        for stacked in banks:
            if stacked is None:
                found.append(())
                continue
            key = (stacked.slots, stacked.bank.inputs is None)
            if key not in rows:
                rows[key] = self._rows(owners, *key)
            own = rows[key]
            found.append(() if own is None else ((own, stacked.bank),))
        return tuple(found)

    def _rows(self, owners: Sequence[int], slots: Sequence[int], cropped: bool) -> Rows | None:
        """Whose the tokens are among these slots, all or from the first to the last of theirs; None: nobody's."""
        numbers = {slot: number for number, slot in enumerate(slots)}
        members = [numbers.get(slot, len(slots)) for slot in owners]
        theirs = [place for place, member in enumerate(members) if member < len(slots)]
        if not theirs:
            return None
        start, end = (theirs[0], theirs[-1] + 1) if cropped else (0, len(members))
        members = members[start:end]
        alone = len(slots) == 1 and not any(members)
        return Rows(start, end, torch.tensor(members, device=self.host.device), len(slots), alone=alone)

    def _stack(self, plan: Plan, present: Sequence[int]) -> _Stack:
        """The banks of the slots that are present. One that holds some more is as good: sequences come and go."""
        epochs = {number: plan.state_of(self.host.slots[number]) for number in present}
        most = 2 * len(epochs) + 2
        for key, stack in reversed(self._stacks.items()):
            usable = stack.banks is not None or stack.epochs == epochs  # it may be another slot that cannot be joined
            if usable and epochs.items() <= stack.epochs.items() and len(stack.epochs) <= most:
                self._stacks.move_to_end(key)
                return stack
        if self._stacks:
            last = next(reversed(self._stacks.values()))
            there = {n: plan.state_of(self.host.slots[n]) for n in last.epochs if n in self.host.slots}
            if last.banks is not None and len(there | epochs) <= most:
                stack = _Stack(there | epochs, self._stacked(tuple(sorted(there | epochs))))
                if stack.banks is not None:
                    return self._kept(stack)
        return self._kept(_Stack(epochs, self._stacked(tuple(sorted(epochs)))))

    def _kept(self, stack: _Stack) -> _Stack:
        """Remember a stack as the last."""
        slots = tuple(sorted(stack.epochs))
        self._stacks[slots] = stack
        self._stacks.move_to_end(slots)
        if len(self._stacks) > KEPT_STACKS:
            self._stacks.popitem(last=False)
        return stack

    def _stacked(self, slots: Sequence[int]) -> tuple[_Stacked | None, ...] | None:
        """The banks of these slots."""
        found: list[_Stacked | None] = []
        like = torch.empty(0, dtype=self.host.dtype, device=self.host.device)
        for names, sizes in self.layers:
            linears = [self.host.linear_named(name) for name in names]
            touching = tuple(n for n in slots if any(linear and n in linear.deltas for linear in linears))
            changes = []
            for number in touching:
                own = [linear.change_of(number) if linear and number in linear.deltas else None for linear in linears]
                together = side_by_side(own, sizes)
                if together is None:
                    return None
                changes.append(together)
            bank = Bank.of(changes, like, few_rows=True) if changes else None
            if bank is not None and not bank.finite:
                return None
            found.append(None if bank is None else _Stacked(touching, bank))
        return tuple(found)
