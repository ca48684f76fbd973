"""Intervals around a score by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13): resample the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tailor.errors import DataError

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Interval:
    """A score over `n` rows, and the interval in which it would fall on other rows of the same kind."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """The mean of per-row scores. Where all rows score alike the interval has no width: that is not certainty."""
    scores = np.asarray(values, dtype=np.float64)
    _check(len(scores), confidence, num_resamples)
    if (bad := np.flatnonzero(~np.isfinite(scores))).size:
        raise DataError(f"row {bad[0]} has the score {scores[bad[0]]}: an interval needs finite scores")
    means = [scores[rows].mean() for rows in _resamples(len(scores), num_resamples, seed)]
    return _around(float(scores.mean()), means, confidence, len(scores))


def interval_of(
    statistic: Callable[[Sequence[Row]], float],
    rows: Sequence[Row],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A score that only exists over a set of rows (macro-F1, BLEU): `statistic` is called once per resample."""
    _check(len(rows), confidence, num_resamples)
    scores = [statistic([rows[i] for i in chosen]) for chosen in _resamples(len(rows), num_resamples, seed)]
    return _around(statistic(rows), scores, confidence, len(rows))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The mean of first - second over the same rows: narrower than two intervals side by side.

    When 0 lies outside, the two differ at this confidence. Raises DataError when the lengths differ.
    """
    if len(first) != len(second):
        raise DataError(f"a paired comparison needs the same rows on both sides: {len(first)} and {len(second)}")
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    return interval(difference.tolist(), confidence=confidence, num_resamples=num_resamples, seed=seed)


def _resamples(n: int, num_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers drawn with replacement, one set at a time: memory stays at one set for any number of rows."""
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield generator.integers(0, n, size=n)


def _around(score: float, resampled: Sequence[float], confidence: float, n: int) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(resampled, dtype=np.float64), [tail, 1 - tail])
    return Interval(score, float(low), float(high), n)


def _check(n: int, confidence: float, num_resamples: int) -> None:
    if n == 0:
        raise DataError("no rows to score")
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"confidence must lie in (0, 1) and num_resamples be at least 1: {confidence}, {num_resamples}"
        )
