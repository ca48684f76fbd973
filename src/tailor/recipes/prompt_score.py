"""What a prompt is worth: the task's metric on each row's answer, the same one that an evaluation takes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tailor.data.examples import Rendering
from tailor.data.progress import Progress, silent
from tailor.data.records import Record, completion_of, prompt_of, tools_of
from tailor.errors import ConfigError, DataError
from tailor.evaluation.scores import Outcome, metric_named
from tailor.evaluation.task import Task, answered, answers_of, find_task
from tailor.inference.backend import Backend, Completion, Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.inference.votes import sampled, winner
from tailor.metrics.answers import extract_answer
from tailor.models.slots import Compose
from tailor.recipes.prompt_journal import Journal
from tailor.recipes.prompt_settings import PromptRecipe
from tailor.store import text_hash
from tailor.techniques.prompting import Prompting
from tailor.techniques.prompting_shots import Embed

CHARACTERS_PER_TOKEN = 3
"""Of answers whose tokenizer is not known: fewer than English has, so that none is cut."""

LABELS = "label_accuracy"
"""The metric that generates nothing: the likeliest label of all is the answer."""

REASONING_TOKENS = 256
"""Room for a chain of thought: references do not show how long it is."""


@dataclass(frozen=True)
class Candidate:
    """A prompt to try; `technique` None is the plain base. `origin` says where it comes from."""

    technique: Prompting | None
    origin: str

    @cached_property
    def key(self) -> str:
        """The same for the same prompt, wherever it comes from."""
        settings = None if self.technique is None else self.technique.model_dump(mode="json")
        return text_hash(json.dumps(settings, sort_keys=True))[:16]

    @property
    def calls_per_row(self) -> int:
        """Model calls for one answer."""
        return self.technique.votes if self.technique is not None else 1


@dataclass(frozen=True)
class Row:
    """A record with what is right for it."""

    record: Record
    reference: str
    answer: str


def find_metric(recipe: PromptRecipe, task: Task) -> str:
    """The metric by which prompts are chosen: accuracy where there are answers to be right about, else token F1.

    Raises ConfigError for labels that cannot be scored as completions of these rows, or under chains of thought.
    """
    if recipe.metric == LABELS and (task.frame is None or "labels" not in task.kind):
        raise ConfigError(f"{LABELS} cannot be computed here: {task.reason}", hint="use --metric accuracy")
    if recipe.metric == LABELS and (recipe.reasoning or recipe.votes > 1):
        raise ConfigError(f"{LABELS} scores labels without generating: there is nothing to reason or to vote on")
    if recipe.metric != "auto":
        return recipe.metric
    return "token_f1" if task.kind == "text" else "accuracy"


def rows_of(records: Sequence[Record], pattern: str | None) -> list[Row]:
    """The records with their references. Raises DataError naming those without, or whose answer cannot be read."""
    usable = answered(records)
    references = [completion_of(record) for record in usable]
    answers = answers_of(usable, references, pattern)
    return [Row(*each) for each in zip(usable, references, answers, strict=True)]


def task_of(rows: Sequence[Row], pattern: str | None) -> Task:
    """The kind of task that the rows are."""
    return find_task([row.reference for row in rows], [row.answer for row in rows], (), pattern)


@dataclass(frozen=True)
class Room:
    """How long requests are and whether they fit: known of a local base, None where nobody can tell."""

    rendering: Rendering | None

    @staticmethod
    def of(backend: Backend) -> Room:
        """That of the plain base."""
        return Room(backend.base.rendering() if isinstance(backend, LocalBackend) else None)

    def tokens(self, request: Request) -> int | None:
        """The prompt's tokens. Raises DataError for a text that the base's template refuses."""
        return None if self.rendering is None else len(self.rendering.prompt(request.messages, request.tools))

    def fits(self, request: Request) -> bool:
        """Whether prompt and longest answer have room in the context, and the template takes the texts."""
        try:
            tokens = self.tokens(request)
        except DataError:
            return False
        if tokens is None or self.rendering is None:
            return True
        return tokens + request.sampling.max_new_tokens <= self.rendering.max_seq_len


@dataclass(frozen=True)
class Answers:
    """A prompt's answers on some rows, their scores, and how long what was asked is on average (tokens)."""

    completions: list[Completion]
    scores: list[float]

    @property
    def prompt_tokens(self) -> float:
        """Mean number of prompt tokens."""
        return sum(c.num_prompt_tokens for c in self.completions) / max(1, len(self.completions))


@dataclass(frozen=True)
class Scorer:
    """Asks for answers to rows under candidate prompts, through a journal, and scores them."""

    journal: Journal
    metric: str
    task: Task
    pattern: str | None
    max_new_tokens: int
    embed: Embed
    room: Room
    progress: Progress = silent
    _composers: dict[str, Compose] = field(default_factory=dict)

    def sampling(self, technique: Prompting | None) -> SamplingParams:
        """Greedy; one that reasons gets room for it."""
        reasons = technique is not None and technique.reasoning
        tokens = max(self.max_new_tokens, REASONING_TOKENS) if reasons else self.max_new_tokens
        return SamplingParams(max_new_tokens=tokens)

    def request(self, candidate: Candidate, row: Row) -> Request:
        """The row's question under a prompt, as the plain base is asked it."""
        messages = prompt_of(row.record)
        if candidate.technique is not None:
            if candidate.key not in self._composers:
                self._composers[candidate.key] = candidate.technique.composer(self.embed)
            messages = self._composers[candidate.key](messages)
        return Request(messages, sampling=self.sampling(candidate.technique), tools=tools_of(row.record))

    def answers(self, candidates: Sequence[Candidate], rows: Sequence[Row], stage: str) -> list[Answers]:
        """Every candidate's answers to all rows, asked together."""
        if self.metric == LABELS:
            return [self._choices(candidate, rows, stage) for candidate in candidates]
        asked = [
            sampled(self.request(candidate, row), candidate.technique.voting if candidate.technique else None)
            for candidate in candidates
            for row in rows
        ]
        requests = [request for some in asked for request in some]

        def tell(done: int) -> None:
            self.progress(stage, done, len(requests))

        given = iter(self.journal.generate(requests, tell))
        votes = iter([[next(given) for _ in some] for some in asked])
        found = []
        for candidate in candidates:
            completions = [self._winner(candidate.technique, next(votes)) for _ in rows]
            scores = [self._score(completion, row) for completion, row in zip(completions, rows, strict=True)]
            found.append(Answers(completions, scores))
        return found

    def _choices(self, candidate: Candidate, rows: Sequence[Row], stage: str) -> Answers:
        """The likeliest label of every row under a prompt: nothing is generated."""
        assert self.task.frame is not None, "`find_metric` has seen to it"
        requests = [self.request(candidate, row) for row in rows]
        texts = [self.task.frame.around(label) for label in self.task.labels]
        places = self.journal.choose(
            requests, texts, ends=self.task.frame.ends, progress=lambda done: self.progress(stage, done, len(rows))
        )
        completions = [
            Completion(texts[place], (), (), "stop", self.room.tokens(request) or 0, self.task.labels[place])
            for place, request in zip(places, requests, strict=True)
        ]
        scores = [float(c.answer == row.answer) for c, row in zip(completions, rows, strict=True)]
        return Answers(completions, scores)

    def is_right(self, score: float) -> bool:
        """Whether an answer can be shown as an example."""
        return score >= (1.0 if self.metric in ("accuracy", LABELS, "exact_match") else 0.5)

    def _winner(self, technique: Prompting | None, votes: Sequence[Completion]) -> Completion:
        pattern = technique.pattern if technique is not None else None
        if pattern is None:
            return winner(votes)
        return winner([dataclasses.replace(c, answer=extract_answer(c.text, pattern) or "") for c in votes])

    def _score(self, completion: Completion, row: Row) -> float:
        answer = completion.answer.strip() if self.pattern is None else extract_answer(completion.text, self.pattern)
        score = metric_named(self.metric).row
        assert score is not None, "the recipe lets no other metric pass"
        return score(Outcome(row.reference, row.answer, completion=completion.answer, predicted=answer))


def longest_answer(rows: Sequence[Row], backend: Backend) -> int:
    """1.5 times the longest reference in tokens, and 8: a model that never stops costs no minutes."""
    if isinstance(backend, LocalBackend):
        tokenizer = backend.base.tokenizer
        longest = max(len(tokenizer.encode(row.reference, continues=True)) for row in rows)
    else:
        longest = max(len(row.reference) for row in rows) // CHARACTERS_PER_TOKEN + 1
    return math.ceil(1.5 * longest) + 8
