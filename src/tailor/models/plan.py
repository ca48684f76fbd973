"""What one pass over the base contains: sequences, the spans of the slots, and what belongs to this step only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tailor.data.packing import Batch, Segment
from tailor.models.bank import Rows
from tailor.models.block_attention import Blocks
from tailor.models.decode import Decoding, Options
from tailor.models.kv_cache import KVCache, RowCache
from tailor.models.prefix import behind_prefixes

if TYPE_CHECKING:
    from tailor.models.slots import Slot

LONG_SPAN = 32
"""Tokens from which a slot's span gets matrix products of its own."""
LONG_SEQUENCE = 1024
"""Tokens of a sequence, its parents' included, from which the stock attention kernel is as fast as blocks."""


class Span(NamedTuple):
    """Tokens start to end of the packed row belong to this slot."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True)
class Plan:
    """Frozen facts of one training micro-step or engine step.

    `steps` (slot → its own optimizer step) and `training` decide dropout: masks are drawn per sequence from (slot seed,
    step, module, example index), so they do not depend on how sequences were packed or on who else is in the pass.
    `derived` holds what slots computed from their parameters for this pass, `options` what the model said of its
    attention, by layer, where sequences were decoded in groups.
    """

    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]
    caches: tuple[KVCache | RowCache | None, ...]
    steps: Mapping[int, int] = field(default_factory=dict)
    training: bool = False
    derived: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    options: dict[int, Options] = field(default_factory=dict, compare=False, repr=False)
    _blocks: dict[tuple[object, ...], Blocks] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def generates(self) -> bool:
        """Whether keys and values of some sequence are kept from pass to pass."""
        return any(cache is not None for cache in self.caches)

    @cached_property
    def decodes(self) -> bool:
        """Whether all it does is to give sequences of a pool one token more."""
        pairs = zip(self.segments, self.caches, strict=True)
        return not self.training and all(
            s.length == 1 and isinstance(cache, RowCache) and cache.length > 0 for s, cache in pairs
        )

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """The slots of sequences whose first tokens are in this pass."""
        pairs = zip(self.segments, self.caches, strict=True)
        return tuple(dict.fromkeys(s.slot for s, cache in pairs if cache is None or cache.length == 0))

    def decoding(self, device: torch.device) -> Decoding:
        """How the sequences that get one token more are attended to together; made once for all layers."""
        if "decoding" not in self.derived:
            self.derived["decoding"] = Decoding.of(self.segments, self.caches, device)
        return self.derived["decoding"]  # type: ignore[no-any-return]

    def rows_of(self, spans: Sequence[Span], device: torch.device) -> list[tuple[Rows, tuple[int, ...]]]:
        """The tokens of these spans with the slots they belong to, for a layer's banks: short spans go together.

        Made once for all layers that the same slots change.
        """
        key = ("rows", tuple(span.slot for span in spans))
        if key not in self.derived:
            short = [span for span in spans if span.end - span.start < LONG_SPAN]
            alone = [span for span in spans if span not in short or len(short) == 1]
            found: list[tuple[Rows, tuple[int, ...]]] = [
                (self.rows_alone(span, device), (span.slot,)) for span in alone
            ]
            if len(short) > 1:
                found += self._together(short, device)
            self.derived[key] = found
        return self.derived[key]  # type: ignore[no-any-return]

    def rows_alone(self, span: Span, device: torch.device) -> Rows:
        """The tokens of one span, for a bank of its slot alone."""
        members = torch.zeros(span.end - span.start, dtype=torch.long, device=device)
        return Rows(span.start, span.end, members, 1, alone=True)

    def _together(self, spans: Sequence[Span], device: torch.device) -> list[tuple[Rows, tuple[int, ...]]]:
        """Rows from the first to the last of some short spans, cut where a long one stands between them."""
        runs: list[list[Span]] = []
        for span in spans:
            if runs and span.start - runs[-1][-1].end < LONG_SPAN:
                runs[-1].append(span)
            else:
                runs.append([span])
        found = []
        for run in runs:
            start, end = run[0].start, run[-1].end
            members = torch.full((end - start,), len(run))
            for number, span in enumerate(run):
                members[span.start - start : span.end - start] = number
            rows = Rows(start, end, members.to(device), len(run), alone=len(run) == 1)
            found.append((rows, tuple(span.slot for span in run)))
        return found

    def state_of(self, slot: Slot) -> int:
        """The slot's epoch, asked once: equal ones are equal parameters."""
        key = ("epoch", slot.number)
        if key not in self.derived:
            self.derived[key] = slot.epoch
        return self.derived[key]  # type: ignore[no-any-return]

    def in_blocks(self, query: Tensor) -> bool:
        """Whether attention of these (1, H, T, D) queries runs in blocks: where that was measured to be faster.

        That is on a CPU, outside generation, up to LONG_SEQUENCE tokens: with shared beginnings, and in half precision
        (docs/log.md). The stock kernel wins elsewhere, and needs no masks, which grow with the square of the length.
        """
        if query.device.type != "cpu" or self.generates:
            return False
        if max(segment.position0 + segment.length for segment in self.segments) > LONG_SEQUENCE:
            return False
        return query.dtype in (torch.bfloat16, torch.float16) or any(segment.parent >= 0 for segment in self.segments)

    def blocks(
        self, repeats: int, window: int | None, dtype: torch.dtype, prefixes: Sequence[tuple[int, int]] = ()
    ) -> Blocks:
        """The blocks for `repeats` query heads per key head, made once for all layers alike.

        `prefixes`: slots whose prefix keys follow the keys of the tokens, and how many each has.
        """
        key = (repeats, window, dtype)
        if key not in self._blocks:
            table = behind_prefixes(self.segments, prefixes, self.segments[-1].end)
            self._blocks[key] = Blocks.of(table, len(self.segments), repeats, window, dtype)
        return self._blocks[key]

    @staticmethod
    def of(
        segments: Sequence[Segment],
        *,
        caches: Sequence[KVCache | RowCache | None] | None = None,
        steps: Mapping[int, int] | None = None,
        training: bool = False,
    ) -> Plan:
        """The plan of these segments. They must be contiguous from 0, sorted by slot, parents before children."""
        for row, segment in enumerate(segments):
            expected = segments[row - 1].end if row else 0
            assert segment.start == expected, "segments must be contiguous"
            assert row == 0 or segments[row - 1].slot <= segment.slot, "segments must be sorted by slot"
            assert segment.parent < row, "a parent stands before its children"
        caches = tuple(caches) if caches is not None else (None,) * len(segments)
        return Plan(tuple(segments), _spans(segments), caches, steps or {}, training)

    @staticmethod
    def of_batch(batch: Batch, *, steps: Mapping[int, int] | None = None, training: bool = False) -> Plan:
        """The plan of a packed batch."""
        return Plan.of(batch.segments, steps=steps, training=training)


def _spans(segments: Sequence[Segment]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for segment in segments:
        if spans and spans[-1].slot == segment.slot:
            spans[-1] = Span(segment.slot, spans[-1].start, segment.end)
        else:
            spans.append(Span(segment.slot, segment.start, segment.end))
    return tuple(spans)
