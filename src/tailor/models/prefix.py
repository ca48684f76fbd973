"""Keys and values that a slot puts in front of every sequence, in every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tailor.data.packing import Segment


@dataclass(frozen=True, eq=False)
class Prefix:
    """`num` positions; `layers()` gives (L, 2, G, num, D): keys and values of L layers with G key/value heads.

    Keys are used as they are: they stand where the model's keys are after their rotation.
    """

    num: int
    layers: Callable[[], Tensor]


def behind_prefixes(
    segments: Sequence[Segment], prefixes: Sequence[tuple[int, int]], num_tokens: int
) -> tuple[Segment, ...]:
    """The segments of T tokens with a parent more: their slot's prefix, whose keys follow the T others.

    `prefixes` are (slot, num) pairs in the order in which their keys stand there; they get rows of their own at the
    end of the table.
    """
    rows: dict[int, tuple[int, int]] = {}
    own: list[Segment] = []
    end = num_tokens
    for number, (slot, num) in enumerate(prefixes):
        rows[slot] = (len(segments) + number, num)
        own.append(Segment(end, end + num, slot))
        end += num
    return (*(_behind(segment, *rows.get(segment.slot, (-1, 0))) for segment in segments), *own)


def _behind(segment: Segment, row: int, num: int) -> Segment:
    parent = segment.parent if segment.parent >= 0 else row
    return replace(segment, parent=parent, position0=segment.position0 + num)
