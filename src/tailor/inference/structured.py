"""Answers of a given form: JSON, a JSON schema, a regular expression, one of some choices, or a Lark grammar.

A `Structure` says which; its `Constraint` says at each step of one answer which tokens may follow (llguidance, Earley
parsing over derivatives of regular expressions); `validate` checks the finished text by other means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from pydantic import Field, field_validator, model_validator

from tailor.config import Strict
from tailor.errors import ConfigError, QualityError
from tailor.inference import automaton
from tailor.inference.json_schema import checked_schema, conforms

if TYPE_CHECKING:  # what asks for structures need not load torch
    from torch import Tensor

    from tailor.text.tokenizer import Tokenizer

MAX_CHARACTERS = 100_000
ANY_OBJECT = {"type": "object"}
NUM_CACHED = 64
"""Structures kept compiled per tokenizer."""

LEAD = "\n"
PROBE = '{"a": [1.5, "é\\n"]}'


class Structure(Strict):
    """The form of an answer.

    `content` is the schema (a mapping or JSON text; kept as text), the pattern (matched all through, in the syntax of
    Rust's regex crate), the choices, or the grammar; json_object has none. `check` tells whether it can be enforced.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    content: str | tuple[str, ...] | None = Field(None, description="schema, pattern, choices or grammar")

    @field_validator("content", mode="before")
    @classmethod
    def _as_text(cls, content: Any) -> Any:
        if not isinstance(content, Mapping | bool):
            return content
        try:
            return json.dumps(content, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot be written as JSON: {error}") from None

    @model_validator(mode="after")
    def _fits(self) -> Structure:
        size = len(self.content or "") if not isinstance(self.content, tuple) else sum(map(len, self.content))
        if size > MAX_CHARACTERS:
            raise ValueError(f"content of {size} characters, {MAX_CHARACTERS} are the most")
        wanted = {"json_object": "no content", "choice": "a list of different, non-empty texts"}.get(
            self.kind, "a text"
        )
        if self.kind == "choice":
            texts = self.content if isinstance(self.content, tuple) else ()
            fits = bool(texts) and all(texts) and len(set(texts)) == len(texts)
        else:
            fits = self.content is None if self.kind == "json_object" else isinstance(self.content, str)
        if not fits or (wanted == "a text" and not self.content):
            raise ValueError(f"content: {self.kind} wants {wanted}")
        return self


class Constraint:
    """What may follow in one answer. Ask for the `mask`, choose a token, tell it with `accept`; and again.

    Not for several threads at once.
    """

    def __init__(self, matcher: Any, possible: Tensor) -> None:
        self._matcher = matcher
        self._possible = possible

    def mask(self, num_logits: int) -> Tensor:
        """(num_logits,) bool on the CPU: which tokens may follow. A stop token may when the text is complete.

        Raises ConfigError when nothing can follow, or to tell takes too much: rare, and the end of the answer.
        """
        import torch

        data = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            raise ConfigError(f"the structure cannot be followed any further: {automaton.problem(self._matcher)}")
        bits = torch.frombuffer(data, dtype=torch.uint8)[:, None] >> torch.arange(8, dtype=torch.uint8)
        allowed = (bits & 1).bool().flatten()[: len(self._possible)] & self._possible
        if not bool(allowed[:num_logits].any()):
            raise ConfigError("the structure cannot be followed any further: the base has no token for what it wants")
        return torch.nn.functional.pad(allowed[:num_logits], (0, max(0, num_logits - len(allowed))))

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen. Raises ConfigError when it may not stand here."""
        if not self._matcher.consume_token(token_id):
            raise ConfigError(f"token {token_id} does not fit the structure: {automaton.problem(self._matcher)}")

    @property
    def finished(self) -> bool:
        """The text is complete and nothing but a stop token can follow: the answer may end without one."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())


class _Words:
    """A tokenizer in the shape that llguidance takes one: the bytes of every token, and how a text falls into tokens.

    llguidance's own reader of Hugging Face tokenizers takes "<|eos|>" inside a text for the special token.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        backend = getattr(tokenizer.hf, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError("this base cannot follow structures: it has no fast tokenizer")
        ids = sorted(tokenizer.hf.get_vocab().values())
        self.tokens = [b""] * (ids[-1] + 1)
        for token_id in ids:
            self.tokens[token_id] = tokenizer.token_bytes(token_id)
        self.eos_token_id = stop_ids[0]
        self.special_token_ids = sorted(tokenizer.special_ids)
        if self.spelled(tokenizer.encode(PROBE, continues=True)) != PROBE.encode():
            raise ConfigError("this base cannot follow structures: its tokens do not spell the bytes of a text")
        self._words = {self.tokens[i]: i for i in ids if i not in tokenizer.special_ids and self.tokens[i]}
        self._longest = max(map(len, self._words))
        self._backend = type(backend).from_str(backend.to_str())  # one of its own: its settings are shared by all
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def spelled(self, token_ids: Sequence[int]) -> bytes:
        return b"".join(self.tokens[i] for i in token_ids)

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that continues another; byte by byte where the tokenizer would add or change something."""
        lead, both = (self._backend.encode(part, add_special_tokens=False).ids for part in (LEAD, LEAD + text))
        token_ids = list(both[len(lead) :])
        return token_ids if self.spelled(token_ids) == text.encode() else self._bytes(text.encode())

    def _bytes(self, data: bytes) -> list[int]:
        """The longest word first, as far as words reach."""
        token_ids = []
        while data:
            word = next((data[:n] for n in range(self._longest, 0, -1) if data[:n] in self._words), None)
            if word is None:
                break
            token_ids.append(self._words[word])
            data = data[len(word) :]
        return token_ids


class _Vocabulary:
    """A tokenizer as llguidance sees it, and the structures compiled for it."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> None:
        import torch

        words = _Words(tokenizer, stop_ids)
        self.tokens = automaton.library().LLTokenizer(words, eos_token=list(stop_ids))
        self.possible = torch.ones(len(words.tokens), dtype=torch.bool)
        self.possible[[i for i in tokenizer.special_ids - {*stop_ids} if i < len(self.possible)]] = False
        self.compiled = lru_cache(maxsize=NUM_CACHED)(self._compile)

    def _compile(self, structure: Structure) -> Any:
        return automaton.matcher(self.tokens, grammar(structure))


_VOCABULARIES: WeakKeyDictionary[Tokenizer, dict[tuple[int, ...], _Vocabulary]] = WeakKeyDictionary()


def compiled(structure: Structure, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> Constraint:
    """The constraint of one new answer, which ends with one of `stop_ids` (those of the renderer).

    What is costly is kept: the vocabulary per tokenizer, the automaton per structure. Safe from any thread. Raises
    ConfigError when the structure, or this tokenizer, cannot be used, and MissingDependencyError without llguidance.
    """
    if not stop_ids:
        raise ConfigError("this base cannot follow structures: it has no token that ends an answer")
    known = _VOCABULARIES.setdefault(tokenizer, {})
    if stop_ids not in known:
        known[stop_ids] = _Vocabulary(tokenizer, stop_ids)
    vocabulary = known[stop_ids]
    return Constraint(vocabulary.compiled(structure).deep_copy(), vocabulary.possible)


@lru_cache(maxsize=NUM_CACHED)
def grammar(structure: Structure) -> str:
    """The structure in llguidance's language. Raises ConfigError for a JSON schema that is not enforced in full."""
    content = structure.content
    if isinstance(content, tuple):
        return automaton.regex_grammar("|".join(_literal(choice) for choice in content))
    if structure.kind == "regex":
        return automaton.regex_grammar(str(content))
    if structure.kind == "grammar":
        if "%json" in str(content):
            raise ConfigError("a grammar cannot hold %json", hint="a structure json_schema takes the schema")
        return automaton.lark_grammar(str(content))
    return automaton.json_grammar(json.dumps(schema_of(structure)))


def _literal(text: str) -> str:
    """A regular expression of this text only."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def schema_of(structure: Structure) -> Any:
    """The JSON schema of a json_object or json_schema, checked. Raises ConfigError."""
    if structure.kind == "json_object":
        return ANY_OBJECT
    try:
        schema = json.loads(str(structure.content))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the JSON schema is not JSON: {str(error) or 'nested too deeply'}") from None
    return checked_schema(schema)


def check(structure: Structure) -> None:
    """Raises ConfigError when a structure cannot be enforced in full: for a schema's keyword, with its JSON pointer."""
    automaton.check(grammar(structure))


def validate(structure: Structure, text: str) -> None:
    """Raises QualityError unless a finished answer has its structure.

    JSON schemas are checked by jsonschema, with exact decimals; patterns and grammars byte by byte, not token by token.
    An answer cut short (finish reason "length", or a stop text) need not have it.
    """
    if structure.kind in ("json_object", "json_schema"):
        conforms(schema_of(structure), text)
    elif isinstance(structure.content, tuple):
        if text not in structure.content:
            raise QualityError(f"the answer {text[:80]!r} is none of the choices")
    elif not automaton.accepts(grammar(structure), text):
        raise QualityError(f"the answer {text[:80]!r} does not match its {structure.kind}")
