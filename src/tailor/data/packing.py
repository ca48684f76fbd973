"""Example → Batch: sequences side by side in one row of tokens, no padding, with a table that says what stands where.

    tokens    <user> Hi <assistant> Hello <end> │ <user> Bye <assistant> See you <end>
    segment   0  start 0, end 5, slot 0         │ 1  start 5, end 11, slot 0
    targets   Hi <assistant> Hello <end> -      │ Bye …                 (shifted; the last of a segment has none)
    loss      0  0           1     1     0      │ 0 …

`parent` names a segment whose tokens this one continues: what several sequences begin with (an instruction, virtual
tokens, the prompt of a preference pair) is stored and computed once. Segments are sorted by slot, so a slot is one span
of the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tailor.data.examples import Example
from tailor.text.tokenizer import VIRTUAL

MIN_SHARED = 16
"""Tokens that a beginning must have to be stored once for sequences of different groups."""


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


@dataclass(frozen=True)
class _Bundle:
    """Examples that must share a micro-batch. The first `lead` tokens are the same in all, and none of them counts."""

    items: tuple[Placed, ...]
    lead: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens to store."""
        lead = len(self.lead) if len(self.items) > 1 else 0
        return lead + sum(len(item.example.token_ids) - lead for item in self.items)

    @property
    def slot(self) -> int:
        return self.items[0].slot

    def family(self, start: int) -> tuple[int, tuple[int, ...]]:
        """Bundles that share a beginning worth storing once, from `start` on, have the same."""
        return self.slot, self.lead[start : start + MIN_SHARED]


def pack(
    placed: Sequence[Placed], tokens_per_batch: int, *, share_prefixes: bool = False, apart: Collection[int] = ()
) -> list[Batch]:
    """Pack into micro-batches of at most `tokens_per_batch` tokens, in order; a longer sequence gets its own.

    Examples with the same (slot, group >= 0) stay together. With `share_prefixes`, tokens before the loss that several
    sequences of a slot begin with are stored once: all that those of a group share but the last (each repeats it, its
    target is the branch's own), and MIN_SHARED tokens or more of any others; of slots in `apart` the groups' only.
    """
    bins: list[list[_Bundle]] = []
    room = 0
    leads: dict[object, tuple[int, ...]] = {}
    for bundle in _bundles(placed, share_prefixes, apart):
        known = leads.get(bundle.family(0))
        size = bundle.size - (0 if known is None else common_length(known, bundle.lead))
        if not bins or size > room:
            bins.append([])
            room, size, leads = tokens_per_batch, bundle.size, {}
        bins[-1].append(bundle)
        room -= size
        if len(bundle.lead) >= MIN_SHARED:
            leads.setdefault(bundle.family(0), bundle.lead)
    return [batch for bundles in bins for batch in _batches(bundles, tokens_per_batch)]


def _bundles(placed: Iterable[Placed], share_prefixes: bool, apart: Collection[int]) -> list[_Bundle]:
    """The bundles in order of first appearance, each with the beginning that it may share."""
    found: dict[object, list[Placed]] = {}
    for number, item in enumerate(placed):
        key = (item.slot, item.example.group) if item.example.group >= 0 else ("alone", number)
        found.setdefault(key, []).append(item)
    bundles = []
    for items in found.values():
        first = items[0].example
        alone = len(items) == 1
        if not share_prefixes or (alone and items[0].slot in apart):
            lead = 0
        else:
            lead = first_counted(first) - 1 if alone else shared_prefix([item.example for item in items])
        bundles.append(_Bundle(tuple(items), tuple(first.token_ids[: max(0, lead)])))
    return bundles


def _batches(bundles: Sequence[_Bundle], tokens_per_batch: int) -> list[Batch]:
    """One batch; two or more in the rare case that less could be shared than its members promised one by one."""
    rows = _Rows()
    _add_family(rows, sorted(bundles, key=lambda bundle: bundle.slot), start=0, parent=-1)
    if len(rows.input_ids) > tokens_per_batch and len(bundles) > 1:
        half = len(bundles) // 2
        return [*_batches(bundles[:half], tokens_per_batch), *_batches(bundles[half:], tokens_per_batch)]
    return [rows.build()]


def _add_family(rows: _Rows, bundles: Sequence[_Bundle], start: int, parent: int) -> None:
    """Add bundles whose first `start` tokens stand in segment `parent` already, families of them under their own."""
    families: dict[object, list[_Bundle]] = {}
    for number, bundle in enumerate(bundles):
        key = bundle.family(start) if len(bundle.lead) - start >= MIN_SHARED else number
        families.setdefault(key, []).append(bundle)
    for family in families.values():
        if len(family) == 1:
            _add_bundle(rows, family[0], start, parent)
            continue
        leads = [bundle.lead for bundle in family]
        shared = common_length(min(leads), max(leads))
        _add_family(rows, family, shared, rows.add_shared(family[0].items[0], start, shared, parent, group=-1))


def _add_bundle(rows: _Rows, bundle: _Bundle, start: int, parent: int) -> None:
    if len(bundle.items) > 1 and len(bundle.lead) > start:
        first = bundle.items[0]
        parent = rows.add_shared(first, start, len(bundle.lead), parent, first.example.group)
        start = len(bundle.lead)
    for item in bundle.items:
        rows.add(item, skip=start, parent=parent)


def first_counted(example: Example) -> int:
    """Index of the first token in the loss; the number of tokens when none is."""
    mask = list(example.loss_mask)
    return mask.index(1) if 1 in mask else len(mask)


def common_length(one: tuple[object, ...], other: tuple[object, ...]) -> int:
    """How many tokens both begin with, by bisection: comparing slices is quick, comparing tokens is not."""
    same, differ = 0, min(len(one), len(other)) + 1
    while differ - same > 1:
        middle = (same + differ) // 2
        same, differ = (middle, differ) if one[:middle] == other[:middle] else (same, middle)
    return same


def shared_prefix(examples: Sequence[Example]) -> int:
    """How many leading tokens all examples share, before any counted token, less one (each branch repeats the last).

    The repeated token's target is the branch's own first token, so a branch's loss never sits in the shared part.
    """
    rows = [tuple(example.token_ids[: first_counted(example)]) for example in examples]
    return max(0, common_length(min(rows), max(rows)) - 1)


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

    def add_shared(self, item: Placed, start: int, end: int, parent: int, group: int) -> int:
        """Tokens start to end of a shared beginning; returns its row in the segment table."""
        nothing = [0] * (end - start)
        self._append(list(item.example.token_ids[start:end]), nothing, nothing, start)
        self._segment(end - start, Segment(0, 0, item.slot, parent, start, group))
        self.items.append(None)
        self.skips.append(0)
        return len(self.segments) - 1

    def add(self, item: Placed, skip: int, parent: int) -> None:
        token_ids, mask = list(item.example.token_ids[skip:]), list(item.example.loss_mask[skip:])
        counted = [m if t < VIRTUAL else 0 for m, t in zip(mask[1:], token_ids[1:], strict=True)]
        targets = [t if t < VIRTUAL else 0 for t in token_ids[1:]]
        self._append(token_ids, [*targets, 0], [*counted, 0], skip)
        self._segment(len(token_ids), Segment(0, 0, item.slot, parent, skip, item.example.group, item.index))
        self.items.append(item)
        self.skips.append(skip)

    def _append(self, token_ids: list[int], targets: list[int], loss_mask: list[int], position0: int) -> None:
        self.input_ids += token_ids
        self.targets += targets
        self.loss_mask += loss_mask
        self.position_ids += range(position0, position0 + len(token_ids))

    def _segment(self, length: int, segment: Segment) -> None:
        end = len(self.input_ids)
        self.segments.append(replace(segment, start=end - length, end=end))

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
