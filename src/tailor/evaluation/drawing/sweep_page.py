"""The report of a sweep as one HTML page: no script, no network, nothing beside it but report.json and best.yaml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from tailor.evaluation.drawing import quantities as q
from tailor.evaluation.drawing.chart_data import FULL, NARROW, Figure
from tailor.evaluation.drawing.html import render
from tailor.evaluation.drawing.plot import Frame
from tailor.evaluation.drawing.svg import Style
from tailor.evaluation.drawing.sweep_charts import TrialMark, Weight, importances, trial_history
from tailor.evaluation.drawing.tables import Cell, Column, Table, gaps

Report = Mapping[str, Any]
Trial = Mapping[str, Any]


def render_sweep(report: Report) -> str:
    """The page, drawn from the dict of `recipes.sweep_report.build_report` (or report.json) alone."""
    return render("sweep.html.jinja", _view(report))


def best_sentence(report: Report) -> str:
    """What the sweep came to, in one sentence."""
    best, number = report["best"], len(report["trials"])
    if best is None:
        return f"None of {number} trials came to its end."
    loss = q.number(best["validation_loss"])
    return f"{settings_of(report, best)}: validation loss {loss}, the lowest of {number} trials."


def trials_table(report: Report, limit: int | None = None) -> Table:
    """Trials from the lowest loss to the highest, then those that were given up, then those that failed."""
    ranked = sorted(report["trials"], key=_rank)[:limit]
    columns = (
        Column("Trial", number=False),
        Column("Settings", "× is a multiple of the technique's own learning rate", number=False),
        Column("Validation loss", "lower is better"),
        Column("Steps"),
    )
    lines = tuple(
        (
            Cell(str(trial["number"]), "" if trial["state"] == "complete" else _state(trial)),
            Cell(settings_of(report, trial)),
            _loss(trial),
            Cell(q.MISSING) if trial["num_steps"] is None else Cell(q.count(trial["num_steps"])),
        )
        for trial in ranked
    )
    picked = 0 if report["best"] is not None and lines else None
    return Table("Trials, the best first", columns, lines, picked)


def _view(report: Report) -> dict[str, Any]:
    states = [trial["state"] for trial in report["trials"]]
    counted = {word: states.count(state) for state, word in (("pruned", "given up early"), ("failed", "failed"))}
    best = report["best"]
    return {
        "gaps": gaps,
        "name": report["name"],
        "created": report["created"],
        "headline": best_sentence(report),
        "sentences": [f"{n} of {len(states)} trials {word}." for word, n in counted.items() if n],
        "settings": [] if best is None else _settings(report, best),
        "history": _history_figure(report),
        "importance": _importance_figure(report),
        "importance_note": report["importance_note"],
        "trials": trials_table(report),
        "artifact": report["artifact"],
        "failures": [(t["number"], t["error"]["message"]) for t in report["trials"] if t["error"]],
        "facts": _facts(report),
        "command": report["command"],
        "notes": report["data"]["notes"],
    }


def _history_figure(report: Report) -> Figure | None:
    shown = [trial for trial in report["trials"] if _last_loss(trial) is not None]
    if not shown:
        return None
    styles = {name: Style(k, k) for k, name in enumerate(report["techniques"])}
    best = report["best"]["number"] if report["best"] is not None else None
    marks = [
        TrialMark(
            trial["number"],
            _last_loss(trial) or 0.0,
            styles[trial["technique"]],
            f"trial {trial['number']}, {settings_of(report, trial)}: {_loss(trial).text}",
            hollow=trial["state"] != "complete",
            ring=trial["number"] == best,
        )
        for trial in shown
    ]
    title = "History"
    caption = "Every trial's validation loss; the dashed line is the best so far, the ring marks the best of all."
    if any(mark.hollow for mark in marks):
        caption += " Hollow marks were given up: they show the last loss before."
    line = [(float(number), float(loss)) for number, loss in report["history"]]
    names = list(styles.items())

    def draw(name: str, width: int) -> Markup:
        return trial_history(Frame(f"history-{name}", title, caption, width), marks, line, names)

    rows = tuple((Cell(str(number)), Cell(q.number(loss))) for number, loss in report["history"])
    table = Table("Best loss so far", (Column("Trial", number=False), Column("Best validation loss")), rows)
    return _figure(title, caption, draw, table)


def _importance_figure(report: Report) -> Figure | None:
    if not report["importance"]:
        return None
    weights = [Weight(key, found) for key, found in sorted(report["importance"].items(), key=lambda item: -item[1])]
    title = "What mattered"
    caption = (
        "Each searched setting's share in what sets the good trials apart (PED-ANOVA). "
        "With few trials it is a rough guide."
    )

    def draw(name: str, width: int) -> Markup:
        return importances(Frame(f"importance-{name}", title, caption, width), weights)

    rows = tuple((Cell(weight.label), Cell(q.share(weight.share))) for weight in weights)
    return _figure(title, caption, draw, Table("Importance", (Column("Setting", number=False), Column("Share")), rows))


def _figure(title: str, caption: str, draw: Callable[[str, int], Markup], table: Table) -> Figure:
    return Figure(title, caption, draw("wide", FULL), draw("narrow", NARROW), table)


def _settings(report: Report, best: Trial) -> list[tuple[str, str]]:
    train = (best["recipe"] or {}).get("train", {})
    rate = [] if train.get("learning_rate") is None else [("peak learning rate", q.number(train["learning_rate"]))]
    sizes = [(name, q.count(train[name])) for name in ("batch_size", "num_steps") if train.get(name)]
    parameters = [("trainable parameters", q.count(best["num_parameters"]))] if best["num_parameters"] else []
    drawn = _values(report, best)
    return [("technique", best["technique"]), *drawn, *rate, *sizes, *parameters]


def _facts(report: Report) -> list[tuple[str, str]]:
    data, machine, recipe = report["data"], report["machine"], report["recipe"]
    pruner = recipe["pruner"]["type"]
    return [
        ("base", recipe["base"]["name"]),
        ("rows", f"{q.count(data['num_train'])} to learn from, {q.count(data['num_validation'])} to judge by"),
        ("searched", "; ".join(f"{key}: {_space(space)}" for key, space in report["space"].items())),
        ("trials", f"{len(report['trials'])} of {report['num_trials']}, {recipe['in_parallel']} in one pass"),
        ("giving up", pruner),
        ("machine", ", ".join(str(machine[key]) for key in ("system", "cpu") if machine.get(key))),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]


def _rank(trial: Trial) -> tuple[int, float, int]:
    order = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}[trial["state"]]
    loss = _last_loss(trial)
    return order, float("inf") if loss is None else loss, trial["number"]


def _last_loss(trial: Trial) -> float | None:
    found: float | None = trial["validation_loss"] if trial["validation_loss"] is not None else trial["last_loss"]
    return found


def _state(trial: Trial) -> str:
    return {"pruned": "given up", "running": "not finished"}.get(trial["state"], str(trial["state"]))


def _loss(trial: Trial) -> Cell:
    loss = _last_loss(trial)
    if loss is None:
        return Cell(q.MISSING, why=(trial["error"] or {}).get("message", ""))
    return Cell(q.number(loss), "" if trial["state"] == "complete" else _state(trial))


def settings_of(report: Report, trial: Trial) -> str:
    """What a trial tried, on one line: its technique, then what was searched, without the paths."""
    return ", ".join([trial["technique"] or q.MISSING, *(f"{name} {text}" for name, text in _values(report, trial))])


def _values(report: Report, trial: Trial) -> list[tuple[str, str]]:
    found = []
    for key, value in trial["values"].items():
        space = report["space"][key]
        times = "×" if isinstance(space, Mapping) and space["relative"] else ""
        found.append((key.rpartition(".")[2], times + _text(value)))
    return found


def _text(value: Any) -> str:
    return q.trimmed(q.number(value)) if isinstance(value, float) else str(value)


def _space(space: Any) -> str:
    if not isinstance(space, Mapping):
        return ", ".join(_text(value) for value in space)
    ends = f"{_text(space['low'])} to {_text(space['high'])}"
    return ends + (" × the default" if space["relative"] else "") + (", by magnitude" if space["log"] else "")
