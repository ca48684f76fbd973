from __future__ import annotations

import math

import numpy as np
import pytest

from tailor.text.similarity import BM25, Cosine, best, mmr, relative

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


def test_cosine_of_unit_vectors() -> None:
    index = Cosine([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    np.testing.assert_allclose(index.scores([0.6, 0.8]), [0.6, 1.0, -0.8], rtol=1e-15)
    assert best(index.scores([0.6, 0.8]), 2) == [1, 0]


def test_relative_scores_are_shares_of_the_highest() -> None:
    np.testing.assert_allclose(relative(np.array([1.0, 4.0, 0.0])), [0.25, 1.0, 0.0])
    assert relative(np.array([0.0, -1.0])).tolist() == [0.0, -1.0]
    assert relative(np.zeros(0)).tolist() == []


# relevance of four texts; 0 and 1 are nearly the same text, 2 is unlike everything
RELEVANCE = np.array([0.9, 0.85, 0.5, 0.4])
ALIKE = np.array([[1.0, 0.95, 0.1, 0.3], [0.95, 1.0, 0.1, 0.3], [0.1, 0.1, 1.0, 0.2], [0.3, 0.3, 0.2, 1.0]])


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (1.0, [0, 1, 2, 3]),
        # 0 first (0.45); then 1: 0.425 - 0.475 < 0, 2: 0.25 - 0.05 = 0.2, 3: 0.2 - 0.15 = 0.05; then 3: 0.2 - 0.15
        (0.5, [0, 2, 3, 1]),
        # all are worth 0 at first; then the least like 0: 2, then 3 (-0.3 against -0.95)
        (0.0, [0, 2, 3, 1]),
    ],
)
def test_mmr_by_hand(weight: float, expected: list[int]) -> None:
    assert mmr(RELEVANCE, lambda k: ALIKE[k], 4, weight) == expected
    assert mmr(RELEVANCE, lambda k: ALIKE[k], 2, weight) == expected[:2]
    assert mmr(RELEVANCE, lambda k: ALIKE[k], 9, weight) == expected
    assert mmr(np.zeros(0), lambda k: ALIKE[k], 3, weight) == []


def test_mmr_agrees_with_its_definition() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(20, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance, alike = vectors @ vectors[0], vectors @ vectors.T
    taken: list[int] = []
    while len(taken) < 8:
        gains = {
            d: 0.7 * relevance[d] - 0.3 * (max(alike[s][d] for s in taken) if taken else 0.0)
            for d in range(20)
            if d not in taken
        }
        taken.append(max(gains, key=lambda d: gains[d]))
    assert mmr(relevance, lambda k: alike[k], 8, 0.7) == taken
