"""Worked examples in a prompt: what they say, and which of them a question gets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tailor.config import Strict
from tailor.data.records import Record, completion_of, prompt_of
from tailor.errors import ConfigError
from tailor.metrics.answers import FINAL_ANSWER, extract_answer
from tailor.text.similarity import BM25, Cosine, Scores, best, mmr, relative

Selection = Literal["fixed", "random", "nearest", "mmr"]
Similarity = Literal["bm25", "embedding"]

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to (num_texts, H) unit vectors."""

REASONING_COLUMNS = ("reasoning", "rationale")
"""Columns of a row that hold the way to its completion."""

KEPT_VECTORS = 4096
"""Vectors of questions that are kept: evaluation, training and several answers ask the same ones again."""


class Shot(Strict):
    """A worked example shown in the prompt; `reasoning` is the way to its completion."""

    prompt: str
    completion: str
    reasoning: str | None = None

    @staticmethod
    def of(record: Record) -> Shot:
        """A row as an example: its last question, its completion, and the reasoning that the row has in a column."""
        turns = [m for m in prompt_of(record) if m.role == "user"]
        given = [record.meta.get(column) for column in REASONING_COLUMNS]
        reasoning = next((text for text in given if isinstance(text, str) and text.strip()), None)
        return Shot(prompt=turns[-1].content if turns else "", completion=completion_of(record), reasoning=reasoning)

    def reasoned(self, pattern: str | None) -> str:
        """The assistant turn of a chain of thought: the reasoning, if there is one, then the answer where it is looked
        for ("The answer is …", unless the completion says it in a way that the pattern reads)."""
        found = extract_answer(self.completion, pattern or FINAL_ANSWER) is not None
        answer = self.completion if found else f"The answer is {self.completion}"
        return f"{self.reasoning.strip()}\n{answer}" if self.reasoning else answer


class ShotChooser:
    """Which of `shots` a question gets, `num` at most. A question never gets its own row: training would learn to copy
    the answer out of the prompt.

    `fixed` and `random` are the first ones that are not the question's own. `nearest` are the most similar ones, `mmr`
    those that are similar to the question and different from each other; the most similar stands last, right before the
    question. Raises ConfigError for similarity by embedding without `embed`.
    """

    def __init__(
        self,
        shots: Sequence[Shot],
        num: int,
        selection: Selection,
        similarity: Similarity = "bm25",
        relevance_weight: float = 0.5,
        embed: Embed | None = None,
    ) -> None:
        self.shots = shots
        self.num = num
        self.selection = selection
        self.relevance_weight = relevance_weight
        self.by_embedding = similarity == "embedding" and selection in ("nearest", "mmr")
        if self.by_embedding and embed is None:
            raise ConfigError(
                "shots chosen by embedding need a base that embeds texts", hint="use similarity: bm25, or give embed"
            )
        self._embed = embed
        self._kept: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def chosen(self, query: str) -> Sequence[Shot]:
        """The shots in the order in which they are shown."""
        if not self.num or not self.shots:
            return ()
        if self.selection in ("fixed", "random"):
            return [shot for shot in self.shots if shot.prompt != query][: self.num]
        others = [k for k, shot in enumerate(self.shots) if shot.prompt != query]
        scores = self._scores(query)[others]
        if self.selection == "nearest":
            places = best(scores, self.num)
        else:
            relevance = scores if self.by_embedding else relative(scores)
            places = mmr(relevance, lambda k: self._likeness(others[k])[others], self.num, self.relevance_weight)
            places.sort(key=lambda place: -float(scores[place]))
        return [self.shots[others[place]] for place in places[::-1]]

    def _scores(self, query: str) -> Scores:
        if not self.by_embedding:
            return self._words.scores(query)
        return self._vectors.scores(self._vector(query))

    def _likeness(self, place: int) -> Scores:
        """How like one shot every shot is, at most 1."""
        if self.by_embedding:
            return self._vectors.scores(self._vectors.vectors[place])
        return relative(self._words.scores(self.shots[place].prompt))

    @cached_property
    def _words(self) -> BM25:
        return BM25([shot.prompt for shot in self.shots])

    @cached_property
    def _vectors(self) -> Cosine:
        return Cosine(self._embedded([shot.prompt for shot in self.shots]))

    def _vector(self, query: str) -> npt.NDArray[np.float32]:
        if query not in self._kept:
            self._kept[query] = self._embedded([query])[0]
            if len(self._kept) > KEPT_VECTORS:
                self._kept.popitem(last=False)
        return self._kept[query]

    def _embedded(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        assert self._embed is not None
        return np.asarray(self._embed(texts).detach().float().cpu().numpy())
