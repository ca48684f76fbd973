"""ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004, W04-1013), equal to the rouge-score package without stemming."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def rouge(prediction: str, references: str | Sequence[str]) -> dict[str, float]:
    """F-measures in [0, 1] under the keys rouge1, rouge2 and rougeL; with several references the best of each.

    Words are runs of a-z and 0-9 after lower-casing, so scripts other than Latin score 0: use chrF for those.
    """
    references = [references] if isinstance(references, str) else references
    predicted = _words(prediction)
    best = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for reference in map(_words, references):
        scores = {
            "rouge1": _ngram_f(predicted, reference, 1),
            "rouge2": _ngram_f(predicted, reference, 2),
            "rougeL": _f(longest_common_subsequence(predicted, reference), len(predicted), len(reference)),
        }
        best = {name: max(best[name], score) for name, score in scores.items()}
    return best


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, with one machine-word operation per 64 cells of the usual table (Hyyrö 2004, bit-parallel LCS)."""
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    every = (1 << len(first)) - 1
    row = every  # bit i is 0 where the table's row steps up at column i
    for word in second:
        matched = row & positions.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(first) - row.bit_count()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _ngram_f(predicted: list[str], reference: list[str], n: int) -> float:
    left, right = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (predicted, reference))
    return _f((left & right).total(), left.total(), right.total())


def _f(overlap: int, num_predicted: int, num_reference: int) -> float:
    if not overlap:
        return 0.0
    precision, recall = overlap / num_predicted, overlap / num_reference
    return 2 * precision * recall / (precision + recall)
