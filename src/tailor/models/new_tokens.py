"""Words that one slot has beyond the vocabulary: its own tokenizer, and its own rows of embedding and head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tailor.errors import ConfigError
from tailor.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class NewRows:
    """Rows (n, width) for the ids from `first` on: what goes into the model, and what is predicted from its states.

    With tied weights both are the same tensor. In the passes of the slot they stand for the base's rows of these ids,
    where it has some (padding rows that no text leads to).
    """

    first: int
    embedding: Tensor
    head: Tensor

    @property
    def num(self) -> int:
        """How many words."""
        return int(self.embedding.shape[0])

    @property
    def end(self) -> int:
        """The id after the last."""
        return self.first + self.num


def extended(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[Tokenizer, int]:
    """A copy of a tokenizer that knows some words more, and the id of the first; the others follow in order.

    They are found wherever they stand in a text, and are no special tokens: rows may contain them. Raises ConfigError
    for a word that is a token already.
    """
    from transformers import AddedToken

    known = tokenizer.hf.get_vocab()
    if there := [word for word in words if word in known]:
        raise ConfigError(f"{there[0]!r} is a token of this base already", hint="new_tokens is for words that are not")
    hf = copy.deepcopy(tokenizer.hf)
    hf.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    ids = hf.convert_tokens_to_ids(list(words))
    first = max(known.values()) + 1
    if ids != list(range(first, first + len(words))):
        raise ConfigError("this base's tokenizer numbers new tokens out of order; new_tokens cannot be used on it")
    return Tokenizer(hf), first
