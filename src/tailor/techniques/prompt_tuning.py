"""Prompt tuning: a table of trained vectors in front of the text. Lester et al. 2021, arXiv:2104.08691.

The vectors are ids past the vocabulary (VIRTUAL + k) that lead every sequence of the slot. Initialisation follows
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
from tailor.models.embedding import VirtualTokens
from tailor.models.slots import Slot
from tailor.techniques.technique import Defaults, PeftFiles, Technique, Traits

TABLE = "prompt_embeddings"


class PromptTuning(Technique):
    """Trained virtual tokens in front of the text; the base stays as it is."""

    type: Literal["prompt_tuning"] = "prompt_tuning"
    num_virtual_tokens: int = Field(50, ge=1, description="rows of the prompt table; each costs context like a word")
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

    peft_types: ClassVar[tuple[str, ...]] = ("PROMPT_TUNING", "P_TUNING")
    alternatives: ClassVar[tuple[Mapping[str, Any], ...]] = ({"init": "random"},)

    @model_validator(mode="after")
    def _text_goes_with_text(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init_text and init: text go together (either one alone has no effect)")
        return self

    def attach(self, slot: Slot) -> None:
        """Add the prompt table and let its rows lead every sequence of the slot."""
        table = slot.new_parameter(TABLE, self._start(slot))
        slot.add_virtual_tokens(VirtualTokens(self.num_virtual_tokens, lambda: table))

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
        table = slot.state()[TABLE]
        config = {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": table.shape[0],
            "token_dim": table.shape[1],
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
            "inference_mode": True,
        }
        return config, {TABLE: table}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """Reads what PEFT saved as `PROMPT_TUNING`, or as `P_TUNING` (whose encoder is already baked in)."""
        if set(tensors) != {TABLE}:
            raise ConfigError(
                f"a prompt table holds one tensor, {TABLE!r}; this one holds {', '.join(sorted(tensors))}"
            )
        table = tensors[TABLE]
        if table.shape[0] != config["num_virtual_tokens"]:
            raise ConfigError(f"the table has {table.shape[0]} rows, its config says {config['num_virtual_tokens']}")
        return cls(num_virtual_tokens=int(table.shape[0]), init="random"), {TABLE: table}
