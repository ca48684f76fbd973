"""Axes: values to places, evenly or by their logarithm, and round numbers for the ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDE = 20.0
"""Values whose largest is more than this many times the smallest are drawn on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` lie between the places `start` and `end` (pixels; `end` may be the smaller)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The place of a value; values outside the range lie outside the places."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def held(self, value: float) -> float:
        """The place of a value, moved to the nearer end when it lies outside."""
        return self.at(min(max(value, self.low), self.high))

    def ticks(self, wanted: int = 5) -> list[float]:
        """About `wanted` round numbers within the range; a logarithmic axis shows 1, 2, 5 of each decade or fewer."""
        if not self.log:
            step = round_step(self.high - self.low, wanted)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [round(k * step, 12) for k in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**k for k in decades for f in factors if self.low <= f * 10.0**k <= self.high]
            if len(found) <= wanted + 1:
                break
        return found[:: -(-len(found) // (wanted + 1)) or 1]


def round_step(distance: float, wanted: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that cuts `distance` into at most `wanted` steps."""
    power = 10.0 ** math.floor(math.log10(distance / wanted))
    return next(f * power for f in (1, 2, 5, 10, 20) if distance / (f * power) <= wanted * (1 + 1e-9))


def is_wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis is needed, and possible: all values positive, far apart."""
    return bool(values) and min(values) > 0 and max(values) > WIDE * min(values)


def linear(values: Iterable[float], start: float, end: float, *, within: tuple[float, float] | None = None) -> Scale:
    """An even scale that holds all values and ends on round numbers; `within` are bounds that no value can pass."""
    found = list(values)
    low, high = min(found), max(found)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    step = round_step(high - low, 5)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    return Scale(round(low, 12), round(high, 12), start, end)


def logarithmic(values: Iterable[float], start: float, end: float) -> Scale:
    """A logarithmic scale that holds all values (positive) with a little room on both sides."""
    found = list(values)
    low, high = min(found), max(found)
    room = max((high / low) ** 0.06, 1.05)
    return Scale(low / room, high * room, start, end, log=True)
