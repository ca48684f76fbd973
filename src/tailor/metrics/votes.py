"""Self-consistency: which of several answers to one question most of them agree on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tailor.metrics.answers import as_number


@dataclass(frozen=True, slots=True)
class Votes:
    """How many answers are sampled for a question, and how hot."""

    num: int
    temperature: float


def majority(answers: Sequence[str], logprobs: Sequence[float]) -> int:
    """The place of the winner: the likeliest of the answers that most agree on (Wang et al. 2022, arXiv:2203.11171).

    `logprobs` has the mean token logprob behind each answer. Of two answers named equally often that with the higher
    mean logprob over its votes wins, then the first. An empty answer (nothing could be read out of the text) has no
    vote, unless all are empty. Answers are the same when their words are, whatever case and white space, or their
    numbers ("18", "$18.00"). Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("there are no answers to vote on")
    votes: dict[str | float, list[int]] = defaultdict(list)
    for place, answer in enumerate(answers):
        if answer.strip():
            votes[_key(answer)].append(place)
    if not votes:
        votes[""] = list(range(len(answers)))

    def weight(places: Sequence[int]) -> tuple[int, float]:
        return len(places), sum(logprobs[place] for place in places) / len(places)

    winners = max(votes.values(), key=weight)  # of equal ones, max takes the first
    return max(winners, key=lambda place: logprobs[place])


def _key(answer: str) -> str | float:
    """What two spellings of one answer have in common."""
    number = as_number(answer) if not re.search(r"[^\W\d_]", answer) else None
    return " ".join(answer.casefold().split()).rstrip(".!") if number is None else number
