"""Mix several data sets in given proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tailor.data.records import Record
from tailor.errors import ConfigError, DataError


def blend(
    sources: Sequence[tuple[Sequence[Record], float | None]], *, seed: int = 0, num_rows: int | None = None
) -> list[Record]:
    """`num_rows` records in random order, each source with its share of them to within one row.

    Weights need not sum to 1; when all are None, shares are proportional to size. `num_rows` is the number of all
    rows by default. A source that must give more rows than it has is gone through again, reshuffled; one that gives
    fewer gives a random part, no row twice. Raises ConfigError for unusable weights, DataError for an empty source.
    """
    if not sources:
        raise ConfigError("blend: there are no sources")
    for index, (rows, _) in enumerate(sources, start=1):
        if not rows:
            raise DataError(f"blend: source {index} has no rows")
    sizes = [len(rows) for rows, _ in sources]
    total = sum(sizes) if num_rows is None else num_rows
    rng = np.random.default_rng(seed)
    mixed: list[Record] = []
    for (rows, _), count in zip(sources, _counts(_weights(sources, sizes), total), strict=True):
        for taken in range(0, count, len(rows)):
            order = rng.permutation(len(rows))[: count - taken]
            mixed += [rows[index] for index in order]
    return [mixed[index] for index in rng.permutation(len(mixed))]


def _weights(sources: Sequence[tuple[Sequence[Record], float | None]], sizes: list[int]) -> list[float]:
    weights = [weight for _, weight in sources if weight is not None]
    if not weights:
        return [float(size) for size in sizes]
    if len(weights) < len(sources):
        raise ConfigError("blend: give every source a weight, or none")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise ConfigError(f"blend: weights must be zero or more, and not all zero: {weights}")
    return weights


def _counts(weights: list[float], total: int) -> list[int]:
    """Largest remainders (Hamilton's method): whole numbers within one of weight * total that sum to `total`."""
    if total < 1:
        raise ConfigError(f"blend: num_rows is {total}, it must be at least 1")
    shares = [weight * total / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    ranked = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index])
    for index in ranked[: total - sum(counts)]:
        counts[index] += 1
    return counts
