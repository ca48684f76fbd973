"""Prompts to try: sets of shots (drawn, nearest, right answers of the model's own), and instructions that it writes.

Shots: labelled few-shot, bootstrap few-shot and random search of DSPy (Khattab et al. 2023, arXiv:2310.03714).
Instructions: APE (Zhou et al. 2022, arXiv:2211.01910) shows examples and asks for the instruction behind them; MIPROv2
(Opsahl-Ong et al. 2024, arXiv:2406.11695) adds a tip; OPRO (Yang et al. 2023, arXiv:2309.03409) shows the best so far.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailor.evaluation.task import Task
from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.recipes.prompt_reasoning import changed, write_reasoning
from tailor.recipes.prompt_score import Candidate, Row, Scorer
from tailor.recipes.prompt_settings import PromptRecipe
from tailor.techniques.prompting import Prompting
from tailor.techniques.prompting_shots import Shot
from tailor.text.messages import user

TIPS = (
    "Be concise.",
    "Say exactly what the answer must look like.",
    "Say which role the assistant has.",
    "Name what a careful person would look at in the question.",
    "Say which mistakes to avoid.",
    "Be inventive.",
)
SHOWN_EXAMPLES = 5
SHOWN_CHARACTERS = 300
LONGEST_INSTRUCTION = 1000
INSTRUCTION = SamplingParams(max_new_tokens=200, temperature=0.9)
TEACHING_ROWS = 4
"""Rows that a teacher answers, for each shot that a set may have."""

TEACHING_SHARE = 4
"""At most one in so many of the calls that are left makes candidates; the others judge them."""


@dataclass(frozen=True)
class Proposer:
    """Makes candidates out of the rows that may become shots; every draw depends on the recipe's seed alone."""

    recipe: PromptRecipe
    task: Task
    pool: Sequence[Row]
    scorer: Scorer

    def first(self, start: Candidate) -> list[Candidate]:
        """Around the prompt to begin with: sets of shots, chains of thought, instructions."""
        found = [start]
        sets = self._sets(0, self.recipe.num_sets)
        if sets:
            everything = tuple(Shot.of(row.record) for row in self.pool)
            chosen = {"shots": self.recipe.max_shots, "examples": everything, "similarity": self.recipe.similarity}
            found += [
                Candidate(changed(start.technique, selection=how, **chosen), f"{how} shots")
                for how in ("nearest", "mmr")
            ]
            found += [_with_shots(start.technique, shots, f"{len(shots)} drawn shots") for shots in sets]
            if right := self._right(_with_shots(start.technique, sets[0], "teacher")):
                found.append(_with_shots(start.technique, right, f"{len(right)} shots that the model gets right"))
        if self.recipe.reasoning:
            found += self._reasoned(start)
        found += self.instructed(start, 0)
        if self.recipe.votes > 1:
            found.append(self._voting(start))
        return found

    def around(self, ranked: Sequence[Candidate], number: int) -> list[Candidate]:
        """Round `number`: the best prompts' parts joined anew, their sets changed, new draws, new instructions."""
        best = ranked[0]
        found = [
            Candidate(_joined(one.technique, other.technique), f"words of ({one.origin}), shots of ({other.origin})")
            for one in ranked
            for other in ranked
            if one is not other and one.technique and other.technique and one.technique.system and other.technique.shots
        ]
        sets = self._sets(number, self.recipe.num_sets)
        if best.technique is not None and best.technique.selection == "fixed" and best.technique.examples:
            half = len(sets) // 2
            found += [self._varied(best, f"{number}/{k}") for k in range(half)]
            sets = sets[half:]
        found += [_with_shots(best.technique, shots, f"{len(shots)} drawn shots") for shots in sets]
        found += self.instructed(best, number)
        if self.recipe.votes > 1:
            found.append(self._voting(best))
        return found

    def instructed(self, candidate: Candidate, number: int) -> list[Candidate]:
        """The prompt with instructions that the model has written; duplicates and empty ones are left out."""
        asked = [self._asking(candidate, f"{number}/{k}", k) for k in range(self.recipe.num_instructions)]
        asked = [request for request in asked if self.scorer.room.fits(request)]
        asked = asked[: self._few]
        texts = [instruction_in(completion.text) for completion in self.scorer.journal.generate(asked)]
        kept = dict.fromkeys(text for text in texts if text)
        return [
            Candidate(changed(candidate.technique, system=text), f"instruction written in round {number + 1}")
            for text in kept
        ]

    def _asking(self, candidate: Candidate, draw: str, k: int) -> Request:
        rng = random.Random(f"{self.recipe.seed}/instruction/{draw}")
        rows = rng.sample(list(self.pool), min(SHOWN_EXAMPLES, len(self.pool)))
        shots = [Shot.of(row.record) for row in rows]
        parts = ["Here are questions and the answers that are wanted."]
        parts += [f"Question: {_short(shot.prompt)}\nAnswer: {_short(shot.completion)}" for shot in shots]
        if candidate.technique is not None and candidate.technique.system:
            parts.append(f"An instruction that leads to them: {candidate.technique.system}\nWrite a better one.")
        else:
            parts.append("Write the instruction that makes an assistant answer such questions in this way.")
        parts[-1] += f" {TIPS[k % len(TIPS)]} Write the instruction only."
        sampling = INSTRUCTION.model_copy(update={"seed": rng.randrange(1 << 31)})
        return Request((user("\n\n".join(parts)),), sampling=sampling)

    def _sets(self, number: int, how_many: int) -> list[list[Shot]]:
        """Sets of shots drawn for a round: in turn as many as allowed and half of that; labels share them evenly."""
        most = min(self.recipe.max_shots, len(self.pool))
        if not most:
            return []
        sizes = list(dict.fromkeys((most, max(1, most // 2))))
        return [
            draw_shots(self.pool, sizes[k % len(sizes)], self.task, f"{self.recipe.seed}/{number}/{k}")
            for k in range(how_many)
        ]

    def _right(self, teacher: Candidate) -> list[Shot]:
        """Rows that the model answers rightly when shown others, as shots with the rows' own completions."""
        assert teacher.technique is not None
        shown = {shot.prompt for shot in teacher.technique.examples}
        rows = [row for row in self.pool if Shot.of(row.record).prompt not in shown]
        rows = rows[: min(TEACHING_ROWS * self.recipe.max_shots, self._few // teacher.calls_per_row)]
        if not rows or self._too_long(teacher, rows):
            return []
        scores = self.scorer.answers([teacher], rows, "bootstrap shots")[0].scores
        right = [Shot.of(row.record) for row, score in zip(rows, scores, strict=True) if self.scorer.is_right(score)]
        return right[: self.recipe.max_shots]

    def _too_long(self, candidate: Candidate, rows: Sequence[Row]) -> bool:
        return not all(self.scorer.room.fits(self.scorer.request(candidate, row)) for row in rows)

    def _reasoned(self, start: Candidate) -> list[Candidate]:
        """Chain of thought without examples, and with those that have a reasoning or were given a right one."""
        pattern = self.recipe.answer_pattern
        own = start.technique.answer_pattern if start.technique is not None else None
        plain = changed(start.technique, shots=0, examples=(), reasoning=True, answer_pattern=own or pattern)
        found = [Candidate(plain, "chain of thought without examples")]
        most = self.recipe.max_shots
        if not most:
            return found
        shots = [Shot.of(row.record) for row in self.pool]
        worked = [shot for shot in shots if shot.reasoning is not None]
        source = "of the rows"
        if len(worked) < most:
            some = [shot for shot in shots if shot.reasoning is None]
            some = some[: min(TEACHING_ROWS * most, self._few)]
            told = write_reasoning(changed(plain, shots=most, examples=worked), worked + some, self._ask)
            worked, source = [shot for shot in told if shot.reasoning is not None], "written by the model"
        if worked:
            settings: dict[str, Any] = {
                "shots": min(most, len(worked)),
                "examples": worked[:most],
                "selection": "fixed",
            }
            told_as = f"{settings['shots']} shots with reasoning {source}"
            found.append(Candidate(changed(plain, **settings), f"chain of thought, {told_as}"))
        if len(worked) > most:
            settings |= {"examples": worked, "selection": "nearest", "similarity": self.recipe.similarity}
            found.append(Candidate(changed(plain, **settings), f"chain of thought, nearest shots, reasoning {source}"))
        return found

    def _ask(self, requests: Sequence[Request]) -> list[Completion]:
        return self.scorer.journal.generate(requests)

    @property
    def _few(self) -> int:
        """Calls that may be spent on making candidates now."""
        return max(0, self.scorer.journal.left // TEACHING_SHARE)

    def _varied(self, candidate: Candidate, draw: str) -> Candidate:
        """One shot of a set exchanged for another row."""
        assert candidate.technique is not None
        rng = random.Random(f"{self.recipe.seed}/vary/{draw}")
        shots = list(candidate.technique.examples)
        others = [shot for row in self.pool if (shot := Shot.of(row.record)) not in shots]
        if others:
            shots[rng.randrange(len(shots))] = rng.choice(others)
        return Candidate(changed(candidate.technique, examples=shots), f"one shot changed of ({candidate.origin})")

    def _voting(self, candidate: Candidate) -> Candidate:
        pattern = (candidate.technique.answer_pattern if candidate.technique else None) or self.recipe.answer_pattern
        technique = changed(candidate.technique, votes=self.recipe.votes, answer_pattern=pattern)
        return Candidate(technique, f"{self.recipe.votes} votes on ({candidate.origin})")


def draw_shots(pool: Sequence[Row], num: int, task: Task, seed: str) -> list[Shot]:
    """`num` rows as shots; of a label set every label has its turn, in a drawn order."""
    rng = random.Random(f"{seed}/sets")
    rows = rng.sample(list(pool), len(pool))
    if "labels" in task.kind:
        by_label: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_label[row.answer].append(row)
        turns = [row for rank in range(num) for some in by_label.values() for row in some[rank : rank + 1]]
        rows = turns[:num]
        rng.shuffle(rows)
    return [Shot.of(row.record) for row in rows[:num]]


def instruction_in(text: str) -> str:
    """The instruction in what a model wrote: without a heading and quotes around it; empty when too long or nothing."""
    found = re.sub(r"^(?:\W*instruction\W*:)", "", text.strip(), flags=re.IGNORECASE).strip().strip("\"'`*“”").strip()
    return found if len(found) <= LONGEST_INSTRUCTION else ""


def _with_shots(technique: Prompting | None, shots: Sequence[Shot], origin: str) -> Candidate:
    return Candidate(changed(technique, shots=len(shots), examples=shots, selection="fixed"), origin)


def _joined(one: Prompting | None, other: Prompting | None) -> Prompting:
    """The instruction of one prompt with everything else of the other."""
    assert one is not None
    return changed(other, system=one.system)


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
