"""Intervals around a score by the percentile bootstrap (Efron & Tibshirani 1993, chapter 13): resample the rows.

Where a technique was trained with several seeds, rows and seeds are resampled: both are drawn from many.
"""

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


def crossed_interval(
    scores: npt.ArrayLike, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """The mean of (num_seeds, num_rows) scores: one technique, trained several times, scored on the same rows.

    Rows and seeds are resampled independently (see `crossed_difference`). With one seed it is `interval`.
    """
    grid = _grid(scores)
    nothing = np.zeros((1, grid.shape[1]))
    return crossed_difference(grid, nothing, confidence=confidence, num_resamples=num_resamples, seed=seed)


def crossed_difference(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The mean of first - second over the same rows, each (num_seeds, num_rows): their numbers of seeds may differ.

    The pigeonhole bootstrap of crossed factors (Owen 2007, arXiv:0712.1111): each resample draws rows, the same for
    both sides, and independently of them seeds, for each side its own. With one seed each it is `paired_difference`.
    Two or three seeds show less than the real spread between seeds, as any resampling of so few does.
    Raises DataError when the rows differ in number or a score is not finite.
    """
    one, other = _grid(first), _grid(second)
    if one.shape[1] != other.shape[1]:
        raise DataError(f"a paired comparison needs the same rows on both sides: {one.shape[1]} and {other.shape[1]}")
    _check(one.shape[1], confidence, num_resamples)
    # a generator of its own: the rows drawn do not depend on the number of seeds
    generator = np.random.default_rng([seed, 1])
    ours, theirs = (_seed_weights(len(grid), num_resamples, generator) for grid in (one, other))
    means = [
        (ours[k] @ one - theirs[k] @ other)[rows].mean()
        for k, rows in enumerate(_resamples(one.shape[1], num_resamples, seed))
    ]
    return _around(float((one.mean(axis=0) - other.mean(axis=0)).mean()), means, confidence, one.shape[1])


def _seed_weights(num_seeds: int, num_resamples: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """(num_resamples, num_seeds): how often each seed is drawn with replacement, as a share."""
    drawn = generator.integers(0, num_seeds, size=(num_resamples, num_seeds))
    return np.asarray((drawn[..., None] == np.arange(num_seeds)).sum(axis=1) / num_seeds, dtype=np.float64)


def _grid(scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
    grid = np.asarray(scores, dtype=np.float64)
    if grid.ndim != 2:
        raise DataError(f"scores of several seeds have the shape (num_seeds, num_rows), not {grid.shape}")
    if grid.size == 0:
        raise DataError("no rows to score")
    if (bad := np.argwhere(~np.isfinite(grid))).size:
        k, row = bad[0]
        raise DataError(f"row {row} of seed {k} has the score {grid[k, row]}: an interval needs finite scores")
    return grid


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
