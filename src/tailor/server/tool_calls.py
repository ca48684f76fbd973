"""Tool calls in generated text, read as it comes: `<tool_call>{json}</tool_call>`, or the JSON alone."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
"""As Hermes and Qwen write calls; Llama 3 writes JSON alone."""


@dataclass(frozen=True)
class Call:
    """A call of a function; `arguments` is JSON text. The id is random."""

    name: str
    arguments: str
    call_id: str


class CallReader:
    """Reads an answer as it comes: `text` to show at once, and `calls` as soon as they are complete.

    What may still become a call is held back; what turns out to be none is text after all. Without `parallel` calls
    the first one counts, and others are dropped.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        self.names = names
        self.parallel = parallel
        self.calls: list[Call] = []
        self._held = ""
        self._begun = False

    def feed(self, piece: str) -> str:
        """Take the next piece; returns what can be shown."""
        if not self.names:
            return piece
        self._held += piece
        shown = ""
        while True:
            text, again = self._advance()
            shown += text
            if not again:
                return shown

    def finish(self) -> str:
        """The answer is complete: what is still held is a call in JSON alone, or text."""
        held, self._held = self._held, ""
        whole = held.lstrip().startswith(OPEN)  # many a model ends its turn instead of closing the tag
        if whole or not self._begun:
            calls = self._parse(held.lstrip().removeprefix(OPEN))
            self._take(calls)
            held = "" if calls else held
        return "" if self.calls and not held.strip() else held

    def _advance(self) -> tuple[str, bool]:
        """Text to show, and whether what is held may hold more."""
        start = self._held.lstrip()
        if not self._begun and (not start or start[0] in "{["):
            return "", False  # JSON can only be judged when it is whole
        at = self._held.find(OPEN)
        if at < 0:
            keep = _overlap(self._held)
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            return self._show(text), False
        end = self._held.find(CLOSE, at)
        if end < 0:
            text, self._held = self._held[:at], self._held[at:]
            return self._show(text), False
        before, inside = self._held[:at], self._held[at + len(OPEN) : end]
        whole, self._held = self._held[at : end + len(CLOSE)], self._held[end + len(CLOSE) :]
        calls = self._parse(inside)
        self._take(calls)
        self._begun = True
        return self._show(before if calls else before + whole), True

    def _take(self, calls: list[Call]) -> None:
        self.calls = (self.calls + calls)[: None if self.parallel else 1]

    def _show(self, text: str) -> str:
        """White space around calls is no text."""
        if not text.strip() and (self.calls or not self._begun):
            return ""
        self._begun = True
        return text

    def _parse(self, text: str) -> list[Call]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = [self._call(value) for value in (found if isinstance(found, list) else [found])]
        return [call for call in calls if call] if calls and all(calls) else []

    def _call(self, value: Any) -> Call | None:
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or function.get("name") not in self.names:
            return None
        arguments = function.get("arguments", function.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Call(function["name"], text, f"call_{secrets.token_hex(12)}")


def _overlap(text: str) -> int:
    """How many characters at the end may be the start of an opening tag."""
    return next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-n:])), 0)
