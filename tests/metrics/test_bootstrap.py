from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tailor.errors import DataError
from tailor.metrics.bootstrap import (
    Interval,
    crossed_difference,
    crossed_interval,
    interval,
    interval_of,
    paired_difference,
)


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


def test_one_seed_each_is_the_paired_difference() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=50), rng.random(size=50)
    for seed in (0, 5):
        found = crossed_difference([first], [second], num_resamples=200, confidence=0.8, seed=seed)
        assert found == paired_difference(first.tolist(), second.tolist(), num_resamples=200, confidence=0.8, seed=seed)
        assert crossed_interval([first], seed=seed) == interval(first.tolist(), seed=seed)


def test_equal_seeds_count_as_one() -> None:
    rows = [0.0, 1.0, 1.0, 0.0, 0.5]
    assert crossed_interval([rows, rows]) == interval(rows)
    assert crossed_difference([rows, rows], [[1.0] * 5]) == paired_difference(rows, [1.0] * 5)


def test_crossed_difference_agrees_with_every_possible_draw() -> None:
    first, second = np.array([[1.0, 0.0, 0.25], [0.5, 1.0, 0.0]]), np.array([[0.0, 0.75, 0.5]])
    every = [
        (first[list(seeds)].mean(axis=0) - second[0])[list(rows)].mean()
        for rows in itertools.product(range(3), repeat=3)
        for seeds in itertools.product(range(2), repeat=2)
    ]
    low, high = np.quantile(every, [0.1, 0.9])
    found = crossed_difference(first, second, confidence=0.8, num_resamples=20_000)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert found.n == 3


def test_seeds_that_differ_widen_the_interval() -> None:
    rows = np.zeros(200)
    found = crossed_interval([rows, rows + 1], num_resamples=400)
    # only the seeds vary: both draws alike have a chance of one half
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    assert crossed_interval([rows + 0.5], num_resamples=400) == Interval(0.5, 0.5, 0.5, 200)


def test_crossed_interval_covers_the_true_mean() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(200):
        scores = rng.normal(size=(12, 1)) * 0.3 + rng.normal(size=(1, 40)) + rng.normal(size=(12, 40))
        drawn = crossed_interval(scores, confidence=0.9, num_resamples=200, seed=trial)
        hits += drawn.low <= 0 <= drawn.high
    assert 0.84 < hits / 200 <= 0.98


def test_crossed_scores_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="3 and 2"):
        crossed_difference([[1.0, 2.0, 3.0]], [[1.0, 2.0]])
    with pytest.raises(DataError, match="row 1 of seed 1 has the score nan"):
        crossed_interval([[1.0, 0.0], [1.0, math.nan]])
    with pytest.raises(DataError, match="no rows"):
        crossed_interval([[]])
    with pytest.raises(DataError, match=r"shape \(num_seeds, num_rows\), not \(2,\)"):
        crossed_interval([1.0, 2.0])
