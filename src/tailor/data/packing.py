"""Example → Batch: sequences side by side in one row of tokens, no padding, with a table that says what stands where.

    tokens    <user> Hi <assistant> Hello <end> │ <user> Bye <assistant> See you <end>
    segment   0  start 0, end 5, slot 0         │ 1  start 5, end 11, slot 0
    targets   Hi <assistant> Hello <end> -      │ Bye …                 (shifted; the last of a segment has none)
    loss      0  0           1     1     0      │ 0 …

`parent` names a segment whose tokens this one continues: a prompt shared by the sequences of one group is stored and
computed once. Segments are sorted by slot, so a slot is one span of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tailor.data.examples import Example
from tailor.text.tokenizer import VIRTUAL


@dataclass(frozen=True, slots=True)
class Segment:
    """One sequence (or a shared beginning of several) inside a batch.

    `position0` is the position id of its first token, `parent` the row of the segment it continues (-1: none),
    `group` ties sequences that belong together, `index` is the example's place in the step's draw (-1: a shared
    beginning, which has no example of its own).
    """

    start: int
    end: int
    slot: int = 0
    parent: int = -1
    position0: int = 0
    group: int = -1
    index: int = -1

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.start


@dataclass(frozen=True)
class Batch:
    """Packed tokens, all of shape (T,), and the segment table. `values` holds (num_segments,) columns."""

    input_ids: Tensor
    targets: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    columns: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids.numel())


@dataclass(frozen=True, slots=True)
class Placed:
    """An example bound for a slot; `index` is its place in the step's draw."""

    example: Example
    slot: int = 0
    index: int = 0


def pack(placed: Sequence[Placed], tokens_per_batch: int, *, share_prefixes: bool = False) -> list[Batch]:
    """Pack into micro-batches of at most `tokens_per_batch` tokens, in order; a longer sequence gets its own.

    Examples with the same (slot, group >= 0) stay together. With `share_prefixes`, the tokens that all sequences of a
    group begin with are stored once (all but the last shared one, which each repeats: its target is the branch's own).
    """
    bins: list[list[list[Placed]]] = []
    room = 0
    for bundle in _bundles(placed):
        size = sum(len(p.example.token_ids) for p in bundle)
        if not bins or size > room:
            bins.append([])
            room = tokens_per_batch
        bins[-1].append(bundle)
        room -= size
    return [_batch(sorted(bundles, key=lambda b: b[0].slot), share_prefixes) for bundles in bins]


def _bundles(placed: Iterable[Placed]) -> list[list[Placed]]:
    """Examples that must share a micro-batch, in order of first appearance."""
    bundles: dict[object, list[Placed]] = {}
    for number, item in enumerate(placed):
        key = (item.slot, item.example.group) if item.example.group >= 0 else ("alone", number)
        bundles.setdefault(key, []).append(item)
    return list(bundles.values())


def _batch(bundles: Sequence[Sequence[Placed]], share_prefixes: bool) -> Batch:
    rows = _Rows()
    for bundle in bundles:
        shared = shared_prefix([p.example for p in bundle]) if share_prefixes and len(bundle) > 1 else 0
        parent = rows.add_shared(bundle[0], shared) if shared else -1
        for item in bundle:
            rows.add(item, skip=shared, parent=parent)
    return rows.build()


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many leading tokens all examples share, before any counted token, less one (each branch repeats the last).

    The repeated token's target is the branch's own first token, so a branch's loss never sits in the shared part.
    """
    first = examples[0].token_ids
    limit = min(
        min(len(e.token_ids) for e in examples),
        min((list(e.loss_mask).index(1) if 1 in e.loss_mask else len(e.loss_mask)) for e in examples),
    )
    same = next((k for k in range(limit) if any(e.token_ids[k] != first[k] for e in examples)), limit)
    return max(0, same - 1)


class _Rows:
    """Lists that grow segment by segment and become tensors once."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.targets: list[int] = []
        self.loss_mask: list[int] = []
        self.position_ids: list[int] = []
        self.segments: list[Segment] = []
        self.items: list[Placed | None] = []
        self.skips: list[int] = []

    def add_shared(self, item: Placed, length: int) -> int:
        """The shared beginning of a bundle; returns its row in the segment table."""
        token_ids = list(item.example.token_ids[:length])
        self._append(token_ids, [0] * length, [0] * length, 0)
        self._segment(length, item, parent=-1, position0=0, index=-1)
        self.items.append(None)
        self.skips.append(0)
        return len(self.segments) - 1

    def add(self, item: Placed, skip: int, parent: int) -> None:
        token_ids, mask = list(item.example.token_ids[skip:]), list(item.example.loss_mask[skip:])
        counted = [m if t < VIRTUAL else 0 for m, t in zip(mask[1:], token_ids[1:], strict=True)]
        targets = [t if t < VIRTUAL else 0 for t in token_ids[1:]]
        self._append(token_ids, [*targets, 0], [*counted, 0], skip)
        self._segment(len(token_ids), item, parent=parent, position0=skip, index=item.index)
        self.items.append(item)
        self.skips.append(skip)

    def _append(self, token_ids: list[int], targets: list[int], loss_mask: list[int], position0: int) -> None:
        self.input_ids += token_ids
        self.targets += targets
        self.loss_mask += loss_mask
        self.position_ids += range(position0, position0 + len(token_ids))

    def _segment(self, length: int, item: Placed, *, parent: int, position0: int, index: int) -> None:
        end = len(self.input_ids)
        self.segments.append(Segment(end - length, end, item.slot, parent, position0, item.example.group, index))

    def build(self) -> Batch:
        # slots with different objectives share a batch: what an example does not have is 0 in its rows
        examples = [item.example if item is not None else None for item in self.items]
        columns = {name: self._column(name) for name in dict.fromkeys(n for e in examples if e for n in e.columns)}
        values = {
            name: torch.tensor([e.values.get(name, 0.0) if e else 0.0 for e in examples])
            for name in dict.fromkeys(n for e in examples if e for n in e.values)
        }
        return Batch(
            torch.tensor(self.input_ids),
            torch.tensor(self.targets),
            torch.tensor(self.loss_mask, dtype=torch.bool),
            torch.tensor(self.position_ids),
            tuple(self.segments),
            columns,
            values,
        )

    def _column(self, name: str) -> Tensor:
        """A per-token column, aligned with the targets: entry t belongs to the token that position t predicts."""
        flat: list[float] = []
        for item, segment, skip in zip(self.items, self.segments, self.skips, strict=True):
            own = [] if item is None else list(item.example.columns.get(name, ())[skip + 1 :])
            flat += own + [0.0] * (segment.length - len(own))
        return torch.tensor(flat)
