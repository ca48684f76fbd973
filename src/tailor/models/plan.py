"""What one pass over the base contains: sequences, the spans of the slots, and what belongs to this step only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tailor.data.packing import Batch, Segment
from tailor.models.block_attention import Blocks
from tailor.models.prefix import behind_prefixes

if TYPE_CHECKING:
    from tailor.models.attention import KVCache

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
    `derived` holds what slots computed from their parameters for this pass.
    """

    segments: tuple[Segment, ...]
    spans: tuple[Span, ...]
    caches: tuple[KVCache | None, ...]
    steps: Mapping[int, int] = field(default_factory=dict)
    training: bool = False
    derived: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)
    _blocks: dict[tuple[object, ...], Blocks] = field(default_factory=dict, compare=False, repr=False)

    def in_blocks(self, query: Tensor) -> bool:
        """Whether attention of these (1, H, T, D) queries runs in blocks: where that was measured to be faster.

        That is on a CPU, outside generation, up to LONG_SEQUENCE tokens: with shared beginnings, and in half precision
        (docs/log.md). The stock kernel wins elsewhere, and needs no masks, which grow with the square of the length.
        """
        if query.device.type != "cpu" or any(cache is not None for cache in self.caches):
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
        caches: Sequence[KVCache | None] | None = None,
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
