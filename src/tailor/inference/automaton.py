"""Grammars as llguidance compiles them, and whether one accepts a text: the leaf beneath structured answers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tailor.errors import ConfigError, require

EXTRA = "server"
WHITESPACE = r" {1,2}|\n(?: {0,40}|\t{0,10})"
"""What may stand between the parts of a JSON text: enough to indent it, too little to fill an answer with."""

MAX_LEXER_STATES = 50_000
"""Some 2 kB each: what one grammar may take while it is followed."""


PROBLEMS = {
    "NoExtension": "no text can satisfy it",
    "panic": "it is too large",
    "oneOf constraints": "the cases of a oneOf must differ in type, or in a required property's const; or write anyOf",
}
"""llguidance's words that need others."""


def library() -> Any:
    """The package llguidance. Raises MissingDependencyError."""
    return require("llguidance", EXTRA)


def json_grammar(schema: str, *, escapes: bool = False) -> str:
    r"""A grammar of the JSON texts that a schema (JSON text) allows.

    Without `escapes`, \u escapes are out: an additional key written "\u0061" would pass for another one than "a".
    """
    options = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": 'nrbtf\\"' + "u" * escapes}
    return str(library().LLMatcher.grammar_from_json_schema(schema, overrides=options))


def regex_grammar(pattern: str) -> str:
    """A grammar of the texts that match all through."""
    return str(library().LLMatcher.grammar_from_regex(pattern))


def lark_grammar(grammar: str) -> str:
    """A grammar in llguidance's kind of Lark."""
    return str(library().LLMatcher.grammar_from_lark(grammar))


def matcher(tokenizer: Any, grammar: str) -> Any:
    """A grammar ready to be followed from its start. Raises ConfigError when it is wrong or allows nothing at all."""
    package = library()
    limits = package.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    found = package.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not found.is_error():
        found.compute_bitmask()
    if found.is_error():
        raise ConfigError(f"the structure cannot be used: {problem(found)}")
    return found


def problem(matcher: Any) -> str:
    """What is wrong with a matcher in a sentence; its state, which quotes the answer, is left out."""
    lines = [line.strip() for line in str(matcher.get_error()).split("<state>")[0].splitlines()]
    said = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "it failed")
    known = next((words for start, words in PROBLEMS.items() if said.startswith(start)), said)
    return known.removeprefix("error: ")[:300]


@lru_cache(maxsize=1)
def _byte_tokenizer() -> Any:
    return library().LLTokenizer("byte")


@lru_cache(maxsize=256)
def _byte_matcher(grammar: str) -> Any:
    return matcher(_byte_tokenizer(), grammar)


def check(grammar: str) -> None:
    """Raises ConfigError when a grammar is wrong, or no text satisfies it."""
    _byte_matcher(grammar)


def accepts(grammar: str, text: str) -> bool:
    """Whether a grammar accepts a whole text, byte by byte: in linear time, and without any model's tokens."""
    own = _byte_matcher(grammar).deep_copy()
    data = list(text.encode("utf-8", errors="replace"))
    return bool(own.try_consume_tokens(data) == len(data) and own.is_accepting())
