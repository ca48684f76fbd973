"""Which texts are about the same words: BM25 over an inverted index."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


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

    def scores(self, query: str) -> npt.NDArray[np.float64]:
        """The score of every text, shape (num_texts,); 0 where no word is shared. A word asked twice counts twice."""
        total = np.zeros(self._num_texts)
        for word, times in Counter(_words(query)).items():
            if word in self._index:
                where, weights = self._index[word]
                total[where] += times * weights
        return total

    def top(self, query: str, k: int) -> list[int]:
        """The k best texts, best first, equal scores in their own order; texts that share no word come last."""
        order: list[int] = np.argsort(-self.scores(query), kind="stable")[: max(k, 0)].tolist()
        return order


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
