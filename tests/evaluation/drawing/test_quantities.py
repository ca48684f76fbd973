from __future__ import annotations

import math

import pytest

from tailor.evaluation.drawing import quantities as q


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.017208, "0.0172"),
        (9.996, "10.0"),
        (31.42, "31.4"),
        (1275.39, "1,275"),
        (-0.5, "−0.500"),
        (0.00000243, "2.43e−06"),
        (5e9, "5.00e+09"),
        (math.inf, "∞"),
        (math.nan, "–"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert q.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.000_000_5, "0.500 µs"),
        (0.0061, "6.10 ms"),
        (0.9996, "1.00 s"),
        (36.2, "36 s"),
        (59.6, "1 min 00 s"),
        (246, "4 min 06 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86_399, "1 d 0 h"),
        (100_800, "1 d 4 h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert q.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (812, "812 B"), (1000, "1.0 KiB"), (1.2 * 2**30, "1.2 GiB"), (708_235_264, "675 MiB")],
)
def test_sizes_are_binary(num_bytes: float, text: str) -> None:
    assert q.size(num_bytes) == text


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0, "$0"), (0.0000123, "$0.0000123"), (0.00113, "$0.00113"), (0.9, "$0.90"), (12.5, "$12.50"), (1234.4, "$1,234")],
)
def test_money_never_hides_in_a_power_of_ten(dollars: float, text: str) -> None:
    assert q.money(dollars) == text


def test_counts_shares_ratios_and_operations() -> None:
    assert [q.count(n) for n in (598_016, 1_312_000, 7e9)] == ["598,016", "1.31 M", "7.00 B"]
    assert q.share(0.00195) == "0.195\N{NO-BREAK SPACE}%"
    assert [q.ratio(x) for x in (1.0765, 9.996, 123.4, 0.012)] == ["×1.08", "×10.0", "×123", "×0.0120"]
    assert q.operations(1.5e9) == "1.50 GFLOP"


def test_scores_line_up_and_differences_have_a_sign_unless_they_are_zero() -> None:
    assert [q.score(x) for x in (0.4324, 0, 31.42)] == ["0.432", "0.000", "31.4"]
    assert [q.difference(x) for x in (0.12, -0.12, 0.0001, -0.0001)] == ["+0.120", "−0.120", "0.000", "0.000"]
    assert q.span(-0.2, 0.1, signed=True).replace("\N{NO-BREAK SPACE}", " ") == "−0.200 to +0.100"


@pytest.mark.parametrize(
    ("text", "short"),
    [("0.200", "0.2"), ("0.000", "0"), ("10.0 ms", "10 ms"), ("$1.50", "$1.5"), ("100", "100"), ("0.105", "0.105")],
)
def test_ticks_lose_zeros_that_say_nothing(text: str, short: str) -> None:
    assert q.trimmed(text) == short


def test_what_is_invisible_is_written_out_and_what_is_text_stays() -> None:
    assert q.visible("a\x00b\x1b[1m\u202ec\ud800") == "a\\x00b\\x1b[1m\\u202ec\\ud800"
    assert q.visible("eins\r\nzwei\tdrei\u00a0vier מזל 👩‍🔬") == "eins\nzwei\tdrei\u00a0vier מזל 👩‍🔬"
    assert [q.shortened("abcdef", n) for n in (6, 5)] == ["abcdef", "abcd…"]
