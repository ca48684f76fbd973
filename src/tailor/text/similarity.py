"""Which texts are alike: BM25 over an inverted index, cosines of vectors, and MMR, which also wants them to differ."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
"""One number per text, shape (num_texts,)."""


class BM25:
    """Okapi BM25 (Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", eq. 3.15).

    score(q, d) = Σ over words t of q:  idf(t) · tf · (k1 + 1) / (tf + k1 · (1 - b + b · |d| / mean |d|))
    idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)), n = texts that hold t; the 1 inside (as in Lucene) keeps it positive.

    Words are runs of letters and digits, case folded. The weight of every (word, text) is computed once; a query costs
    one addition per text that shares a word with it.
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        rows: dict[str, array[int]] = {}
        counts: dict[str, array[int]] = {}
        lengths = np.zeros(len(texts))
        for row, text in enumerate(texts):
            words = _words(text)
            lengths[row] = len(words)
            for word, count in Counter(words).items():
                rows.setdefault(word, array("i")).append(row)
                counts.setdefault(word, array("i")).append(count)
        mean = max(float(lengths.mean()), 1.0) if len(texts) else 1.0
        offset = k1 * (1 - b + b * lengths / mean)
        self._num_texts = len(texts)
        self._index: dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]] = {}
        for word, found in rows.items():
            where, tf = np.asarray(found, dtype=np.int32), np.asarray(counts[word], dtype=np.float64)
            idf = math.log(1 + (len(texts) - len(where) + 0.5) / (len(where) + 0.5))
            self._index[word] = (where, idf * tf * (k1 + 1) / (tf + offset[where]))

    def scores(self, query: str) -> Scores:
        """The score of every text, shape (num_texts,); 0 where no word is shared. A word asked twice counts twice."""
        total = np.zeros(self._num_texts)
        for word, times in Counter(_words(query)).items():
            if word in self._index:
                where, weights = self._index[word]
                total[where] += times * weights
        return total

    def top(self, query: str, k: int) -> list[int]:
        """The k best texts, best first, equal scores in their own order; texts that share no word come last."""
        return best(self.scores(query), k)


class Cosine:
    """Cosines between unit vectors, (num_texts, H) of them."""

    def __init__(self, vectors: npt.ArrayLike) -> None:
        self.vectors = np.asarray(vectors, dtype=np.float64)

    def scores(self, query: npt.ArrayLike) -> Scores:
        """The cosine of every text with a unit vector (H,)."""
        found: Scores = self.vectors @ np.asarray(query, dtype=np.float64)
        return found


def best(scores: Scores, k: int) -> list[int]:
    """The places of the k highest scores, highest first, equal ones in their own order."""
    order: list[int] = np.argsort(-scores, kind="stable")[: max(k, 0)].tolist()
    return order


def relative(scores: Scores) -> Scores:
    """Scores as shares of the highest, so that those of different queries can be weighed against each other."""
    highest = scores.max(initial=0.0)
    return scores / highest if highest > 0 else scores


def mmr(relevance: Scores, likeness: Callable[[int], Scores], k: int, weight: float) -> list[int]:
    """k texts by maximal marginal relevance (Carbonell & Goldstein 1998, "The Use of MMR", section 2), first first.

    The next one is argmax over d of  weight · relevance(d) - (1 - weight) · max over those taken s of likeness(s)(d).
    `likeness(s)` is how like text s every text is, on the scale of `relevance`. Weight 1 is the order of `best`.
    """
    taken: list[int] = []
    nearest = np.zeros_like(relevance)
    free = np.ones(len(relevance), dtype=bool)
    while len(taken) < min(k, len(relevance)):
        gains = np.where(free, weight * relevance - (1 - weight) * nearest, -np.inf)
        chosen = int(np.argmax(gains))
        alike = likeness(chosen)
        nearest = np.maximum(nearest, alike) if taken else alike
        taken.append(chosen)
        free[chosen] = False
    return taken


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
