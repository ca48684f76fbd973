"""What must not be written down is replaced by its name in brackets: `[EMAIL]`, `[PHONE]`, or by a pattern of yours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tailor.errors import ConfigError, nearest

Redact = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Sees an entry before it is written and returns what is to be written instead; None: nothing at all."""

Span = tuple[int, int, str]
"""Start, end, and the name to put there."""

ALL = "all"
KEPT = frozenset({"id", "role", "type", "finish_reason", "model", "artifact", "principal", "time", "fingerprint"})
"""Fields whose values say how an entry is built; all other texts are searched."""

# a boundary before every start keeps each of these linear in the text's length
_EMAIL = re.compile(r"(?<![\w.%+-])[\w.%+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_][\w-]{1,62}")
_KEY = re.compile(
    r"""
    -----BEGIN\ [A-Z ]{0,30}PRIVATE\ KEY-----[A-Za-z0-9+/=\s]*(?:-----END\ [A-Z ]{0,30}PRIVATE\ KEY-----)?
    | (?<![A-Za-z0-9_-]) (?:
        (?:sk|rk|pk)[-_][A-Za-z0-9_-]{16,}                          # OpenAI, Anthropic, Stripe, and our own
      | gh[oprsu]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,} | glpat-[A-Za-z0-9_-]{16,}
      | hf_[A-Za-z0-9]{20,} | xox[abeoprs]-[A-Za-z0-9-]{10,} | AIza[A-Za-z0-9_-]{30,} | (?:AKIA|ASIA)[A-Z0-9]{16}
      | eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}  # JSON web token
      | (?<=[Bb]earer\ )[A-Za-z0-9._~+/-]{16,}=*
    )
    """,
    re.VERBOSE,
)
_PHONE = re.compile(
    r"""
    (?<![\w.,+/-]) (?!\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(?!\d)) (?:
        (?:\+|00)[1-9](?:[ ()./-]{0,2}\d){6,13}                     # +49 30 1234567
      | \(?0[1-9]\d{0,4}\)?[ /.-]?\d(?:[ /.-]?\d){4,9}              # 030 1234567
      | (?:1[ .-])?\(?[2-9]\d{2}\)?[ .-]?[2-9]\d{2}[ .-]\d{4}       # (555) 234-5678
    ) (?!\w)
    """,
    re.VERBOSE,
)
_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}")
_CARD_STARTS = re.compile(r"(?<!\d)\d(?=[ -]?\d)")
_IBAN = re.compile(r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}", re.IGNORECASE | re.ASCII)
_IBAN_STARTS = re.compile(r"(?<![^\W_])[A-Z](?=[A-Z]\d{2})", re.IGNORECASE | re.ASCII)


def luhn(number: str) -> bool:
    """Whether the digits of a card's number fit its check digit (ISO/IEC 7812-1).

    >>> luhn("4111111111111111"), luhn("4111111111111112")
    (True, False)
    """
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def iban(number: str) -> bool:
    """Whether the check digits of an account's number fit (ISO 13616: 97 divides it with a remainder of 1).

    >>> iban("DE89370400440532013000"), iban("DE88370400440532013000")
    (True, False)
    """
    return int("".join(str(int(letter, 36)) for letter in number[4:] + number[:4])) % 97 == 1


def _card(number: str) -> bool:
    return 13 <= len(number) <= 19 and number[0] in "23456" and luhn(number)


def _checked(starts: re.Pattern[str], whole: re.Pattern[str], fits: Callable[[str], bool], name: str) -> Any:
    """Finds numbers with check digits, the longest at each start that ends where a word does."""

    def find(text: str) -> Iterator[Span]:
        done = 0
        for start in starts.finditer(text):
            found = whole.match(text, start.start()) if start.start() >= done else None
            for end in range(found.end(), start.end(), -1) if found else ():
                inside = end < len(text) and text[end].isalnum()
                if not inside and fits(re.sub(r"[ -]", "", text[start.start() : end])):
                    yield start.start(), end, name
                    done = end
                    break

    return find


def _plain(pattern: re.Pattern[str], name: str) -> Callable[[str], Iterator[Span]]:
    """Finds a pattern; its named groups say what was found better than `name`."""

    def find(text: str) -> Iterator[Span]:
        for match in pattern.finditer(text):
            if match.group():
                yield match.start(), match.end(), (match.lastgroup or name).upper()

    return find


PATTERNS: Mapping[str, Callable[[str], Iterable[Span]]] = {
    "api_key": _plain(_KEY, "API_KEY"),
    "email": _plain(_EMAIL, "EMAIL"),
    "iban": _checked(_IBAN_STARTS, _IBAN, iban, "IBAN"),
    "credit_card": _checked(_CARD_STARTS, _CARD, _card, "CREDIT_CARD"),
    "phone": _plain(_PHONE, "PHONE"),
}
"""What can be asked for by name, in the order in which it is looked for."""


class Redactor:
    """Replaces what it finds in all texts of an entry, also inside JSON that is a text (arguments of calls).

    Keys, and the values of the fields `KEPT`, stay as they are.
    """

    def __init__(self, finders: Sequence[Callable[[str], Iterable[Span]]]) -> None:
        self._finders = finders

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        """The entry with names in the place of what was found."""
        return {key: value if key in KEPT else self._value(value, KEPT) for key, value in entry.items()}

    def text(self, text: str) -> str:
        """A text with names in the place of what was found; one that is JSON stays so."""
        changed = self._replaced(text)
        if changed != text and text.lstrip()[:1] in ("{", "["):
            try:
                inside = self._value(json.loads(text), frozenset(), numbers=True)
                return json.dumps(inside, ensure_ascii=False)
            except (ValueError, RecursionError):  # it only looked like JSON
                pass
        return changed

    def _value(self, value: Any, kept: frozenset[str], *, numbers: bool = False) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {k: v if k in kept else self._value(v, kept, numbers=numbers) for k, v in value.items()}
        if isinstance(value, list):
            return [self._value(each, kept, numbers=numbers) for each in value]
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            text = str(value)
            changed = self._replaced(text)
            return value if changed == text else changed
        return value

    def _replaced(self, text: str) -> str:
        for find in self._finders:
            pieces, end = [], 0
            for start, stop, name in find(text):
                pieces += [text[end:start], f"[{name}]"]
                end = stop
            text = "".join([*pieces, text[end:]]) if end else text
        return text


def redactor(wanted: Sequence[str]) -> Redactor | None:
    """What finds these: names of PATTERNS, `all` of them, or regular expressions; None when nothing is wanted.

    What an expression finds becomes `[REDACTED]`, or the name of its last group that matched:
    `(?P<ticket>TCK-[0-9]+)` becomes `[TICKET]`. Expressions come first. Raises ConfigError for what is neither.
    """
    own, names = [], set[str]()
    for each in wanted:
        if each == ALL:
            names.update(PATTERNS)
        elif each in PATTERNS:
            names.add(each)
        else:
            own.append(_own(each))
    finders = [*own, *(find for name, find in PATTERNS.items() if name in names)]
    return Redactor(finders) if finders else None


def _own(pattern: str) -> Callable[[str], Iterator[Span]]:
    if re.fullmatch(r"[\w-]*", pattern):
        raise ConfigError(
            f"there is nothing called {pattern!r} to redact; {nearest(pattern, [*PATTERNS, ALL])}",
            hint=rf"to redact that very word, write it as a regular expression: '\b{pattern}\b'" if pattern else None,
        )
    try:
        return _plain(re.compile(pattern), "REDACTED")
    except re.error as error:
        raise ConfigError(f"{pattern!r} is no regular expression: {error}") from None
