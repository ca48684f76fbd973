from __future__ import annotations

import pytest

from tailor.metrics.text_scores import exact_match, normalize, token_f1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel-Tower, a\tlandmark!", "eiffeltower landmark"),
        ("an apple", "apple"),
        ("Theatre and another", "theatre and another"),
        ("", ""),
        ("the", ""),
        ("ÜBER «Köln»", "über «köln»"),
        ("U.S.A.", "usa"),
    ],
)
def test_normalize(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_exact_match() -> None:
    assert exact_match(" yes\n", "yes") == 1.0
    assert exact_match("Yes.", "yes") == 0.0
    assert exact_match("Yes.", "yes", normalized=True) == 1.0
    assert exact_match("", "") == 1.0
    assert exact_match("", "the", normalized=True) == 1.0
    assert exact_match("no", "yes", normalized=True) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat", "cat", 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("b b c", "b b b d", 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)),
        ("same words", "Words, same!", 1.0),
        ("cat", "dog", 0.0),
        ("", "dog", 0.0),
        ("dog", "", 0.0),
        ("", "", 1.0),
        ("the", "a", 1.0),
        ("東京 です", "東京", 2 / 3),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected, rel=1e-15)
