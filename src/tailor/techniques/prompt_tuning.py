"""Prompt tuning: a table of trained vectors in front of the text. Lester et al. 2021, arXiv:2104.08691.

The vectors are ids past the vocabulary (VIRTUAL + k) that lead every sequence of the slot, unless a template says where
they stand. Initialisation follows
NeMo's prompt table (text: the word embeddings of the init text, tiled or cut; random: Xavier normal) and the paper's
sampled vocabulary (section 3.2), which small tables depend on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tailor.errors import ConfigError
from tailor.models.slots import Slot
from tailor.techniques.soft_prompt import TABLE, SoftPrompt, read_table
from tailor.techniques.technique import Defaults, PeftFiles, Traits


class PromptTuning(SoftPrompt):
    """Trained virtual tokens, in front of the text or at the markers of a template; the base stays as it is."""

    type: Literal["prompt_tuning"] = "prompt_tuning"
    init: Literal["vocab", "text", "random"] = Field(
        "vocab", description="start from sampled words, from init_text, or from Xavier-normal noise"
    )
    init_text: str | None = Field(None, description="the text whose word embeddings are the start (init: text)")

    traits: ClassVar[Traits] = Traits(
        trains="num_virtual_tokens × hidden",
        where="embedding",
        formula="[P; X]: rows of P stand in front of the embedded text X",
        source="Lester et al. 2021, arXiv:2104.08691, section 2",
        frozen_base=True,
        merges=False,
        mixes=True,
        peft=True,
        rows=(50, 300),
        defaults=Defaults(learning_rate=10.0, num_epochs=8, min_steps=160, max_steps=3000, per_embedding_rms=True),
    )

    peft_types: ClassVar[tuple[str, ...]] = ("PROMPT_TUNING",)
    alternatives: ClassVar[tuple[Mapping[str, Any], ...]] = ({"init": "random"},)
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_virtual_tokens": (10, 20, 50, 100)}

    @model_validator(mode="after")
    def _text_goes_with_text(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init_text and init: text go together (either one alone has no effect)")
        return self

    def attach(self, slot: Slot) -> None:
        """Add the prompt table and put its rows into the sequences of the slot."""
        table = slot.new_parameter(self.table_name, self._start(slot))
        self.add_rows(slot, lambda: table)

    def _start(self, slot: Slot) -> Tensor:
        num, generator = self.num_virtual_tokens, slot.generator(TABLE)
        vocabulary, hidden = slot.host.embedding_shape()
        if self.init == "random":
            return torch.randn(num, hidden, generator=generator) * math.sqrt(2.0 / (num + hidden))
        if self.init == "text":
            ids = slot.host.tokenizer.encode(self.init_text or "")
            if not ids:
                raise ConfigError("init_text has no tokens")
            return slot.host.embed([ids[k % len(ids)] for k in range(num)])
        words = torch.randperm(vocabulary, generator=generator)[:num]
        return slot.host.embed([int(words[k % len(words)]) for k in range(num)])

    def to_peft(self, slot: Slot) -> PeftFiles:
        """PEFT's `PROMPT_TUNING` files."""
        return self.table_files(slot, peft_type="PROMPT_TUNING", prompt_tuning_init="RANDOM")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """Reads what PEFT saved as `PROMPT_TUNING`."""
        table = read_table(config, tensors)
        return cls(num_virtual_tokens=int(table.shape[0]), init="random"), {TABLE: table}
