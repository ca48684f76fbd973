"""What the charts have in common: the frame with title and description, and axes with their grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from tailor.evaluation.drawing.quantities import trimmed
from tailor.evaluation.drawing.scales import Scale, is_wide, linear, logarithmic
from tailor.evaluation.drawing.svg import FONT_SIZE, Box, path, tag, text_width

NARROW = 480
"""Below this width labels are cut shorter and rows are stacked."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a chart says of itself, its width in pixels, and the identifier of its parts (unique on the page)."""

    id: str
    title: str
    description: str
    width: int

    @property
    def narrow(self) -> bool:
        """Whether it is drawn for a phone."""
        return self.width < NARROW

    def around(self, height: float, *content: Markup) -> Markup:
        """The finished drawing."""
        return tag(
            "svg",
            tag("title", self.title, id=f"{self.id}-title"),
            tag("desc", self.description, id=f"{self.id}-desc"),
            *content,
            xmlns="http://www.w3.org/2000/svg",
            class_="chart",
            role="img",
            aria_labelledby=f"{self.id}-title {self.id}-desc",
            viewBox=f"0 0 {self.width} {height:.0f}",
            width=self.width,
            height=round(height),
            font_size=FONT_SIZE,
        )


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows and how its ticks are written.

    `within` are bounds that no value can pass, `covered` values for which there must be room, drawn or not.
    """

    title: str
    written: Callable[[float], str]
    within: tuple[float, float] | None = None
    covered: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Plot:
    """An area with an x and a y scale."""

    area: Box
    x: Scale
    y: Scale
    x_axis: Axis
    y_axis: Axis

    def grid(self, ticks: Sequence[float] = ()) -> Markup:
        """Lines across at the y ticks, marks at the x ticks (`ticks`, or round numbers), and the axes' titles."""
        area = self.area
        middle = (area.left + area.right) / 2
        return tag(
            "g",
            *self._rows(),
            *self._columns(ticks or fitting_ticks(self.x, self.x_axis.written)),
            tag("path", class_="axis", d=path([(area.left, area.bottom), (area.right, area.bottom)])),
            tag("text", self.y_axis.title, class_="axis-title", x=4, y=16),
            tag("text", self.x_axis.title, class_="axis-title", x=middle, y=area.bottom + 42, text_anchor="middle"),
        )

    def _rows(self) -> list[Markup]:
        parts, area = [], self.area
        for tick in self.y.ticks(6):
            place, text = self.y.at(tick), trimmed(self.y_axis.written(tick))
            parts.append(tag("path", class_="grid", d=path([(area.left, place), (area.right, place)])))
            parts.append(tag("text", text, class_="tick", x=area.left - 8, y=place + 4.5, text_anchor="end"))
        return parts

    def _columns(self, ticks: Sequence[float]) -> list[Markup]:
        parts, free = [], float("-inf")
        for tick in ticks:
            place, text = self.x.at(tick), trimmed(self.x_axis.written(tick))
            half = text_width(text) / 2
            parts.append(tag("path", class_="axis", d=path([(place, self.area.bottom), (place, self.area.bottom + 5)])))
            if place - half > free:  # ticks keep their mark where their number would touch the one before
                parts.append(tag("text", text, class_="tick", x=place, y=self.area.bottom + 20, text_anchor="middle"))
                free = place + half + 6
        return parts


def fitting_ticks(scale: Scale, written: Callable[[float], str]) -> list[float]:
    """As many round numbers as can stand beside each other."""
    for wanted in (5, 4, 3, 2):
        ticks = scale.ticks(wanted)
        widest = max((text_width(trimmed(written(tick))) for tick in ticks), default=0.0)
        if all(scale.at(after) - scale.at(before) > widest + 6 for before, after in pairwise(ticks)):
            break
    return ticks


def scaled(values: Sequence[float], start: float, end: float, axis: Axis) -> Scale:
    """Logarithmic where values lie far apart and nothing bounds them, else even."""
    values = [*values, *axis.covered]
    if axis.within is None and is_wide(values):
        return logarithmic(values, start, end)
    return linear(values, start, end, within=axis.within)
