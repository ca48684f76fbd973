"""What an objective is: which records it consumes, and a loss from the token logprobs of one slot's sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from tailor.data.examples import Example, Rendering
from tailor.data.packing import Batch, Segment
from tailor.data.records import Record

RecordTypes = tuple[type[Record], ...]
"""An alias: inside a settings class the field `type` hides the builtin."""


@dataclass(frozen=True)
class Scored:
    """One slot's counted tokens of a micro-batch: N of them, in token order.

    `rows` names each token's row in `segments` (the whole micro-batch's table); `columns` are (N,), `values` are
    (num_segments,).
    """

    logprobs: Tensor
    rows: Tensor
    segments: tuple[Segment, ...]
    columns: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


class Objective(Protocol):
    """Three methods. The loss is summed, not averaged: the trainer divides by `count` over the whole step."""

    consumes: ClassVar[RecordTypes]

    @property
    def type(self) -> str:
        """Its name in recipes."""
        ...

    def examples(self, record: Record, rendering: Rendering) -> list[Example]:
        """The sequences of one record; more than one when they must be compared (same `group`)."""
        ...

    def count(self, examples: Sequence[Example]) -> int:
        """What the summed loss of these examples is divided by: tokens, or pairs."""
        ...

    def loss(self, scored: Scored) -> Tensor:
        """The summed loss, a scalar."""
        ...


def scored_by_slot(batch: Batch, logprobs: Tensor) -> dict[int, Scored]:
    """Cut a micro-batch's (N,) logprobs into the slots' own: segments are sorted by slot, so each is one slice."""
    import torch

    device = logprobs.device
    counted = batch.loss_mask
    table = torch.repeat_interleave(
        torch.arange(len(batch.segments)), torch.tensor([s.length for s in batch.segments])
    )[counted]
    slots = torch.tensor([s.slot for s in batch.segments])[table]
    columns = {name: column[counted] for name, column in batch.columns.items()}
    found = {}
    for slot in dict.fromkeys(slots.tolist()):
        where = (slots == slot).nonzero()[:, 0]
        part = slice(int(where[0]), int(where[-1]) + 1)
        found[slot] = Scored(
            logprobs[part],
            table[part].to(device),
            batch.segments,
            {name: column[part].to(device) for name, column in columns.items()},
            {name: value.to(device) for name, value in batch.values.items()},
        )
    return found
