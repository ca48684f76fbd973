from __future__ import annotations

import math

import numpy as np
import pytest

from tailor.text.similarity import BM25

TEXTS = ["the cat sat", "the dog sat on the mat", "Birds fly", ""]


def by_hand(tf: int, n: int, length: int) -> float:
    """N = 4 texts of 3, 6, 2 and 0 words: 2.75 on average; k1 = 1.5, b = 0.75."""
    idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
    return idf * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * length / 2.75))


def test_scores_by_hand() -> None:
    index = BM25(TEXTS)
    # "cat": only text 0; idf = ln(1 + 3.5 / 1.5) = ln(10 / 3)
    assert index.scores("cat")[0] == pytest.approx(
        math.log(10 / 3) * 2.5 / (1 + 1.5 * (0.25 + 0.75 * 3 / 2.75)), rel=1e-15
    )
    expected = [by_hand(1, 2, 3) + by_hand(1, 2, 3), by_hand(2, 2, 6) + by_hand(1, 2, 6), 0.0, 0.0]
    np.testing.assert_allclose(index.scores("THE sat, zebra!"), expected, rtol=1e-14)
    np.testing.assert_allclose(index.scores("cat cat"), 2 * index.scores("cat"), rtol=1e-15)


def test_agrees_with_the_formula_written_as_a_loop() -> None:
    rng = np.random.default_rng(3)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 30, size=rng.integers(1, 20))) for _ in range(50)]
    query = "w1 w2 w3 w3 w29"
    k1, b = 0.9, 0.4
    words = [text.split() for text in texts]
    mean = sum(map(len, words)) / len(words)
    expected = []
    for document in words:
        score = 0.0
        for term in query.split():
            n = sum(term in other for other in words)
            tf = document.count(term)
            score += (
                math.log(1 + (50 - n + 0.5) / (n + 0.5))
                * tf
                * (k1 + 1)
                / (tf + k1 * (1 - b + b * len(document) / mean))
            )
        expected.append(score)
    np.testing.assert_allclose(BM25(texts, k1=k1, b=b).scores(query), expected, rtol=1e-12)


def test_top_orders_by_score_then_by_position() -> None:
    index = BM25(["b x", "a", "b x", "c b", "c b"])
    assert index.top("b x", 5) == [0, 2, 3, 4, 1]
    assert index.top("b x", 2) == [0, 2]
    assert index.top("nothing here", 3) == [0, 1, 2]
    assert index.top("b", 0) == []
    assert index.top("b", 99)[-1] == 1


def test_edges() -> None:
    assert BM25([]).top("a", 3) == []
    assert BM25([]).scores("a").shape == (0,)
    assert BM25(["", ""]).scores("a").tolist() == [0.0, 0.0]
    assert BM25(["Straße ΣΑΣ", "naïve 東京"]).top("STRASSE", 1) == [0]
    assert BM25(["x", "naïve 東京"]).top("東京", 1) == [1]
    assert (BM25(["a a a", "a"]).scores("a") > 0).all()
