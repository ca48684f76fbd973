"""Charts as hand-written SVG: quality against cost, learning curves with intervals, differences to the best.

Each takes plain numbers and returns one `<svg role="img">` with title and description. Colours come from the page's
style sheet (classes c0 to c7, and plain); every series also has its own marker and its name beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tailor.evaluation.drawing.plot import Axis, Frame, Plot, fitting_ticks, scaled
from tailor.evaluation.drawing.quantities import difference, score, shortened, span, trimmed
from tailor.evaluation.drawing.scales import Scale, linear, logarithmic
from tailor.evaluation.drawing.svg import LINE_HEIGHT, Box, Style, marker, path, place_label, spread, tag, text_width

LEFT, TOP, BOTTOM = 62.0, 34.0, 50.0
"""Room for the y ticks, the y axis' title and the x axis."""

WIDE = 700
"""From this width on a chart may be higher."""


@dataclass(frozen=True, slots=True)
class Point:
    """A score at `x`, with its interval."""

    x: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    """What one technique measured. A `ring` is drawn around the one to pick."""

    label: str
    style: Style
    points: tuple[Point, ...]
    dashed: bool = False
    ring: bool = False


@dataclass(frozen=True, slots=True)
class Level:
    """A score that has no place on the x axis: a line across the chart."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Difference:
    """A technique's score minus the best one's over the same rows; `words` say what it means."""

    label: str
    style: Style
    mean: float
    low: float
    high: float
    tie: bool
    words: str


def quality_against_cost(
    frame: Frame, series: Sequence[Series], levels: Sequence[Level], x_axis: Axis, y_axis: Axis
) -> Markup:
    """One point per technique with its interval as a bar; costs far apart get a logarithmic axis."""
    height = 400.0 if frame.width < WIDE else 480.0
    area = Box(LEFT, TOP, frame.width - 18, height - BOTTOM)
    points = [point for one in series for point in one.points]
    x = scaled([point.x for point in points], area.left + 14, area.right - 14, x_axis)
    y = scaled([*_extent(points), *(level.score for level in levels)], area.bottom, area.top, y_axis)
    plot = Plot(area, x, y, x_axis, y_axis)
    taken = [box for point in points for box in _occupied(plot, point)]
    lines = [_level_line(level, plot) for level in levels]
    marks, labels = [], []
    for level in levels:
        label, box = _level_label(level, plot, taken)
        labels.append(label)
        taken.append(box)
    for one in series:
        for point in one.points:
            parts = (_tip(one, point, x_axis), _bar(plot, point), *_dot(plot, one, point))
            marks.append(tag("g", *parts, class_=one.style.css))
            label, box = _point_label(plot, one, point, taken)
            labels.append(label)
            taken.append(box)
    return frame.around(height, plot.grid(), *lines, *marks, *labels)


def learning_curves(frame: Frame, series: Sequence[Series], x_axis: Axis, y_axis: Axis) -> Markup:
    """One line per technique over the rows learnt from (logarithmic), its interval as a band, its name at the end."""
    height = 420.0
    labels = [shortened(one.label, 15 if frame.narrow else 28) for one in series]
    area = Box(LEFT, TOP, frame.width - 24 - max(map(text_width, labels)), height - BOTTOM)
    points = [point for one in series for point in one.points]
    sizes = sorted({point.x for point in points})
    across = logarithmic if sizes[0] > 0 and len(sizes) > 1 else linear
    y = scaled(_extent(points), area.bottom, area.top, y_axis)
    plot = Plot(area, across(sizes, area.left, area.right), y, x_axis, y_axis)
    places = spread([y.held(one.points[-1].mean) for one in series], LINE_HEIGHT, area.top, area.bottom)
    return frame.around(
        height,
        plot.grid(sizes),
        *(_band(plot, one) for one in series if not one.dashed),
        *(_curve(plot, one) for one in series),
        *(_end_label(plot, one, label, place) for one, label, place in zip(series, labels, places, strict=True)),
    )


def differences_to_best(frame: Frame, rows: Sequence[Difference], best: str, axis_title: str) -> Markup:
    """A forest plot: each difference with its interval, zero being the best one; a tie has a hollow marker.

    On a narrow drawing names and numbers stand above the bars, on a wide one beside them.
    """
    names = [shortened(row.label, 30) for row in rows]
    words = [f"{difference(row.mean)} ({span(row.low, row.high, signed=True)}), {row.words}" for row in rows]
    left = 8.0 if frame.narrow else 14 + max(map(text_width, names))
    right = frame.width - (8.0 if frame.narrow else 8 + max(map(text_width, words)))
    row_height, middle = (62.0, 48.0) if frame.narrow else (32.0, 16.0)
    bottom = TOP + row_height * len(rows)
    ends = [0.0, *(end for row in rows for end in (row.low, row.high))]
    x = linear(ends, left + 12, right - 12)
    drawn = [_difference_axis(x, bottom, axis_title), _zero_line(frame, x, bottom, f"best: {shortened(best, 30)}")]
    for k, (row, name, text) in enumerate(zip(rows, names, words, strict=True)):
        y = TOP + k * row_height + middle
        if frame.narrow:
            heads = [tag("text", name, class_="label", x=left, y=y - 30), tag("text", text, x=left, y=y - 13)]
        else:
            heads = [tag("text", name, class_="label", x=left - 6, y=y + 4.5, text_anchor="end")]
            heads += [tag("text", text, x=right + 8, y=y + 4.5)]
        bar = tag("path", class_="bar", d=path([(x.at(row.low), y), (x.at(row.high), y)]))
        dot = marker(row.style, x.at(row.mean), y, hollow=row.tie)
        drawn.append(tag("g", *heads, bar, dot, class_=row.style.css))
    return frame.around(bottom + BOTTOM, *drawn)


def _extent(points: Sequence[Point]) -> list[float]:
    return [value for point in points for value in (point.low, point.mean, point.high)]


def _occupied(plot: Plot, point: Point) -> tuple[Box, Box]:
    """What a point's marker and its bar cover."""
    x, y = plot.x.at(point.x), plot.y.held(point.mean)
    bar = Box(x - 4, plot.y.held(point.high), x + 4, plot.y.held(point.low))
    return Box(x - 8, y - 8, x + 8, y + 8), bar


def _tip(one: Series, point: Point, x_axis: Axis) -> Markup:
    """What a pointer that rests on a mark is told."""
    measured = f"{score(point.mean)} ({span(point.low, point.high)})"
    return tag("title", f"{one.label}: {measured} at {x_axis.written(point.x)}")


def _bar(plot: Plot, point: Point) -> Markup:
    x, low, high = plot.x.at(point.x), plot.y.held(point.low), plot.y.held(point.high)
    caps = "".join(path([(x - 4, end), (x + 4, end)]) for end in (low, high))
    return tag("path", class_="bar", d=path([(x, low), (x, high)]) + caps)


def _dot(plot: Plot, one: Series, point: Point) -> list[Markup]:
    x, y = plot.x.at(point.x), plot.y.held(point.mean)
    ring = [tag("circle", class_="ring", cx=x, cy=y, r=11)] if one.ring else []
    return [*ring, marker(one.style, x, y)]


def _point_label(plot: Plot, one: Series, point: Point, taken: Sequence[Box]) -> tuple[Markup, Box]:
    x, y, area = plot.x.at(point.x), plot.y.held(point.mean), plot.area
    text = shortened(one.label, int((area.right - area.left) / (2 * text_width("x"))))
    within = Box(area.left + 2, area.top - 6, area.right + 14, area.bottom - 2)
    place = place_label(x, y, text, taken=taken, within=within, near=15 if one.ring else 9)
    left, right = place.box.left, place.box.right
    at, anchor = (left, "start") if left > x else (right, "end") if right < x else ((left + right) / 2, "middle")
    name = tag("text", text, class_="label", x=at, y=place.box.bottom - 4, text_anchor=anchor)
    leader = [tag("path", class_="leader", d=path([(x, y), place.leader]))] if place.leader else []
    return tag("g", *leader, name, class_=one.style.css), place.box


def _level_line(level: Level, plot: Plot) -> Markup:
    y = plot.y.held(level.score)
    line = tag("path", class_="level", d=path([(plot.area.left, y), (plot.area.right, y)]))
    return tag("g", tag("title", f"{level.label}: {score(level.score)}"), line)


def _level_label(level: Level, plot: Plot, taken: Sequence[Box]) -> tuple[Markup, Box]:
    """The name on its line where nothing stands in the way: above, below, then further off with a line that leads back.

    Each time from the left to the right; shortened where the whole name finds no room.
    """
    y = plot.y.held(level.score)
    tries = [(text, _level_boxes(y, text, plot)) for text in (shortened(level.label, n) for n in (30, 18, 12))]
    free = ((text, box) for text, boxes in tries for box in boxes if not any(box.meets(other) for other in taken))
    text, box = next(free, (tries[0][0], tries[0][1][0]))
    name = tag("text", text, class_="level-label", x=box.left, y=box.bottom - 4)
    edge = min(max(y, box.top), box.bottom)
    leader = [tag("path", class_="leader", d=path([(box.left, edge), (box.left, y)]))] if edge != y else []
    return tag("g", *leader, name, class_="plain"), box


def _level_boxes(y: float, text: str, plot: Plot) -> list[Box]:
    width = text_width(text)
    rightmost = max(plot.area.left + 5, plot.area.right - width)
    lefts = range(int(plot.area.left) + 4, int(rightmost) + 1, 8)
    tops = [y - LINE_HEIGHT, y, y - 28, y + 12, y - 42, y + 26]
    return [Box(left, top, left + width, top + LINE_HEIGHT) for top in tops for left in lefts]


def _band(plot: Plot, one: Series) -> Markup:
    upper = [(plot.x.at(p.x), plot.y.held(p.high)) for p in one.points]
    lower = [(plot.x.at(p.x), plot.y.held(p.low)) for p in reversed(one.points)]
    return tag("path", class_=f"band {one.style.css}", d=path([*upper, *lower]) + "Z")


def _curve(plot: Plot, one: Series) -> Markup:
    places = [(plot.x.at(p.x), plot.y.held(p.mean)) for p in one.points]
    line = tag("path", class_="line dashed" if one.dashed else "line", d=path(places))
    marks = [tag("g", _tip(one, p, plot.x_axis), *_dot(plot, one, p)) for p in one.points]
    return tag("g", line, *marks, class_=one.style.css)


def _end_label(plot: Plot, one: Series, text: str, place: float) -> Markup:
    """The series' name right of the plot; a line leads there when it had to move or the series ends early."""
    last, reach = one.points[-1], plot.area.right + 16
    start = (plot.x.at(last.x) + 7, plot.y.held(last.mean))
    far = abs(place - start[1]) > 3 or start[0] < plot.area.right
    leader = [tag("path", class_="leader", d=path([start, (reach - 2, place)]))] if far else []
    return tag("g", *leader, tag("text", text, class_="label", x=reach, y=place + 4.5), class_=one.style.css)


def _difference_axis(x: Scale, bottom: float, title: str) -> Markup:
    ticks = {x.at(value): trimmed(difference(value)) for value in fitting_ticks(x, difference)}
    return tag(
        "g",
        *(tag("path", class_="grid", d=path([(place, TOP), (place, bottom)])) for place in ticks),
        *(tag("text", t, class_="tick", x=place, y=bottom + 18, text_anchor="middle") for place, t in ticks.items()),
        tag("text", title, class_="axis-title", x=(x.start + x.end) / 2, y=bottom + 40, text_anchor="middle"),
    )


def _zero_line(frame: Frame, x: Scale, bottom: float, name: str) -> Markup:
    """The best technique's line, its name above it and within the drawing."""
    half, zero = text_width(name) / 2, x.at(0.0)
    middle = min(max(zero, half + 4), frame.width - half - 4)
    line = tag("path", class_="zero", d=path([(zero, TOP - 8), (zero, bottom)]))
    return tag("g", line, tag("text", name, x=middle, y=TOP - 14, text_anchor="middle"))
