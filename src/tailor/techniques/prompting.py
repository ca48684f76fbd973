"""Prompt engineering as a technique: system text, template, shots, chain of thought. Trains nothing.

Few-shot: Brown et al. 2020, arXiv:2005.14165. Zero-shot chain of thought: Kojima et al. 2022, arXiv:2205.11916
(section 3: "Let's think step by step"); the answer is then read out of the text by a pattern.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from tailor.config import Pattern, Strict
from tailor.data.records import Conversation, PromptCompletion, Record, completion_of, prompt_of
from tailor.errors import ConfigError
from tailor.metrics.answers import FINAL_ANSWER
from tailor.models.slots import Slot
from tailor.techniques.technique import Technique, Traits
from tailor.text.messages import Message, assistant, system
from tailor.text.similarity import BM25

STEP_BY_STEP = "Let's think step by step, then end with: The answer is"


class Shot(Strict):
    """A worked example shown in the prompt."""

    prompt: str
    completion: str


class Prompting(Technique):
    """System text, template, shots and chain of thought, as one versioned artifact (`prompt.json`)."""

    type: Literal["prompting"] = "prompting"
    system: str | None = Field(None, description="system text in front of everything")
    template: str = Field("{prompt}", description="text around the prompt; {prompt} stands for it")
    shots: int = Field(4, ge=0, description="worked examples in front of the prompt")
    selection: Literal["fixed", "random", "nearest"] = Field(
        "random", description="fixed: the first rows; random: drawn once; nearest: per prompt, by BM25"
    )
    reasoning: bool = Field(False, description="ask for chain of thought and read the final answer out of it")
    answer_pattern: Pattern | None = Field(None, description="regular expression whose first group is the answer")
    examples: tuple[Shot, ...] = Field(
        (), description="the shots and a spare (or, for nearest, the pool); filled from the data"
    )

    traits: ClassVar[Traits] = Traits(
        trains="nothing",
        where="text",
        formula="text in, text out",
        source="Brown et al. 2020, arXiv:2005.14165; Kojima et al. 2022, arXiv:2205.11916",
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
        if not (self.system or self.shots or self.reasoning or self.template != "{prompt}"):
            raise ValueError("a prompt without system text, template, shots or reasoning changes nothing")
        return self

    def prepare(self, records: Sequence[Record], seed: int) -> Self:
        """Take the shots from the training rows, and a spare for the row that is a shot itself.

        Raises ConfigError when there are fewer rows than shots.
        """
        if self.examples or self.shots == 0:
            return self
        usable = [k for k, r in enumerate(records) if isinstance(r, PromptCompletion | Conversation)]
        if len(usable) < self.shots:
            raise ConfigError(f"{self.shots} shots are asked for, but there are {len(usable)} rows to take them from")
        kept = min(self.shots + 1, len(usable))
        if self.selection == "fixed":
            usable = usable[:kept]
        elif self.selection == "random":
            usable = random.Random(seed).sample(usable, kept)
        return self.model_copy(update={"examples": tuple(_shot(records[k]) for k in usable)})

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
        slot.compose = self.compose
        slot.answer_pattern = self.pattern

    @property
    def pattern(self) -> str | None:
        """What reads the answer out of a completion; None means the whole text is the answer."""
        return self.answer_pattern or (FINAL_ANSWER if self.reasoning else None)

    def compose(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The turns the base is shown: system text, shots, then the conversation with its last user turn templated."""
        own_system = [m for m in messages[:1] if m.role in ("system", "developer")]
        rest = list(messages[len(own_system) :])
        last = max((k for k, m in enumerate(rest) if m.role == "user"), default=None)
        query = rest[last].content if last is not None else ""
        texts = [t for t in (self.system, *(m.content for m in own_system)) if t]
        turns = [system("\n\n".join(texts))] if texts else []
        for shot in self._chosen(query):
            turns += [Message("user", self._fill(shot.prompt)), assistant(shot.completion)]
        if last is not None:
            rest[last] = Message("user", self._fill(query), name=rest[last].name)
        return (*turns, *rest)

    def _fill(self, prompt: str) -> str:
        text = self.template.replace("{prompt}", prompt)
        return f"{text}\n{STEP_BY_STEP}" if self.reasoning else text

    def _chosen(self, query: str) -> Sequence[Shot]:
        if not self.shots:
            return ()
        # a prompt never gets its own row as a shot: training would learn to copy the answer out of the prompt
        if self.selection != "nearest":
            return [shot for shot in self.examples if shot.prompt != query][: self.shots]
        ranked = self._index.top(query, self.shots + 1)
        others = [self.examples[k] for k in ranked if self.examples[k].prompt != query]
        return others[: self.shots][::-1]  # the nearest stands last, right before the question

    @cached_property
    def _index(self) -> BM25:
        return BM25([shot.prompt for shot in self.examples])


def _shot(record: Record) -> Shot:
    turns = [m for m in prompt_of(record) if m.role == "user"]
    return Shot(prompt=turns[-1].content if turns else "", completion=completion_of(record))
