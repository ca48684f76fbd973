from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tailor.errors import DataError
from tailor.metrics.bootstrap import Interval, interval, interval_of, paired_difference


def test_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=200)
    ours = interval(values.tolist(), num_resamples=4000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours.mean == pytest.approx(values.mean(), rel=1e-14)
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(300):
        drawn = interval(rng.normal(size=60).tolist(), confidence=0.9, num_resamples=300, seed=trial)
        hits += drawn.low <= 0 <= drawn.high
    assert 0.84 < hits / 300 < 0.95


def test_seeded_and_ordered() -> None:
    values = [i * i / 50 for i in range(30)]
    assert interval(values) == interval(values)
    assert interval(values) != interval(values, seed=1)
    wide, narrow = interval(values, confidence=0.99), interval(values, confidence=0.5)
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high
    assert (wide.n, wide.mean) == (30, pytest.approx(sum(values) / 30))


def test_degenerate() -> None:
    assert interval([0.25]) == Interval(0.25, 0.25, 0.25, 1)
    assert interval([1, 1, 1]) == Interval(1.0, 1.0, 1.0, 3)
    assert str(Interval(0.5, 0.25, 0.75, 9)) == "0.500 [0.250, 0.750]"
    with pytest.raises(DataError, match="no rows"):
        interval([])
    with pytest.raises(DataError, match="no rows"):
        interval_of(len, [])
    with pytest.raises(DataError, match="row 1 has the score nan"):
        interval([1.0, math.nan])
    with pytest.raises(ValueError, match="confidence"):
        interval([1.0], confidence=95)


def test_interval_of_a_mean_is_the_interval() -> None:
    values = [0.0, 0.5, 1.0, 0.25]
    assert interval_of(lambda rows: float(np.mean(rows)), values) == interval(values)


def test_paired_difference_is_narrower_and_signed() -> None:
    rng = np.random.default_rng(2)
    difficulty = rng.normal(size=80)
    first, second = (difficulty + 0.1).tolist(), difficulty.tolist()
    gain = paired_difference(first, second)
    assert gain.mean == pytest.approx(0.1)
    assert 0 < gain.low <= gain.high < 0.11
    assert interval(first).low < interval(second).high  # apart only when paired
    assert paired_difference(second, first).high < 0
    with pytest.raises(DataError, match="2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
