"""The search: rounds of candidates, each halved again and again on more rows, until the calls are spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tailor.recipes.prompt_candidates import Proposer
from tailor.recipes.prompt_score import Candidate, Row, Scorer

FIRST_ROWS = 8
KEPT_FOR_NEXT = 3


@dataclass
class Search:
    """Candidates and their scores on the selection rows.

    `fits` says whether every prompt of a candidate fits the context.
    """

    proposer: Proposer
    scorer: Scorer
    rows: Sequence[Row]
    start: Candidate
    rounds: int
    fits: Callable[[Candidate], bool]
    say: Callable[[str], None] = lambda text: None
    scores: dict[str, list[float]] = field(default_factory=dict)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> Candidate:
        """The best candidate of all that were scored on every row; the first of equals, which is the shorter."""
        for number in range(self.rounds):
            proposed = self.proposer.around(self.ranked()[:KEPT_FOR_NEXT], number) if number else None
            new = self._new(proposed if proposed is not None else self.proposer.first(self.start))
            tried = self._affordable(new, self.rounds - number)
            if not tried:
                self.say(f"round {number + 1}: no calls or no new prompts are left")
                break
            self._halve(tried, number)
            best = self.ranked()[0]
            self.say(f"round {number + 1}: {len(tried)} prompts, best {self.mean(best):.3f} ({best.origin})")
            if self.mean(best) >= 1.0:
                break
        return self.ranked()[0]

    def ranked(self) -> list[Candidate]:
        """The candidates with a score for every row, best first; of equals the start, then the shorter prompt."""
        whole = [c for key, c in self.candidates.items() if len(self.scores[key]) == len(self.rows)]
        return sorted(whole, key=lambda c: (-self.mean(c), c.key != self.start.key, c.calls_per_row, self._length(c)))

    def mean(self, candidate: Candidate) -> float:
        """Its score so far."""
        scores = self.scores[candidate.key]
        return sum(scores) / len(scores)

    def _length(self, candidate: Candidate) -> int:
        return sum(len(message.content) for message in self.scorer.request(candidate, self.rows[0]).messages)

    def _new(self, proposed: Sequence[Candidate]) -> list[Candidate]:
        """Those not tried yet, each once, that fit the context."""
        fresh = {c.key: c for c in reversed(proposed) if c.key not in self.candidates}
        kept = [c for c in reversed(fresh.values()) if c.key == self.start.key or self.fits(c)]
        if dropped := len(fresh) - len(kept):
            self.say(f"{dropped} prompts are too long for the base's context")
        return kept

    def _affordable(self, new: list[Candidate], rounds_left: int) -> list[Candidate]:
        """As many of them, the first ones, as this round's share of the calls pays to the end."""
        share = self.scorer.journal.left // rounds_left
        while new and self._most(new) > share:
            new = new[:-1]
        return new

    def _most(self, candidates: Sequence[Candidate]) -> int:
        """The most calls that halving them can take: the dearest ones may be those that stay."""
        dear = sorted((candidate.calls_per_row for candidate in candidates), reverse=True)
        calls, before = 0, 0
        for stop in self._stops():
            calls += sum(dear) * (stop - before)
            dear, before = dear[: math.ceil(len(dear) / 2) + 1], stop
        return calls

    def _stops(self) -> list[int]:
        """How many rows the candidates have been scored on after each step: 8, 16, … and all."""
        stops = [FIRST_ROWS]
        while stops[-1] < len(self.rows):
            stops.append(2 * stops[-1])
        return [*stops[:-1], len(self.rows)]

    def _halve(self, candidates: Sequence[Candidate], number: int) -> None:
        """Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all on a few rows, the better half on more.

        The start is kept to the end: everything is compared with it.
        """
        stage, before = f"round {number + 1}", 0
        tried = list(candidates)
        for candidate in tried:
            self.candidates[candidate.key], self.scores[candidate.key] = candidate, []
        for stop in self._stops():
            found = self.scorer.answers(tried, self.rows[before:stop], stage)
            for candidate, answers in zip(tried, found, strict=True):
                self.scores[candidate.key] += answers.scores
            before = stop
            others = sorted((c for c in tried if c.key != self.start.key), key=lambda c: -self.mean(c))
            tried = [c for c in tried if c.key == self.start.key] + others[: math.ceil(len(others) / 2)]
        self.history.append({"round": number + 1, "prompts": [self._told(c) for c in candidates]})

    def _told(self, candidate: Candidate) -> dict[str, Any]:
        scores = self.scores[candidate.key]
        return {
            "origin": candidate.origin,
            "key": candidate.key,
            "score": self.mean(candidate),
            "num_rows": len(scores),
        }
