"""Numbers and texts as people read them: three digits, units, a dash for what is missing, nothing invisible."""

from __future__ import annotations

import math
import re

MISSING = "–"

_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
_END_ZEROS = re.compile(r"(?:(\.\d*[1-9])0+|\.0+)(?!\d)")
_SI = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def visible(text: str) -> str:
    """The text with control characters, direction overrides and lone surrogates written as escapes.

    Lines and tabs stay. What is left can be encoded, is legal in XML, and cannot reorder the text around it.
    """
    return _INVISIBLE.sub(lambda found: repr(found[0])[1:-1], text.replace("\r\n", "\n"))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, the last one an ellipsis where something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def tied(text: str) -> str:
    """The text on one line: its spaces do not break."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def number(value: float) -> str:
    """Three significant digits; whole from 100 on, thousands separated; a power of ten for the very small and large."""
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else "∞" if value > 0 else "−∞"
    return _signed(f"{value:.2e}") if value and not 1e-4 <= abs(value) < 1e9 else _fixed(value)


def score(value: float) -> str:
    """Three decimals below 10 (shares line up in a column), three digits beyond."""
    return _signed(f"{value:.3f}") if abs(value) < 10 else number(value)


def trimmed(text: str) -> str:
    """The text without zeros that end a decimal fraction: 0.200 as 0.2, $1.00 as $1."""
    return _END_ZEROS.sub(r"\1", text)


def difference(value: float) -> str:
    """A score with its sign."""
    shown = score(value)
    return f"+{shown}" if value > 0 and shown.strip("0.") else shown


def span(low: float, high: float, signed: bool = False) -> str:
    """An interval of scores (`signed`: of differences)."""
    shown = difference if signed else score
    return tied(f"{shown(low)} to {shown(high)}")


def share(value: float) -> str:
    """A share as a percentage."""
    return tied(f"{number(100 * value)} %")


def ratio(value: float) -> str:
    """How many times the base's value."""
    return f"×{value:.2f}" if 0.1 <= value < 9.995 else f"×{number(value)}"


def count(value: float) -> str:
    """Exact below a million, then millions (M), billions (B) and trillions (T)."""
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    unit, name = next((unit, name) for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if abs(value) >= unit)
    return f"{number(value / unit)} {name}"


def operations(value: float) -> str:
    """Floating-point operations with an SI prefix."""
    unit, prefix = next(((unit, prefix) for unit, prefix in _SI if value >= unit), (1.0, ""))
    return f"{number(value / unit)} {prefix}FLOP"


def size(num_bytes: float) -> str:
    """Bytes in binary units: 1.2 GiB."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """µs and ms with three digits, seconds, then two units: 4 min 06 s, 2 h 05 min, 3 d 4 h."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{number(seconds * 1e6)} µs" if seconds < 0.0009995 else f"{number(seconds * 1e3)} ms"
    if seconds < 59.5:
        return f"{number(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def money(dollars: float) -> str:
    """US dollars: cents where they say it all, or from one dollar on; three digits below, whole dollars from 100 on."""
    cents = 1 <= dollars < 100 or 0 < dollars == round(dollars, 2) < 1
    return f"${dollars:,.2f}" if cents else f"${_fixed(dollars)}"


def _fixed(value: float) -> str:
    """Three significant digits without a power of ten."""
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return _signed(f"{rounded:.{decimals}f}" if decimals else f"{value:,.0f}")


def _signed(text: str) -> str:
    """With a real minus sign, and none before a zero."""
    return text.replace("-", "−") if text.strip("-0.,") else text.removeprefix("-")
