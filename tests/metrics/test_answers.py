from __future__ import annotations

import pytest

from tailor.errors import ConfigError
from tailor.metrics.answers import as_number, extract_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 = 4, so the answer is 4.", "4"),
        ("The answer is 3.14", "3.14"),
        ("The answer is 3.14.", "3.14"),
        ("So the final answer is: New York!\n", "New York"),
        ("Answer: yes\nBecause it is.", "yes"),
        ("answer = B", "B"),
        ("**Answer:** 42", "42"),
        ("**Answer**: 42", "42"),
        ("The answer is **42**.", "42"),
        ("He pays 5 * 2 = <<5*2=10>>10\n#### 1,010", "1,010"),
        ("The answer is 3. No wait, the answer is 5. Done", "5"),
        ('The answer is "Tōkyō".', "Tōkyō"),
        ("The answer is -7 °C", "-7 °C"),
        ("I do not know", None),
        ("answering is hard", None),
        ("", None),
        ("The answer is", None),
    ],
)
def test_final_answer(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


def test_own_pattern() -> None:
    assert extract_answer("a=1 b=2", r"\w=\d") == "b=2"
    assert extract_answer("<a>x</a><a> y </a>", r"<a>(.*?)</a>") == "y"
    assert extract_answer("k: 3", r"(?:v: (\d)|k: (\d))") == "3"
    with pytest.raises(ConfigError, match="regular expression"):
        extract_answer("a", "(")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", 18.0),
        ("18.0", 18.0),
        ("18.", 18.0),
        ("$1,234.50", 1234.5),
        ("-$5", -5.0),
        ("− 5", 5.0),
        ("−5 °C", -5.0),
        ("+.5", 0.5),
        ("42%", 42.0),
        ("18 dollars", 18.0),
        ("1e-3", 0.001),
        ("1,234,567", 1234567.0),
        ("1,2345", None),
        ("12,34", None),
        ("3-4", None),
        ("1/2", None),
        ("1.2.3", None),
        ("gpt4", None),
        ("5kg", 5.0),
        ("", None),
        ("none", None),
        ("9" * 400, None),
    ],
)
def test_as_number(text: str, expected: float | None) -> None:
    assert as_number(text) == expected
