"""Prompt engineering as a technique: system text, template, shots, chain of thought, votes. Trains nothing.

Few-shot: Brown et al. 2020, arXiv:2005.14165. Zero-shot chain of thought: Kojima et al. 2022, arXiv:2205.11916
(section 3: "Let's think step by step"); with worked examples: Wei et al. 2022, arXiv:2201.11903. The answer is then
read out of the text by a pattern. Votes over several answers (self-consistency): Wang et al. 2022, arXiv:2203.11171.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tailor.config import Pattern
from tailor.data.records import Conversation, PromptCompletion, Record
from tailor.errors import ConfigError
from tailor.metrics.answers import FINAL_ANSWER
from tailor.metrics.votes import Votes
from tailor.models.slots import Compose, Slot
from tailor.models.text_vectors import text_vectors
from tailor.techniques.prompting_shots import Embed, Selection, Shot, ShotChooser, Similarity
from tailor.techniques.technique import Technique, Traits
from tailor.text.messages import Message, assistant, system
from tailor.text.render import make_renderer

STEP_BY_STEP = "Let's think step by step, then end with: The answer is"


class Prompting(Technique):
    """System text, template, shots and chain of thought, as one versioned artifact (`prompt.json`)."""

    type: Literal["prompting"] = "prompting"
    system: str | None = Field(None, description="system text in front of everything")
    template: str = Field("{prompt}", description="text around the prompt; {prompt} stands for it")
    shots: int = Field(4, ge=0, description="worked examples in front of the prompt")
    selection: Selection = Field(
        "random",
        description="fixed: the first rows; random: drawn once; nearest: the most similar to each prompt; mmr: similar "
        "to it, and different from each other",
    )
    similarity: Similarity = Field(
        "bm25", description="of nearest and mmr: bm25 (words), or embedding (the base's own hidden states)"
    )
    relevance_weight: float = Field(
        0.5, ge=0, le=1, description="of mmr: 1 is nearest, 0 only keeps the shots different from each other"
    )
    reasoning: bool = Field(
        False,
        description="ask for chain of thought and read the final answer out of it; shots show the reasoning that rows "
        "have in a column 'reasoning' or 'rationale'",
    )
    bootstrap: bool = Field(
        False,
        description="with reasoning: the model writes that of shots without one, kept where it led to the answer",
    )
    votes: int = Field(1, ge=1, description="answers sampled per prompt, of which the majority's counts")
    vote_temperature: float = Field(0.7, gt=0, description="of the sampled answers, where the request sets none")
    answer_pattern: Pattern | None = Field(None, description="regular expression whose first group is the answer")
    examples: tuple[Shot, ...] = Field(
        (), description="the shots and a spare (or, for nearest, the pool); filled from the data"
    )

    traits: ClassVar[Traits] = Traits(
        trains="nothing",
        where="text",
        formula="text in, text out",
        source="Brown et al. 2020, arXiv:2005.14165; Kojima et al. 2022, arXiv:2205.11916; "
        "Wei et al. 2022, arXiv:2201.11903; Wang et al. 2022, arXiv:2203.11171; Carbonell & Goldstein 1998 (mmr)",
        frozen_base=True,
        merges=False,
        mixes=True,
        peft=False,
        rows=(1, 8),
        defaults=None,
    )

    alternatives: ClassVar[tuple[Mapping[str, Any], ...]] = ({"selection": "nearest"}, {"shots": 8}, {"shots": 2})

    @field_validator("template")
    @classmethod
    def _template_has_prompt(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("the template must hold {prompt}, or the model never sees what is asked")
        return template

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not (self.system or self.shots or self.reasoning or self.template != "{prompt}" or self.votes > 1):
            raise ValueError("a prompt without system text, template, shots, reasoning or votes changes nothing")
        if self.bootstrap and not self.reasoning:
            raise ValueError("bootstrap is for the reasoning of shots: set reasoning, or leave bootstrap out")
        return self

    def prepare(self, records: Sequence[Record], seed: int) -> Self:
        """Take the shots from the training rows, and a spare for the row that is a shot itself.

        With `reasoning`, rows that have one in a column come first, and alone where there are enough of them. Raises
        ConfigError when there are fewer rows than shots.
        """
        if self.examples or self.shots == 0:
            return self
        usable = [k for k, r in enumerate(records) if isinstance(r, PromptCompletion | Conversation)]
        if len(usable) < self.shots:
            raise ConfigError(f"{self.shots} shots are asked for, but there are {len(usable)} rows to take them from")
        if self.reasoning:
            reasoned = [k for k in usable if Shot.of(records[k]).reasoning is not None]
            usable = reasoned if len(reasoned) >= self.shots else usable
        kept = min(self._num_taken(len(usable)), len(usable))
        if self.selection == "fixed":
            usable = usable[:kept]
        elif self.selection == "random" or kept < len(usable):
            usable = random.Random(seed).sample(usable, kept)
        return self.model_copy(update={"examples": tuple(Shot.of(records[k]) for k in usable)})

    def _num_taken(self, num_rows: int) -> int:
        """Rows to take: the shots and a spare, or all to choose from; more where some will come out wrong."""
        if self.selection in ("fixed", "random"):
            return 4 * self.shots if self.bootstrap else self.shots + 1
        return 16 * self.shots if self.bootstrap else num_rows

    def smaller(self) -> Self | None:
        """Half as many shots."""
        if self.shots <= 1:
            return None
        return self.model_copy(update={"shots": self.shots // 2})

    def attach(self, slot: Slot) -> None:
        """Rewrite every prompt of the slot."""
        if slot.compose is not None:
            raise ConfigError("two prompting techniques in one list would rewrite each other's text")
        if self.shots and not self.examples:
            raise ConfigError("prompting asks for shots but has no examples", hint="give it training rows, or shots: 0")
        slot.compose = self.composer(_embedder(slot))
        slot.answer_pattern = self.pattern
        slot.votes = self.voting

    @property
    def pattern(self) -> str | None:
        """What reads the answer out of a completion; None means the whole text is the answer."""
        return self.answer_pattern or (FINAL_ANSWER if self.reasoning else None)

    @property
    def voting(self) -> Votes | None:
        """How many answers are voted on; None when the first is taken."""
        return Votes(self.votes, self.vote_temperature) if self.votes > 1 else None

    def composer(self, embed: Embed | None = None) -> Compose:
        """The rewriting of prompts. `embed` gives the vectors of texts where shots are chosen by them; those of the
        examples are computed once, when the first prompt comes. Raises ConfigError when it is needed and not given."""
        chooser = ShotChooser(self.examples, self.shots, self.selection, self.similarity, self.relevance_weight, embed)
        return partial(self._compose, chooser)

    def compose(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The turns the base is shown: system text, shots, then the conversation with its last user turn templated.

        Raises ConfigError for shots chosen by embedding: that takes a `composer` which embeds.
        """
        return self._plain(messages)

    @cached_property
    def _plain(self) -> Compose:
        return self.composer()

    def _compose(self, chooser: ShotChooser, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        own_system = [m for m in messages[:1] if m.role in ("system", "developer")]
        rest = list(messages[len(own_system) :])
        last = max((k for k, m in enumerate(rest) if m.role == "user"), default=None)
        query = rest[last].content if last is not None else ""
        texts = [t for t in (self.system, *(m.content for m in own_system)) if t]
        turns = [system("\n\n".join(texts))] if texts else []
        for shot in chooser.chosen(query):
            answer = shot.reasoned(self.answer_pattern) if self.reasoning else shot.completion
            turns += [Message("user", self._fill(shot.prompt)), assistant(answer)]
        if last is not None:
            rest[last] = Message("user", self._fill(query), name=rest[last].name)
        return (*turns, *rest)

    def _fill(self, prompt: str) -> str:
        text = self.template.replace("{prompt}", prompt)
        return f"{text}\n{STEP_BY_STEP}" if self.reasoning else text


def _embedder(slot: Slot) -> Embed:
    """Vectors of texts by the slot's own base. Raises ConfigError in a worker process of a GPU's owner."""
    host, owner = slot.host, os.getpid()

    def embed(texts: Sequence[str]) -> Tensor:
        if os.getpid() != owner:
            if host.device.type != "cpu":
                raise ConfigError(
                    "so many rows are worked on by processes that cannot use the GPU: choose shots by words",
                    hint="technique.similarity=bm25",
                )
            torch.set_num_threads(1)  # threads do not survive a fork, and a pass that waits for them never ends
        return text_vectors(host, make_renderer(host.tokenizer), texts)

    return embed


__all__ = ["Prompting", "Shot"]
