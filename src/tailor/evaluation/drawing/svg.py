"""Pieces of the charts: escaped elements, markers that differ in shape, labels that keep out of each other's way."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from tailor.evaluation.drawing.quantities import visible

FONT_SIZE = 13
LINE_HEIGHT = 16.0
NUM_COLOURS = 8
"""The page's style sheet has the classes c0 to c7, and `plain` without a colour of its own."""

_HALF_CROSS = [(-1.2, -0.7), (-0.7, -1.2), (0, -0.5), (0.7, -1.2), (1.2, -0.7), (0.5, 0)]
_SHAPES = {  # corners in units of the marker's radius
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
    "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
    "wedge": [(0, 1.2), (1.1, -0.8), (-1.1, -0.8)],
    "star": [
        (math.sin(k * math.pi / 5) * radius, -math.cos(k * math.pi / 5) * radius)
        for k, radius in enumerate((1.4, 0.65) * 5)
    ],
    "cross": [*_HALF_CROSS, *((-x, -y) for x, y in _HALF_CROSS)],
}
MARKERS = ("circle", *_SHAPES)


@dataclass(frozen=True, slots=True)
class Style:
    """How a series looks: colour and marker by their numbers, both going round; without a colour it is plain."""

    colour: int | None
    marker: int

    @property
    def css(self) -> str:
        """The class that gives the colour."""
        return "plain" if self.colour is None else f"c{self.colour % NUM_COLOURS}"

    @property
    def shape(self) -> str:
        """The name of the marker's shape."""
        return MARKERS[self.marker % len(MARKERS)]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on the drawing."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two share any area."""
        return not (
            self.right <= other.left or other.right <= self.left or self.bottom <= other.top or other.bottom <= self.top
        )

    def inside(self, other: Box) -> bool:
        """Whether it lies within the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a label is written, and where a line from its point must lead when it stands far off."""

    box: Box
    leader: tuple[float, float] | None = None


def tag(name: str, *content: Markup | str, **attributes: object) -> Markup:
    """One element; texts and attribute values are escaped. `class_` and `font_size` become `class` and `font-size`."""
    given = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(part if isinstance(part, Markup) else escape(visible(part)) for part in content)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, inner)


def _plain(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else visible(str(value))


def marker(style: Style, x: float, y: float, *, radius: float = 5.0, hollow: bool = False) -> Markup:
    """The series' shape around a place."""
    look = "dot hollow" if hollow else "dot"
    if style.shape == "circle":
        return tag("circle", class_=look, cx=x, cy=y, r=radius)
    corners = [(x + dx * radius, y + dy * radius) for dx, dy in _SHAPES[style.shape]]
    return tag("path", class_=look, d=path(corners) + "Z")


def path(places: Sequence[tuple[float, float]]) -> str:
    """Straight lines through the places, as path data."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)


def text_width(text: str, font_size: float = FONT_SIZE) -> float:
    """Roughly how wide a text is drawn; wide (East Asian) characters count twice."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return (len(text) + wide) * font_size * 0.6


def place_label(x: float, y: float, text: str, *, taken: Sequence[Box], within: Box, near: float = 9) -> Place:
    """The nearest free place for a label of the point at (x, y): right, left, above, below, then further and further.

    It keeps `near` pixels away from the point. When nothing is free it stands to the right, over what is there.
    """
    width = text_width(text)
    for distance in (0.0, 10.0, 20.0, 32.0, 46.0, 62.0, 80.0, 100.0, 130.0, 160.0):
        for box in _around(x, y, width, near + distance):
            if box.inside(within) and not any(box.meets(other) for other in taken):
                nearest = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
                return Place(box, nearest if distance > 10 else None)
    left = min(x + near, within.right - width)
    return Place(Box(left, y - LINE_HEIGHT / 2, left + width, y + LINE_HEIGHT / 2))


def _around(x: float, y: float, width: float, near: float) -> Iterator[Box]:
    half, diagonal = LINE_HEIGHT / 2, near * 0.8
    for left, middle in (
        (x + near, y),
        (x - near - width, y),
        (x - width / 2, y - near - half),
        (x - width / 2, y + near + half),
        (x + diagonal, y - diagonal),
        (x + diagonal, y + diagonal),
        (x - diagonal - width, y - diagonal),
        (x - diagonal - width, y + diagonal),
    ):
        yield Box(left, middle - half, left + width, middle + half)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the order given, each as near to the wanted one as a distance of `gap` between them allows.

    Labels that crowd move apart around their middle; all stay between `low` and `high` while there is room.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _start(groups[-1], wanted, gap) < _end(groups[-2], wanted, gap):
            groups[-2:] = [groups[-2] + groups[-1]]
    found = [0.0] * len(wanted)
    for group in groups:
        for rank, i in enumerate(group):
            found[i] = _start(group, wanted, gap) + gap / 2 + rank * gap
    return _held(found, order, gap, low, high)


def _held(places: list[float], order: Sequence[int], gap: float, low: float, high: float) -> list[float]:
    edge = high
    for i in reversed(order):
        places[i] = min(places[i], edge)
        edge = places[i] - gap
    edge = low
    for i in order:
        places[i] = max(places[i], edge)
        edge = places[i] + gap
    return places


def _start(group: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return sum(wanted[i] for i in group) / len(group) - len(group) * gap / 2


def _end(group: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return _start(group, wanted, gap) + len(group) * gap
