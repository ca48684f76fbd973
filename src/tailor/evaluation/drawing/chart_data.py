"""The charts of a comparison's report: which numbers go where. Each is drawn wide and narrow, and has a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from tailor.evaluation.drawing import details, tables
from tailor.evaluation.drawing import quantities as q
from tailor.evaluation.drawing.charts import (
    Difference,
    Level,
    Point,
    Series,
    differences_to_best,
    learning_curves,
    quality_against_cost,
)
from tailor.evaluation.drawing.plot import Axis, Frame
from tailor.evaluation.drawing.svg import Style
from tailor.evaluation.drawing.tables import Cell, Column, Report, Row, Table

NARROW, HALF, FULL = 340, 560, 860
"""Widths in pixels: on a phone, beside another chart, alone."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart for wide and one for narrow screens, what it shows, and its numbers. Not `full`: two fit side by side."""

    title: str
    caption: str
    wide: Markup
    narrow: Markup
    table: Table
    full: bool = True


@dataclass(frozen=True, slots=True)
class Cost:
    """Something that quality is held against. `of` reads it from a row; None where the row has none.

    `is_free` tells the rows without it that are drawn as lines across the chart: `free` says why.
    """

    id: str
    title: str
    axis: Axis
    of: Callable[[Row], float | None]
    free: str
    is_free: Callable[[Row], bool]


def cost_figures(report: Report) -> list[Figure]:
    """Quality against the cost of serving, and against training time; each where two rows or more have both."""
    scored = [row for row in report["rows"] if row["metrics"].get(report["metric"]["name"])]
    costs = (_serving_cost(report), _training_cost())
    return [_cost_figure(report, cost, scored) for cost in costs if sum(cost.of(row) is not None for row in scored) > 1]


def curve_figures(report: Report) -> list[Figure]:
    """Learning curves, one chart per base, the baselines in each; none where there is but one size."""
    if not details.has_curves(report):
        return []
    bases = list(dict.fromkeys(row["base"] for row in report["rows"] if row["base"] is not None)) or [None]
    return [_curve_figure(report, k, base, len(bases)) for k, base in enumerate(bases)]


def difference_figure(report: Report) -> Figure | None:
    """Every difference to the best with its interval; None where nothing could be compared row by row."""
    names, styles = tables.labels(report), _styles(report)
    rows = [
        Difference(
            label=names[found["id"]],
            style=styles[found["id"]],
            **{key: found[key] for key in ("mean", "low", "high", "tie")},
            words=tables.word_for(report, found),
        )
        for found in report["verdict"]["differences"]
        if found["low"] is not None
    ]
    if not rows:
        return None
    best = names[report["verdict"]["best"]]
    title = f"Differences to {best}"
    caption = (
        f"How far each lies from {best} on the same test rows. A bar that touches the line at zero is a tie (hollow): "
        "the difference may be chance."
    )
    axis = f"difference in {report['metric']['name']}"

    def draw(name: str, width: int) -> Markup:
        return differences_to_best(Frame(f"differences-{name}", title, caption, width), rows, best, axis)

    return Figure(title, caption, draw("wide", FULL), draw("narrow", NARROW), details.differences(report))


def _cost_figure(report: Report, cost: Cost, rows: Sequence[Row]) -> Figure:
    """On a narrow screen each base has a chart of its own, all with the same axes."""
    bases = list(dict.fromkeys(row["base"] for row in rows if row["base"] is not None))
    names, metric = tables.labels(report), report["metric"]["name"]
    values = [value for row in rows if (value := cost.of(row)) is not None]
    x_axis = replace(cost.axis, covered=(min(values), max(values)))
    y_axis = _score_axis(report, [score for row in rows for score in _bounds(row["metrics"][metric])])
    better = "further up" if report["metric"]["higher_is_better"] else "further down"
    caption = f"Each point is a technique: {better} is better, further left is cheaper. Bars are intervals."
    if any(cost.of(row) is None and cost.is_free(row) for row in rows):
        caption += f" Dotted lines: {cost.free}."
    if any(row["id"] == report["verdict"]["pick"] and cost.of(row) is not None for row in rows):
        caption += " The ring marks the one to take."

    def draw(name: str, width: int, base: str | None = None) -> Markup:
        frame = Frame(f"{cost.id}-{name}", cost.title + (f" on {base}" if base else ""), caption, width)
        own = [row for row in rows if base is None or row["base"] in (base, None)]
        called = names if base is None else {row["id"]: row["name"] for row in own}
        across = x_axis if base is None else replace(x_axis, title=f"{x_axis.title} on {base}")
        series, levels = _cost_series(report, cost, own, called)
        return quality_against_cost(frame, series, levels, across, y_axis)

    several = len(bases) > 1
    narrow = (
        [draw(f"narrow-{k}", NARROW, base) for k, base in enumerate(bases)] if several else [draw("narrow", NARROW)]
    )
    wide = draw("wide", FULL if several else HALF)
    return Figure(cost.title, caption, wide, Markup("").join(narrow), _cost_table(report, cost, rows), several)


def _cost_series(
    report: Report, cost: Cost, rows: Sequence[Row], names: Mapping[str, str]
) -> tuple[list[Series], list[Level]]:
    """A point for each row that has the cost, a line across for each that is free of it."""
    styles, series, levels = _styles(report), [], []
    for row in rows:
        score, value = row["metrics"][report["metric"]["name"]], cost.of(row)
        if value is not None:
            point = Point(value, score["mean"], score["low"], score["high"])
            picked = row["id"] == report["verdict"]["pick"]
            series.append(Series(names[row["id"]], styles[row["id"]], (point,), ring=picked))
        elif cost.is_free(row):
            levels.append(Level(names[row["id"]], score["mean"]))
    return series, levels


def _cost_table(report: Report, cost: Cost, rows: Sequence[Row]) -> Table:
    names, lines = tables.labels(report), []
    for row in rows:
        value, score = cost.of(row), tables.scored(row["metrics"][report["metric"]["name"]])
        shown = tables.missing(row, cost.id == "training") if value is None else Cell(cost.axis.written(value))
        lines.append((Cell(names[row["id"]]), shown, score))
    columns = (Column("Technique", number=False), Column(cost.axis.title), Column(tables.metric_title(report)))
    return Table(f"Numbers: {cost.title[0].lower()}{cost.title[1:]}", columns, tuple(lines))


def _serving_cost(report: Report) -> Cost:
    def read(key: str) -> Callable[[Row], float | None]:
        return lambda row: (row["inference"] or {}).get(key)

    def is_baseline(row: Row) -> bool:
        return bool(row["kind"] == "baseline")

    title, without = "Quality against the cost of serving", "no language model"
    if report["settings"]["rate"]:
        axis = Axis("cost of 1,000 requests", q.money)
        return Cost("serving", title, axis, read("cost_per_1000"), without, is_baseline)
    axis = Axis("machine time per request", q.duration)
    return Cost("serving", title, axis, read("seconds_per_request"), without, is_baseline)


def _training_cost() -> Cost:
    def seconds(row: Row) -> float | None:
        return row["training"]["seconds"] if row["training"] else None

    axis = Axis("training time", q.duration)
    return Cost("training", "Quality against training time", axis, seconds, "nothing is trained", lambda row: True)


def _curve_figure(report: Report, k: int, base: str | None, num_bases: int) -> Figure:
    names, styles = tables.labels(report), _styles(report)
    rows = {row["id"]: row for row in report["rows"] if row["base"] in (base, None)}
    series = [
        Series(
            rows[curve["id"]]["name"] if num_bases > 1 else names[curve["id"]],
            styles[curve["id"]],
            tuple(Point(p["size"], p["mean"], p["low"], p["high"]) for p in curve["points"]),
            dashed=rows[curve["id"]]["kind"] != "technique",
        )
        for curve in report["curves"]
        if curve["id"] in rows and curve["points"]
    ]
    title = "Learning curves" + (f" on {base}" if num_bases > 1 else "")
    caption = (
        "What more rows bring: each line is a technique, its band the interval; dashed lines are the plain base and "
        "what needs no language model."
    )
    every = [value for curve in report["curves"] for point in curve["points"] for value in _bounds(point)]
    x_axis, y_axis = Axis("training rows", q.count), _score_axis(report, every)

    def draw(name: str, width: int) -> Markup:
        return learning_curves(Frame(f"curves-{k}-{name}", title, caption, width), series, x_axis, y_axis)

    width = FULL if num_bases == 1 else HALF
    table = details.curves(report, [curve for curve in report["curves"] if curve["id"] in rows], title)
    return Figure(title, caption, draw("wide", width), draw("narrow", NARROW), table, width == FULL)


def _styles(report: Report) -> dict[str, Style]:
    """One colour per technique on all bases; its marker differs between bases. What is no technique is plain."""
    rows = report["rows"]
    techniques = list(dict.fromkeys(row["name"] for row in rows if row["kind"] == "technique"))
    others = list(dict.fromkeys(row["name"] for row in rows if row["kind"] != "technique"))
    bases = list(dict.fromkeys(row["base"] for row in rows if row["base"] is not None))
    found = {}
    for row in rows:
        shift = 3 * bases.index(row["base"]) if row["base"] is not None else 0
        if row["kind"] == "technique":
            number = techniques.index(row["name"])
            found[row["id"]] = Style(number, number + shift)
        else:
            found[row["id"]] = Style(None, others.index(row["name"]) + shift)
    return found


def _score_axis(report: Report, values: Sequence[float]) -> Axis:
    share = all(0 <= value <= 1 for value in values)
    bounds = (0.0, 1.0) if share else None
    return Axis(tables.metric_title(report), q.score, bounds, (min(values), max(values)))


def _bounds(score: dict[str, float]) -> Iterator[float]:
    yield from (score["low"], score["mean"], score["high"])
