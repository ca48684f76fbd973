"""The tokenizer of a base: text to ids in pieces, and the ids that lie past every vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailor.errors import NotFoundError

VIRTUAL = 1 << 30
"""Ids from here on are virtual tokens: VIRTUAL + k is row k of the slot's own table, never a word."""


class Tokenizer:
    """A thin, typed view of a transformers tokenizer: no hidden special tokens, no clean-up, no padding.

    Pieces of text are encoded apart (`encode` never adds anything), so that a prompt's tokens are a prefix of its
    training example's tokens by construction.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        self.special_ids = frozenset(
            [int(i) for i, token in hf.added_tokens_decoder.items() if token.special] + list(hf.all_special_ids)
        )
        self.special_texts = tuple(sorted((hf.convert_ids_to_tokens(i) for i in self.special_ids), key=len))
        self.chat_template: str | None = hf.chat_template if isinstance(hf.chat_template, str) else None

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a text, special tokens included."""
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Token ids of one piece; special tokens written in it become their ids, none are added."""
        return list(self.hf(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens included; virtual tokens have none and are left out."""
        kept = [i for i in token_ids if i < VIRTUAL]
        return str(self.hf.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """How one token looks to a reader of the loss mask."""
        return f"<virtual {token_id - VIRTUAL}>" if token_id >= VIRTUAL else self.decode([token_id])

    def special_in(self, text: str) -> str | None:
        """The first special token that stands literally in `text`: such a text would change the turn structure."""
        return next((special for special in self.special_texts if special in text), None)

    def leading_ids(self) -> list[int]:
        """The ids this tokenizer puts before every text by itself (a bos, or nothing)."""
        ids = list(self.hf("")["input_ids"])
        return [i for i in ids if i != self.eos_id or i == self.bos_id]

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], generate: bool) -> str:
        """The text of `messages` in the tokenizer's own Jinja template."""
        return str(
            self.hf.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generate
            )
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer stored in `folder`. Raises NotFoundError when there is none."""
    from transformers import AutoTokenizer

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"no tokenizer could be loaded from {folder}: {str(error).splitlines()[0]}",
            hint="a base folder needs tokenizer.json and tokenizer_config.json beside its weights",
        ) from error
