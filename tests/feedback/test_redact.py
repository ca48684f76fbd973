"""What is private goes, what only looks like it stays."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tailor.errors import ConfigError
from tailor.feedback.redact import PATTERNS, redactor


def redacted(text: str, *names: str) -> str:
    find = redactor(names or ("all",))
    assert find is not None
    return find.text(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to Jo.Doe+x@mail.example.co.uk, now", "write to [EMAIL], now"),
        ("jörg@münchen.de", "[EMAIL]"),
        ("card 4111 1111 1111 1111 12/27", "card [CREDIT_CARD] 12/27"),
        ("5500-0000-0000-0004.", "[CREDIT_CARD]."),
        ("378282246310005", "[CREDIT_CARD]"),
        ("IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF", "IBAN [IBAN] BIC COBADEFF"),
        ("gb82west12345698765432", "[IBAN]"),
        ("call +49 (0)30 123456-78 or", "call [PHONE] or"),
        ("call (555) 234-5678!", "call [PHONE]!"),
        ("0151 23456789", "[PHONE]"),
        ("key sk-proj-abcdefghijklmnop1234 ok", "key [API_KEY] ok"),
        ("Authorization: Bearer abcdefghijklmnopqrstuv==", "Authorization: Bearer [API_KEY]"),
        ("ghp_" + "a1" * 18, "[API_KEY]"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEvQ+/=\n-----END PRIVATE KEY-----\nbye", "[API_KEY]\nbye"),
    ],
)
def test_private_things_are_replaced(text: str, expected: str) -> None:
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "at 5 @ home, user@localhost",
        "order 4111 1111 1111 1112",  # the check digit is wrong
        "on 2026-11-21 and 01/02/2026, 3.14159265, 1,234,567",
        "version 10.20.30.40, room 12-34",
        "risk-taking, task-oriented",
        "0.0123456789",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert redacted(text, "all") == text


def test_check_digits_tell_account_numbers() -> None:
    assert redacted("DE88 3704 0044 0532 0130 00", "iban", "credit_card") == "DE88 3704 0044 0532 0130 00"


def test_only_what_is_asked_for() -> None:
    text = "a@b.example 4111111111111111"
    assert redacted(text, "email") == "[EMAIL] 4111111111111111"
    assert redacted(text, "credit_card") == "a@b.example [CREDIT_CARD]"
    assert redactor(()) is None


def test_patterns_of_ones_own_come_first_and_name_what_they_found() -> None:
    text = "TCK-12 of a@b.example in vault 7"
    assert redacted(text, r"(?P<ticket>TCK-\d+)", r"vault \d", "email") == "[TICKET] of [EMAIL] in [REDACTED]"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("emial", "did you mean 'email'"), ("(", "no regular expression"), ("", "nothing called ''")],
)
def test_what_is_neither_name_nor_pattern_is_refused(wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        redactor([wanted])


def test_json_inside_texts_stays_json() -> None:
    arguments = json.dumps({"to": "a@b.example", "card": 4111111111111111, "n": 3, "id": "c@d.example", "ok": True})
    assert json.loads(redacted(arguments)) == {
        "to": "[EMAIL]",
        "card": "[CREDIT_CARD]",
        "n": 3,
        "id": "[EMAIL]",
        "ok": True,
    }
    untouched = '{"a":  1}'
    assert redacted(untouched) == untouched
    assert redacted("[see a@b.example") == "[see [EMAIL]"


def test_an_entry_keeps_its_shape() -> None:
    find = redactor(["all"])
    entry: dict[str, Any] = {
        "id": "chatcmpl-4111111111111111",
        "time": 1_790_000_000,
        "model": "me@home.example",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a@b.example"}]}],
        "params": {"user": "a@b.example", "temperature": 0.5, "stop": None},
    }
    assert find is not None
    assert find(entry) == {
        **entry,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "[EMAIL]"}]}],
        "params": {"user": "[EMAIL]", "temperature": 0.5, "stop": None},
    }


@pytest.mark.parametrize("text", ["a" * 200_000, "1 " * 8_000, "a." * 100_000, "-" * 200_000, "AB12 " * 5_000])
def test_long_texts_without_anything_private_come_back(text: str) -> None:
    # a pattern that looks again and again at what it has seen would not end
    assert redacted(text) == text
    assert set(PATTERNS) == {"api_key", "email", "iban", "credit_card", "phone"}
