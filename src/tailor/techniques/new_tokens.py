"""New tokens: words of the user's own as tokens, of which only the new rows of embedding and head are trained.

A word starts as the mean of the tokens that it, or a text describing it, is cut into today; alternatively as the mean
of all words (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models": the predictions of the
other words then change little).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from tailor.errors import ConfigError
from tailor.models.new_tokens import NewRows, extended
from tailor.models.slots import Slot
from tailor.techniques.technique import Defaults, Technique, Traits

EMBEDDING = "new_tokens.embedding"
HEAD = "new_tokens.head"


class NewTokens(Technique):
    """Words of your own as single tokens, with trained rows of embedding and head; the base's own stay as they are."""

    type: Literal["new_tokens"] = "new_tokens"
    tokens: tuple[str, ...] = Field(min_length=1, description="the words", examples=[["<sku>", "<order>"]])
    init: Literal["pieces", "mean"] = Field(
        "pieces", description="start from the mean of the tokens a word is cut into today, or of all words"
    )
    descriptions: Mapping[str, str] = Field(
        {}, description="texts to start from in place of the words themselves, e.g. {'<sku>': 'article number'}"
    )

    traits: ClassVar[Traits] = Traits(
        trains="rows of embedding and head per new token",
        where="embedding and head rows",
        formula="[E; E'], [W; W']: rows E' and W' of the new words beside those of the vocabulary",
        source="Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models",
        frozen_base=True,
        merges=False,
        mixes=True,
        peft=False,
        rows=(50, 300),
        defaults=Defaults(learning_rate=0.2, num_epochs=5, min_steps=80, max_steps=2000, per_embedding_rms=True),
    )

    example: ClassVar[Mapping[str, Any]] = {"tokens": ["<sku>"]}
    alternatives: ClassVar[tuple[Mapping[str, str], ...]] = ({"init": "mean"},)

    @field_validator("tokens")
    @classmethod
    def _each_once_with_text(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tokens)) < len(tokens):
            raise ValueError("a token is named twice")
        if blank := [token for token in tokens if not token or token != token.strip()]:
            raise ValueError(f"{blank[0]!r} is empty or begins or ends with a space")
        return tokens

    @model_validator(mode="after")
    def _descriptions_are_used(self) -> Self:
        if strange := [word for word in self.descriptions if word not in self.tokens]:
            raise ValueError(f"descriptions: {strange[0]!r} is not among the tokens")
        if self.descriptions and self.init == "mean":
            raise ValueError("descriptions go with init: pieces; the mean of all words does not look at them")
        return self

    def attach(self, slot: Slot) -> None:
        """Give the slot a tokenizer and rows of its own. Raises ConfigError for words that the base has already."""
        tokenizer, first = extended(slot.host.tokenizer, self.tokens)
        embedding, head = slot.host.word_weights()
        if first > min(len(embedding), len(head)):
            raise ConfigError(f"the base's tokenizer has {first} ids, its embedding only {len(embedding)} rows")
        rows = slot.new_parameter(EMBEDDING, self._start(slot, embedding))
        columns = rows if head is embedding else slot.new_parameter(HEAD, self._start(slot, head))
        slot.add_words(tokenizer, NewRows(first, rows, columns))

    def beyond_peft(self) -> str:
        """PEFT trains rows of tokens that base and tokenizer have already; it has no files for added ones."""
        return "new tokens have no PEFT format: PEFT's files name rows that the base has already"

    @torch.no_grad()
    def _start(self, slot: Slot, weight: Tensor) -> Tensor:
        """(n, width): means of rows of the embedding's or the head's weight."""
        vocabulary = slot.host.tokenizer.vocab_size
        if self.init == "mean":
            return weight[:vocabulary].float().mean(dim=0).repeat(len(self.tokens), 1)
        pieces = [slot.host.tokenizer.encode(self.descriptions.get(word, word)) for word in self.tokens]
        if empty := [word for word, ids in zip(self.tokens, pieces, strict=True) if not ids]:
            raise ConfigError(
                f"the text of {empty[0]!r} has no tokens to start from", hint="describe it, or init: mean"
            )
        return torch.stack([weight[ids].float().mean(dim=0) for ids in pieces])
