"""What people together say about each answer of a chat: the feedback that counts, summed up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tailor.feedback.feedback import Feedback, current


@dataclass
class Verdicts:
    """About the answers of one chat, by the choice's index."""

    edits: dict[int, str] = field(default_factory=dict)
    votes: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ratings: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    scores: dict[int, dict[str, list[int]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    preferred: Counter[int] = field(default_factory=Counter)

    @property
    def best(self) -> int | None:
        """The choice that most people preferred; None when nobody did, or as many another."""
        first = self.preferred.most_common(2)
        return None if not first or (len(first) == 2 and first[0][1] == first[1][1]) else first[0][0]

    def balance(self, choice: int) -> int:
        """Votes up minus votes down."""
        return sum(self.votes.get(choice, ()))

    def was_voted(self, choice: int) -> bool:
        """Whether anybody has said up or down."""
        return bool(self.votes.get(choice))

    def rating(self, choice: int) -> float | None:
        """The mean, from 1 to 5; None when nobody rated."""
        given = self.ratings.get(choice)
        return sum(given) / len(given) if given else None

    def attributes(self, choice: int) -> dict[str, int]:
        """The mean of each attribute, rounded half up, since the scale is whole numbers."""
        given = self.scores.get(choice) or {}
        return {name: int(sum(all) / len(all) + 0.5) for name, all in sorted(given.items())}

    def add(self, said: Feedback) -> None:
        """Take one statement. A number from 1 to 5 is also the attribute `quality`, one less."""
        at = said.choice
        if said.content is not None:
            self.edits[at] = said.content
        elif said.preferred is not None:
            self.preferred[said.preferred] += 1
        elif said.vote in ("up", "down"):
            self.votes[at].append(1 if said.vote == "up" else -1)
        elif said.rating is not None:
            self.ratings[at].append(said.rating)
            self.scores[at]["quality"].append(said.rating - 1)
        elif said.attributes is not None:
            for name, score in said.attributes.items():
                self.scores[at][name].append(score)
            overall = said.attributes.get("quality", said.attributes.get("helpfulness"))
            if overall is not None:
                self.ratings[at].append(overall + 1)


NOTHING = Verdicts()
"""Of a chat that nobody said anything about."""


def verdicts(feedback: Iterable[Feedback]) -> Mapping[str, Verdicts]:
    """By the chat's id. Of several people's edits of an answer the last one counts."""
    found: dict[str, Verdicts] = defaultdict(Verdicts)
    for said in current(feedback):
        found[said.completion_id].add(said)
    return dict(found)
