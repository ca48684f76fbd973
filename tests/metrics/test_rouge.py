from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from tailor.metrics.rouge import longest_common_subsequence, rouge

KEYS = ["rouge1", "rouge2", "rougeL"]
ORACLE = RougeScorer(KEYS, use_stemmer=False)
WORDY = st.lists(
    st.sampled_from(["a", "b", "c", "dd", "e-f", "Ü", "İ", "K", "1.5", "\n", "_", "the"]), max_size=40
).map(" ".join)


def same(prediction: str, references: list[str]) -> None:
    expected = ORACLE.score_multi(references, prediction)
    ours = rouge(prediction, references)
    for key in KEYS:
        assert ours[key] == pytest.approx(expected[key].fmeasure, abs=1e-12)


@given(WORDY, st.lists(WORDY, min_size=1, max_size=3))
def test_equals_the_package_on_words(prediction: str, references: list[str]) -> None:
    same(prediction, references)


@given(st.text(max_size=40), st.text(max_size=40))
def test_equals_the_package_on_any_text(prediction: str, reference: str) -> None:
    same(prediction, [reference])


def test_by_hand() -> None:
    scores = rouge("the cat the mat", "the cat is on the mat")
    assert scores["rouge1"] == pytest.approx(2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6))
    assert scores["rouge2"] == pytest.approx(2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5))
    assert scores["rougeL"] == pytest.approx(0.8)
    assert rouge("", "a") == rouge("a", "") == rouge("", "") == rouge("x", "y") == dict.fromkeys(KEYS, 0.0)
    assert rouge("a b", ["c", "a b", "a"]) == dict.fromkeys(KEYS, 1.0)


@given(st.lists(st.sampled_from("abc"), max_size=80), st.lists(st.sampled_from("abc"), max_size=80))
def test_longest_common_subsequence_equals_the_table(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, left in enumerate(first):
        for j, right in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(first, second) == table[-1][-1]
