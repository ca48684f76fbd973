"""The majority of several answers, by hand: counts first, then likelihood; spellings of one answer vote together."""

from __future__ import annotations

import pytest

from tailor.metrics.votes import majority


@pytest.mark.parametrize(
    ("answers", "logprobs", "winner"),
    [
        (["a", "b", "b"], [-0.1, -3.0, -2.0], 2),  # two votes beat one, however likely; of the two the likelier
        (["a", "b"], [-1.0, -0.5], 1),  # one vote each: the likelier
        (["a", "b", "b", "a"], [-1.0, -0.4, -0.9, -0.2], 3),  # a: -0.6 on average, b: -0.65
        (["a", "b"], [-1.0, -1.0], 0),  # nothing tells them apart: the first
        (["", "", "b"], [-0.1, -0.1, -9.0], 2),  # an empty answer has no vote
        (["", " "], [-2.0, -1.0], 1),  # unless all are empty
        (["Yes.", "no", " yes"], [-1.0, -0.1, -2.0], 0),
        (["18", "$18.00", "17", "17.5"], [-2.0, -1.0, -0.1, -0.1], 1),
        (["room 3", "floor 3", "room 4"], [-3.0, -2.0, -1.0], 2),  # a number among words is not the answer
    ],
)
def test_by_hand(answers: list[str], logprobs: list[float], winner: int) -> None:
    assert majority(answers, logprobs) == winner


def test_no_answers() -> None:
    with pytest.raises(ValueError, match="no answers"):
        majority([], [])
