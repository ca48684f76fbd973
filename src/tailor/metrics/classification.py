"""Scores of predicted labels against the right ones, over a label set that is given, not guessed from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tailor.errors import DataError


def accuracy(predictions: Sequence[str | None], references: Sequence[str]) -> float:
    """The share of rows predicted right, in [0, 1]. None stands for an answer that names no label."""
    _check(predictions, references)
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def confusion(predictions: Sequence[str | None], references: Sequence[str]) -> Counter[tuple[str, str | None]]:
    """How many rows there are of each (right label, predicted label)."""
    _check(predictions, references)
    return Counter(zip(references, predictions, strict=True))


def label_f1(predictions: Sequence[str | None], references: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """F1 = 2·hits / (predicted + right) of each label; 0 for a label that is neither predicted nor right anywhere.

    A prediction outside `labels` is a miss of the right label. A right label outside them raises DataError.
    """
    _check(predictions, references)
    if unknown := sorted(set(references) - set(labels)):
        raise DataError(f"labels in the rows that are not in the label set: {', '.join(unknown[:5])}")
    predicted, expected = Counter(predictions), Counter(references)
    hits = Counter(r for p, r in zip(predictions, references, strict=True) if p == r)
    return {label: 2 * hits[label] / max(predicted[label] + expected[label], 1) for label in labels}


def macro_f1(predictions: Sequence[str | None], references: Sequence[str], labels: Sequence[str]) -> float:
    """The plain mean of `label_f1`: every label counts alike, however rare."""
    scores = label_f1(predictions, references, labels)
    return sum(scores.values()) / len(scores)


def _check(predictions: Sequence[str | None], references: Sequence[str]) -> None:
    if not references or len(predictions) != len(references):
        raise DataError(f"one prediction per row is needed: {len(predictions)} predictions, {len(references)} rows")
