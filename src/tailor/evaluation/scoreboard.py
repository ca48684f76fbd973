"""The scores of a comparison's cells, and what is beyond noise: intervals, paired differences over rows and seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from tailor.evaluation.scores import METRICS, metric_named
from tailor.metrics.bootstrap import crossed_difference, crossed_interval

Cell = Mapping[str, Any]
"""One measured technique: a base, a technique, a number of rows to learn from, a seed. As JSON knows it."""

ROUNDING = 1e-12
"""Averages over seeds are rounded: a bound that should be 0 may come out a little beside it."""


def row_id(cell: Mapping[str, Any]) -> str:
    """What a line of the comparison is called: `base/name`, or `baseline/name` for what needs no language model."""
    return f"{cell['base'] or 'baseline'}/{cell['name']}"


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one score lies from another, on the metric's own scale; `low` and `high` are None where unpaired."""

    mean: float
    low: float | None
    high: float | None
    tie: bool

    def turned(self) -> Difference:
        """The same difference, seen from the other side."""
        low, high = (None if bound is None else -bound for bound in (self.high, self.low))
        return Difference(-self.mean, low, high, self.tie)


class Scoreboard:
    """The cells that went well, by line and size. The plain base learns from no rows: it has one score for all sizes.

    Raises ConfigError for an unknown metric.
    """

    def __init__(self, cells: Sequence[Cell], metric: str, *, confidence: float = 0.95, seed: int = 0) -> None:
        self.metric = metric
        self.higher_is_better = metric_named(metric).higher_is_better
        self.confidence = confidence
        self._seed = seed
        self._bases = {row_id(cell) for cell in cells if cell["kind"] == "base"}
        self._cells: dict[tuple[str, int], list[Cell]] = defaultdict(list)
        self._scores: dict[tuple[str, int, str], dict[str, Any] | None] = {}
        self._differences: dict[tuple[str, str, int], Difference | None] = {}
        done = [cell for cell in cells if cell["status"] == "ok" and cell["evaluation"]]
        for cell in sorted(done, key=lambda cell: int(cell["seed"])):
            self._cells[row_id(cell), cell["size"]].append(cell)

    def cells(self, name: str, size: int) -> list[Cell]:
        """The cells of one line at one size, in the order of their seeds; empty where nothing was measured."""
        if name in self._bases:
            size = max((own for id_, own in self._cells if id_ == name), default=size)
        return self._cells.get((name, size), [])

    def score(self, name: str, size: int, metric: str | None = None) -> dict[str, Any] | None:
        """Mean, low, high and number of rows, averaged over seeds; None where the metric was not measured.

        Of a metric that exists only over rows together, several seeds give the widest bounds that any of them has.
        """
        key = (name, size, metric or self.metric)
        if key not in self._scores:
            self._scores[key] = self._average(*key)
        return self._scores[key]

    def _average(self, name: str, size: int, metric: str) -> dict[str, Any] | None:
        cells = [cell for cell in self.cells(name, size) if metric in cell["evaluation"]["metrics"]]
        scores = [cell["evaluation"]["metrics"][metric] for cell in cells]
        if not scores:
            return None
        if len(scores) == 1:
            return {key: scores[0][key] for key in ("mean", "low", "high", "n")}
        if (grid := _grid(cells, metric)) is not None:
            found = crossed_interval(grid, confidence=self.confidence, seed=self._seed)
            return {"mean": found.mean, "low": found.low, "high": found.high, "n": found.n}
        return {
            "mean": sum(score["mean"] for score in scores) / len(scores),
            "low": min(score["low"] for score in scores),
            "high": max(score["high"] for score in scores),
            "n": scores[0]["n"],
        }

    @property
    def paired(self) -> bool:
        """Whether the metric has a score for every row, so that two techniques can be compared row by row."""
        return METRICS[self.metric].corpus is None

    def difference(self, first: str, second: str, size: int) -> Difference | None:
        """`first` minus `second` at one size; None where either was not measured. They tie when 0 is in the interval.

        A metric that exists only over rows together has no paired interval: two tie where their own intervals overlap.
        """
        key = (first, second, size)
        if key not in self._differences:
            found = self._compare(first, second, size)
            self._differences[key] = found
            self._differences[second, first, size] = found and found.turned()
        return self._differences[key]

    def beats(self, first: str, second: str, size: int) -> bool:
        """Whether `first` is better than `second` beyond the noise."""
        difference = self.difference(first, second, size)
        return difference is not None and not difference.tie and self.gain(difference.mean) > 0

    def near(self, difference: Difference) -> bool:
        """Whether the first is better, or worse by no more than one standard error, read off the interval's width.

        Unpaired differences have no standard error: there a tie is near enough.
        """
        if difference.low is None or difference.high is None:
            return difference.tie
        half = NormalDist().inv_cdf((1 + self.confidence) / 2)
        return -self.gain(difference.mean) <= (difference.high - difference.low) / (2 * half) + ROUNDING

    def gain(self, difference: float) -> float:
        """A difference with the sign that makes better positive."""
        return difference if self.higher_is_better else -difference

    def _compare(self, first: str, second: str, size: int) -> Difference | None:
        one, other = self.score(first, size), self.score(second, size)
        if one is None or other is None:
            return None
        grids = _grid(self.cells(first, size), self.metric), _grid(self.cells(second, size), self.metric)
        if grids[0] is None or grids[1] is None:
            overlap = one["low"] <= other["high"] and other["low"] <= one["high"]
            return Difference(one["mean"] - other["mean"], None, None, tie=overlap)
        found = crossed_difference(grids[0], grids[1], confidence=self.confidence, seed=self._seed)
        return Difference(found.mean, found.low, found.high, tie=found.low <= ROUNDING and found.high >= -ROUNDING)


def _grid(cells: Sequence[Cell], metric: str) -> npt.NDArray[np.float64] | None:
    """(num_seeds, num_rows) scores; None where the metric is none of single rows, or the rows were not kept."""
    known = METRICS.get(metric)
    kept = all(cell["outcomes"] and all(metric in row["scores"] for row in cell["outcomes"]) for cell in cells)
    if known is None or known.corpus is not None or not kept:
        return None
    return np.asarray([[row["scores"][metric] for row in cell["outcomes"]] for cell in cells], dtype=np.float64)
