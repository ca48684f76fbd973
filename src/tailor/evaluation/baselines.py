"""BASELINES: answers without a language model, so that nobody tunes one where none is needed.

Each learns from the training rows alone and answers with whole completions, always the same ones.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

from tailor.data.records import Record, completion_of, prompt_of
from tailor.errors import DataError, require
from tailor.evaluation.task import Kind, answered, known_answers
from tailor.metrics.answers import extract_answer
from tailor.text.messages import Message
from tailor.text.similarity import BM25

Prompts = Sequence[Sequence[Message]]

WITH_LABELS: tuple[Kind, ...] = ("labels", "labels and text")


@dataclass(frozen=True)
class Baseline:
    """`answers(train, prompts, pattern)` gives one completion per prompt; `kinds` are the tasks that it is for.

    `pattern` reads the label out of a completion; without one the completion is the label. Raises DataError when the
    training rows hold nothing to learn from, MissingDependencyError when scikit-learn is needed and missing.
    """

    kinds: tuple[Kind, ...]
    answers: Callable[[Sequence[Record], Prompts, str | None], list[str]]

    def applies(self, kind: Kind) -> bool:
        """Whether it can answer this kind of task."""
        return kind in self.kinds


def majority(train: Sequence[Record], prompts: Prompts, pattern: str | None = None) -> list[str]:
    """The most frequent label of the training rows (of equals, the one that comes first), whatever is asked."""
    rows = _Labelled.of(train, pattern)
    label = Counter(rows.labels).most_common(1)[0][0]
    return rows.completed([label] * len(prompts), prompts)


def nearest_neighbour(train: Sequence[Record], prompts: Prompts, pattern: str | None = None) -> list[str]:
    """The completion of the training row whose prompt is nearest by BM25 (the first row where no word is shared)."""
    rows = _Rows.of(train)
    return [rows.completions[rows.index.top(_text(prompt), 1)[0]] for prompt in prompts]


def logistic_regression(train: Sequence[Record], prompts: Prompts, pattern: str | None = None) -> list[str]:
    """The label by logistic regression over TF-IDF of words and pairs of words (scikit-learn).

    Counts enter as 1 + ln tf. C = 10: with scikit-learn's 1, a few rows per label teach it half as much.
    """
    rows = _Labelled.of(train, pattern)
    if len(set(rows.labels)) == 1:
        return rows.completed(rows.labels[:1] * len(prompts), prompts)
    features = require("sklearn.feature_extraction.text", "eval")
    linear = require("sklearn.linear_model", "eval")
    vectorizer = features.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        seen = vectorizer.fit_transform(rows.prompts)
    except ValueError as error:
        raise DataError(f"the training prompts hold no words to learn from ({error})") from error
    classifier = linear.LogisticRegression(C=10.0, max_iter=1000)
    with warnings.catch_warnings():
        # few rows of many labels, and a fit that stops early, are what they are: the score says it
        warnings.simplefilter("ignore", UserWarning)
        classifier.fit(seen, rows.labels)
    predicted = classifier.predict(vectorizer.transform([_text(prompt) for prompt in prompts])) if prompts else []
    return rows.completed([str(label) for label in predicted], prompts)


BASELINES: dict[str, Baseline] = {
    "majority": Baseline(WITH_LABELS, majority),
    "nearest neighbour": Baseline((*WITH_LABELS, "answers and text", "text"), nearest_neighbour),
    "tf-idf + logistic regression": Baseline(WITH_LABELS, logistic_regression),
}


@dataclass(frozen=True)
class _Rows:
    """Training rows as texts."""

    prompts: list[str]
    completions: list[str]

    @staticmethod
    def of(train: Sequence[Record]) -> _Rows:
        if not train:
            raise DataError("a baseline needs training rows to answer from")
        records = answered(train)
        return _Rows([_text(prompt_of(record)) for record in records], [completion_of(r) for r in records])

    @cached_property
    def index(self) -> BM25:
        return BM25(self.prompts)


@dataclass(frozen=True)
class _Labelled(_Rows):
    """Those training rows in whose completion there is a label."""

    labels: list[str]

    @staticmethod
    def of(train: Sequence[Record], pattern: str | None = None) -> _Labelled:
        rows = _Rows.of(train)
        labels, _ = known_answers(rows.completions, pattern)
        if not labels:
            raise DataError(f"the answer pattern '{pattern}' matches nothing in the {len(train)} training rows")
        if pattern is None:
            return _Labelled(rows.prompts, rows.completions, labels)
        read = [extract_answer(completion, pattern) is not None for completion in rows.completions]
        return _Labelled(list(compress(rows.prompts, read)), list(compress(rows.completions, read)), labels)

    def completed(self, labels: Sequence[str], prompts: Prompts) -> list[str]:
        """Whole completions with these labels: of the rows that have the label, the one nearest to the prompt."""
        rows: dict[str, list[int]] = {}
        for row, label in enumerate(self.labels):
            rows.setdefault(label, []).append(row)
        return [self._nearest(rows[label], prompt) for label, prompt in zip(labels, prompts, strict=True)]

    def _nearest(self, rows: Sequence[int], prompt: Sequence[Message]) -> str:
        if len({self.completions[row] for row in rows}) > 1:
            scores = self.index.scores(_text(prompt))
            rows = [max(rows, key=lambda row: float(scores[row]))]
        return self.completions[rows[0]]


def _text(prompt: Sequence[Message]) -> str:
    """All that a prompt says."""
    return "\n".join(message.content for message in prompt)
