"""The tokenizer of a base: text to ids in pieces, and the ids that lie past every vocabulary."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tailor.errors import ConfigError, NotFoundError

VIRTUAL = 1 << 30
"""Ids from here on are virtual tokens: VIRTUAL + k is row k of the slot's own table, never a word."""

TEMPLATE_DAY = datetime(2024, 7, 26)
"""The day that templates which stamp the date see (as `strftime_now` and `date_string`), whatever the day is.

Otherwise the rows of a resumed run, and the prompts of a tuned model, would change overnight. It is the date that
Llama 3.x's own template falls back to.
"""

DATE_STRING = TEMPLATE_DAY.strftime("%d %b %Y")

WORD_START = ("\u2581", "\u0120")
"""How SentencePiece-like and byte-level tokenizers write a space before a word."""

ANCHORS = ("\n", "0", ".")
"""Texts for a piece to continue; the first that does not melt into the piece's first token is taken."""


NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})


class Tokenizer:
    """A thin, typed view of a transformers tokenizer: no hidden special tokens, no clean-up, no padding.

    Pieces of text are encoded apart (`encode` adds no special tokens), so that a prompt's tokens are a prefix of its
    training example's tokens by construction. Raises ConfigError for named chat templates none of which is `default`.
    """

    def __init__(self, hf: Any, variables: Mapping[str, Any] = NO_VARIABLES) -> None:
        """`variables` are what the chat template can read beside messages and tools."""
        self.hf = hf
        self.variables = dict(variables)
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        self.special_ids = frozenset(
            [int(i) for i, token in hf.added_tokens_decoder.items() if token.special] + list(hf.all_special_ids)
        )
        self.special_texts = tuple(sorted((hf.convert_ids_to_tokens(i) for i in self.special_ids), key=len))
        self.chat_template, self._tool_template = _templates(hf.chat_template)
        self._backend = _backend(hf)
        # a tokenizer may start every text with a space; a piece that continues a text must not get one
        self._adds_space = "".join(hf.convert_ids_to_tokens(self._ids("a"))).startswith(WORD_START)

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a text, special tokens included."""
        return len(self.hf)

    @cached_property
    def fingerprint(self) -> str | None:
        """SHA-256 of all that decides the ids of a conversation, the packages included; None when it cannot be told."""
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            return None
        self.hf("")  # switches off what an earlier call may have left switched on
        packages = [version(name) for name in ("tokenizers", "transformers", "jinja2")]
        ids = (self.bos_id, self.eos_id, sorted(self.special_ids))
        templates = [self.chat_template, self._tool_template, self.variables]
        parts = [backend.to_str(), *templates, self.hf.special_tokens_map, *ids, *packages]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Token ids of one piece; special tokens written in it become their ids, none are added.

        Some tokenizers start every text with a space; a piece that `continues` a text gets none.
        """
        if text and continues and self._adds_space:
            for anchor in ANCHORS:
                lead, both = self._ids(anchor), self._ids(anchor + text)
                if both[: len(lead)] == lead:
                    return both[len(lead) :]
        return self._ids(text)

    def decode(self, token_ids: Sequence[int], *, continues: bool = False) -> str:
        """The text of `token_ids`, special tokens included; virtual tokens have none and are left out.

        With `continues` it inverts `encode` of a piece that continues a text.
        """
        kept = [i for i in token_ids if i < VIRTUAL]
        if not (continues and self._adds_space):
            return self._text(kept)
        lead = self._ids(ANCHORS[0])
        return self._text(lead + kept).removeprefix(self._text(lead))

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        backend = self._backend
        # whoever called `hf` with truncation or padding left them switched on
        if backend is not None and backend.truncation is None and backend.padding is None:
            return list(backend.encode(text, add_special_tokens=False).ids)
        return list(self.hf(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _text(self, token_ids: list[int]) -> str:
        return str(self.hf.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token_text(self, token_id: int) -> str:
        """How one token looks to a reader of the loss mask."""
        return f"<virtual {token_id - VIRTUAL}>" if token_id >= VIRTUAL else self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: a part of a character where the tokenizer cuts characters into bytes."""
        if token_id >= VIRTUAL:
            return b""
        token = str(self.hf.convert_ids_to_tokens(token_id))
        if token_id not in self.special_ids:
            if self._byte_level and all(character in _BYTES for character in token):
                return bytes(_BYTES[character] for character in token)
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                return bytes([int(token[3:5], 16)])
        return self.decode([token_id], continues=True).encode()

    @cached_property
    def _byte_level(self) -> bool:
        """Whether tokens are written in the byte-level alphabet of GPT-2."""
        return '"ByteLevel"' in (self.hf.backend_tokenizer.to_str() if hasattr(self.hf, "backend_tokenizer") else "")

    def special_in(self, text: str) -> str | None:
        """The first special token that stands literally in `text`: such a text would change the turn structure."""
        return next((special for special in self.special_texts if special in text), None)

    def leading_ids(self) -> list[int]:
        """The ids this tokenizer puts before every text by itself (a bos, or nothing)."""
        ids = list(self.hf("")["input_ids"])
        return [i for i in ids if i != self.eos_id or i == self.bos_id]

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any], generate: bool) -> str:
        """The text of `messages` in the tokenizer's own Jinja template, on TEMPLATE_DAY.

        With tools, in the template named `tool_use` where the tokenizer has one.
        """
        template = self._tool_template if tools and self._tool_template else self.chat_template
        _stop_the_clock(template)
        return str(
            self.hf.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generate,
                date_string=DATE_STRING,
                **self.variables,
            )
        )


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2's encoder).

    Printable ones stand for themselves, the others follow from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + k): byte for k, byte in enumerate(others)}}


_BYTES = _byte_alphabet()


def _backend(hf: Any) -> Any:
    """What turns text into ids for `hf`, when it adds nothing of its own: half the time of a call is its options."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(hf)
    plain = issubclass(kind, Fast) and kind.__call__ is Fast.__call__ and kind._encode_plus is Fast._encode_plus
    return hf.backend_tokenizer if plain and not hf.split_special_tokens else None


def _templates(found: str | Mapping[str, str] | None) -> tuple[str | None, str | None]:
    """The template for chats, and the one for chats with tools where it is another."""
    if found is None or isinstance(found, str):
        return found, None
    if found and "default" not in found:
        raise ConfigError(
            f"the tokenizer has several chat templates ({', '.join(sorted(found))}) and none is named default",
            hint="save the one to use as chat_template.jinja beside the tokenizer",
        )
    return found.get("default"), found.get("tool_use")


def _stop_the_clock(template: str | None) -> None:
    """Let `strftime_now` be TEMPLATE_DAY in the environment that transformers compiles once per template.

    transformers puts the function among the environment's globals and turns callables given to apply_chat_template
    into text, so there is no other way in.
    """
    from transformers.utils import chat_template_utils

    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    if template is not None and "strftime_now" in template:
        if compiled is None:
            raise ConfigError("this chat template stamps the date, and this transformers lets nobody stop it")
        compiled(template).environment.globals["strftime_now"] = TEMPLATE_DAY.strftime


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
