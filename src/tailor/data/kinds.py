"""Types of a row's values: how each is called in messages, and its test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tailor.data import turns


class Kind(NamedTuple):
    """A type of value: how it is called in messages, and its test."""

    name: str
    test: Callable[[Any], bool]


def _is_objects(value: Any, *keys: str) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) and {*keys} <= {*v} for v in value)


TEXT = Kind("text", lambda value: isinstance(value, str))
MESSAGES = Kind("a list of messages with role and content", lambda value: _is_objects(value, "role"))
TURNS = Kind("a list of turns with from and value", lambda value: _is_objects(value, "from", "value"))
TURN = Kind("one turn with from and value", lambda value: isinstance(value, Mapping) and {"from", "value"} <= {*value})
SAID = Kind("text or a list of messages", lambda value: TEXT.test(value) or MESSAGES.test(value))
TRANSCRIPT = Kind('a transcript with "\\n\\nHuman:" and "\\n\\nAssistant:"', turns.is_transcript)
INPUT = Kind(
    "an object with messages", lambda value: isinstance(value, Mapping) and MESSAGES.test(value.get("messages"))
)
YES_NO = Kind("true or false", lambda value: str(value).lower() in ("true", "false", "0", "1"))
NUMBER = Kind("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
TEXTS = Kind("text or a list of texts", lambda v: TEXT.test(v) or (isinstance(v, list) and all(map(TEXT.test, v))))
LIST = Kind("a list", lambda value: isinstance(value, list))
ANY = Kind("anything", lambda value: True)
