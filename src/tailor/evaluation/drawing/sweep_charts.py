"""Charts of a sweep as hand-written SVG: the loss of every trial with the best so far, and what mattered for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tailor.evaluation.drawing.plot import Axis, Frame, Plot, scaled
from tailor.evaluation.drawing.quantities import score, share, shortened
from tailor.evaluation.drawing.scales import linear
from tailor.evaluation.drawing.svg import LINE_HEIGHT, Box, Style, marker, path, tag, text_width

LEFT, TOP, BOTTOM = 62.0, 34.0, 50.0
"""Room for the y ticks, the y axis' title and the x axis."""


@dataclass(frozen=True, slots=True)
class TrialMark:
    """A trial's last loss; `hollow` when it was given up, a `ring` around the best. `words` are told to a pointer."""

    number: int
    loss: float
    style: Style
    words: str
    hollow: bool = False
    ring: bool = False


@dataclass(frozen=True, slots=True)
class Weight:
    """A setting's share of importance."""

    label: str
    share: float


def trial_history(
    frame: Frame, trials: Sequence[TrialMark], best: Sequence[tuple[float, float]], names: Sequence[tuple[str, Style]]
) -> Markup:
    """One mark per trial by its number, and a line of the best loss until then; `names` are the key to the marks."""
    key_rows = _key_rows(frame, names)
    area = Box(LEFT, TOP, frame.width - 18, 320.0)
    height = area.bottom + BOTTOM + LINE_HEIGHT * len(key_rows)
    y_axis = Axis("validation loss (lower is better)", score)
    numbers = [trial.number for trial in trials]
    x = linear([min(numbers), max(numbers)], area.left + 14, area.right - 14)
    y = scaled([trial.loss for trial in trials], area.bottom - 8, area.top + 8, y_axis)
    plot = Plot(area, x, y, Axis("trial", lambda value: f"{value:.0f}"), y_axis)
    ticks = [tick for tick in x.ticks(6) if tick == int(tick)]
    return frame.around(
        height,
        *_key(key_rows, area.bottom + BOTTOM + LINE_HEIGHT / 2),
        plot.grid(ticks),
        *_best_line(plot, best, max(numbers)),
        *(_mark(plot, trial) for trial in trials),
    )


def importances(frame: Frame, weights: Sequence[Weight]) -> Markup:
    """One bar per setting, the most important first; on a narrow drawing names stand above the bars."""
    names = [shortened(weight.label, 34) for weight in weights]
    left = 8.0 if frame.narrow else 14 + max(map(text_width, names))
    right = frame.width - 70.0
    row_height = 44.0 if frame.narrow else 28.0
    most = max(weight.share for weight in weights) or 1.0
    drawn = []
    for k, (weight, name) in enumerate(zip(weights, names, strict=True)):
        y = 12.0 + k * row_height + (16 if frame.narrow else 0)
        at, anchor, height = (left, "start", y - 4) if frame.narrow else (left - 8, "end", y + 13)
        length = max(1.0, (right - left) * weight.share / most)
        drawn.append(
            tag(
                "g",
                tag("title", f"{weight.label}: {share(weight.share)}"),
                tag("text", name, x=at, y=height, text_anchor=anchor),
                tag("rect", class_="dot", x=left, y=y, width=length, height=18.0),
                tag("text", share(weight.share), x=left + length + 6, y=y + 13),
                class_="c0",
            )
        )
    return frame.around(16 + row_height * len(weights), *drawn)


def _mark(plot: Plot, trial: TrialMark) -> Markup:
    x, y = plot.x.at(trial.number), plot.y.held(trial.loss)
    ring = [tag("circle", class_="ring", cx=x, cy=y, r=11)] if trial.ring else []
    dot = marker(trial.style, x, y, hollow=trial.hollow)
    return tag("g", tag("title", trial.words), *ring, dot, class_=trial.style.css)


def _best_line(plot: Plot, best: Sequence[tuple[float, float]], last: int) -> list[Markup]:
    """Steps: level until a better trial comes."""
    if not best:
        return []
    places: list[tuple[float, float]] = []
    for number, loss in best:
        here = plot.x.at(number)
        places += [(here, places[-1][1])] if places else []
        places.append((here, plot.y.held(loss)))
    places.append((plot.x.at(last), places[-1][1]))
    return [tag("g", tag("path", class_="line dashed", d=path(places)), class_="plain")]


def _key_rows(frame: Frame, names: Sequence[tuple[str, Style]]) -> list[list[tuple[float, str, Style]]]:
    """Names of the marks from the left to the right, on as many lines as they take."""
    rows: list[list[tuple[float, str, Style]]] = []
    x = float(frame.width)
    for name, style in names:
        text = shortened(name, 28)
        if x + 24 + text_width(text) > frame.width:
            rows.append([])
            x = 10.0
        rows[-1].append((x, text, style))
        x += 36 + text_width(text)
    return rows


def _key(rows: Sequence[Sequence[tuple[float, str, Style]]], top: float) -> list[Markup]:
    drawn = []
    for k, row in enumerate(rows):
        for x, text, style in row:
            y = top + k * LINE_HEIGHT
            label = tag("text", text, class_="label", x=x + 10, y=y + 4.5)
            drawn.append(tag("g", marker(style, x, y), label, class_=style.css))
    return drawn
