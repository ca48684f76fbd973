"""The answer inside a longer completion: the last match of a pattern, and numbers read from text."""

from __future__ import annotations

import math
import re

from tailor.errors import ConfigError

FINAL_ANSWER = (
    r"(?i)(?:\banswer(?:\*\*)?\s*(?:\bis\b\s*:?|[:=])|####)"  # "the answer is", "Answer:", "**Answer**:", "####"
    r"[ \t*]*([^\n]+?)"
    r"(?=[.!?*\s]*(?:\n|\Z)|[.!?]\s)"  # up to the end of the line or sentence; "3.5" is not the end of one
)
"""Where chain-of-thought completions state their result: "the answer is X", "Answer: X", "#### X"."""


def extract_answer(text: str, pattern: str = FINAL_ANSWER) -> str | None:
    """What the last match holds in its first group that took part, or the whole match; None without a match.

    The last, because a chain of thought may name answers that it then rejects. White space and surrounding `*`, quotes
    and backticks are taken off. Raises ConfigError for a pattern that is no regular expression.
    """
    try:
        matches = list(re.finditer(pattern, text))
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None
    if not matches:
        return None
    found = next((group for group in matches[-1].groups() if group is not None), matches[-1][0])
    return found.strip(" \t\r\n*\"'`“”‘’")


_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\.?\d)", re.ASCII
)


def as_number(text: str) -> float | None:
    """The one number in a text ("$1,234.50", "−5 °C", "18 dollars", "42%" → 42.0), so that "18" equals "18.0".

    None when there is no number, or more than one ("3-4", "1/2"): then nothing says which one is meant.
    """
    text = re.sub(r"([-+])\s*[$€£¥]\s*", r"\1", text.replace("−", "-"))
    found = _NUMBER.findall(text)
    if len(found) != 1:
        return None
    number = float(found[0].replace(",", ""))
    return number if math.isfinite(number) else None
