"""The comparison as tables of texts: the page, the Markdown and the terminal draw the same cells.

Everything comes from the report of `build_report`, which holds raw numbers; here they are rounded, and a value that is
missing becomes a dash with the reason beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tailor.evaluation.comparison import DESCRIPTIONS
from tailor.evaluation.drawing import quantities as q

Report = Mapping[str, Any]
Row = Mapping[str, Any]
"""A line of the report's `rows`."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A text, a smaller second line, and why the value is missing or how it came about.

    `mark` (good, bad, tie) goes with what the words say; `brief` is for where there is one line only.
    """

    text: str
    note: str = ""
    why: str = ""
    mark: str = ""
    brief: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """A header, and one line of plain words on what stands below it."""

    header: str
    explained: str = ""
    number: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """`lines` have one cell per column; the first names the line. `picked` is the number of the line to take."""

    caption: str
    columns: tuple[Column, ...]
    lines: tuple[tuple[Cell, ...], ...]
    picked: int | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """A column, and how it is read from a row of the report; None is a missing value."""

    column: Column
    cell: Callable[[Row], Cell | None]
    of_training: bool = False


def labels(report: Report) -> dict[str, str]:
    """What each row is called, by its id: its name, with several bases the base too; its id where others share it."""
    rows = report["rows"]
    several = len({row["base"] for row in rows if row["base"] is not None}) > 1
    names = {row["id"]: f"{row['name']} on {row['base']}" if several and row["base"] else row["name"] for row in rows}
    uses = Counter(names.values())
    return {key: name if uses[name] == 1 and name.strip() else key for key, name in names.items()}


def metric_title(report: Report) -> str:
    """The deciding metric as a header: Accuracy, Perplexity (lower is better)."""
    name = report["metric"]["name"]
    title = name[:1].upper() + name[1:].replace("_", " ")
    return title if report["metric"]["higher_is_better"] else f"{title} (lower is better)"


def table_of(report: Report, caption: str, measures: Sequence[Measure], rows: Sequence[Row]) -> Table:
    """One line per row; columns in which no row has a value are left out."""
    found = [[measure.cell(row) for row in rows] for measure in measures]
    kept = [k for k, cells in enumerate(found) if any(cell is not None for cell in cells)]
    names = labels(report)
    lines = []
    for i, row in enumerate(rows):
        cells = [found[k][i] or missing(row, measures[k].of_training) for k in kept]
        lines.append((Cell(names[row["id"]], _kind(row)), *cells))
    picked = next((i for i, row in enumerate(rows) if row["id"] == report["verdict"]["pick"]), None)
    first = Column("Technique", "how the model is adapted to the rows", number=False)
    return Table(caption, (first, *(measures[k].column for k in kept)), tuple(lines), picked)


def missing(row: Row, of_training: bool = False) -> Cell:
    """The cell of a value that a row lacks, and why. `of_training`: the value would come from training."""
    return Cell(q.MISSING, why=_why_missing(row, of_training))


def _why_missing(row: Row, of_training: bool) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {(row['error'] or {}).get('message') or 'no reason is known'}"
    if row["kind"] == "baseline":
        return "no language model"
    if of_training and row["training"] is None:
        return "nothing is trained"
    if row["kind"] == "base":
        return "does not apply to the plain base"
    return "; ".join(note for note in row["notes"] if note.startswith("not probed")) or "not measured"


def gaps(table: Table) -> list[str]:
    """Why values are missing in the table, one sentence for each reason."""
    found: dict[str, dict[str, None]] = {}
    for line in table.lines:
        for cell in line[1:]:
            if cell.text == q.MISSING and cell.why:
                found.setdefault(cell.why, {})[line[0].text] = None
    return [f"{q.MISSING} for {', '.join(names)}: {why}" for why, names in found.items()]


def _kind(row: Row) -> str:
    if row["status"] != "ok":
        return "failed" if row["status"] == "failed" else "not measured"
    return {"baseline": "no language model", "base": "the plain base"}.get(row["kind"], "")


def summary(report: Report) -> Table:
    """The short table: quality, distance to the best, what running it costs, what training it takes."""
    measures = [_decisive(report), *_against_best(report), _cost(report), _TRAINING_TIME, _PARAMETERS]
    return table_of(report, f"{metric_title(report)} and cost in short", measures, report["rows"])


def compact(report: Report) -> Table:
    """The short table and forgetting, for the terminal."""
    measures = [_decisive(report), *_against_best(report), _cost(report), _TRAINING_TIME, _PARAMETERS, _FORGETTING]
    num_test = report["data"].get("num_test")
    rows = f" on {q.count(num_test)} test rows" if num_test else ""
    return table_of(report, f"{report['name']}: {report['metric']['name']}{rows}", measures, report["rows"])


def quality(report: Report) -> Table:
    """Every metric that was measured with its interval, the deciding one first, and that one for each seed."""
    found = sorted({name for row in report["rows"] for name in row["metrics"]})
    names = sorted(found, key=lambda name: name != report["metric"]["name"])
    measures = [_metric(name) for name in names]
    if any(len(row["per_seed"]) > 1 for row in report["rows"]):
        explained = f"{report['metric']['name']} of each repetition, with other training rows and another start"
        measures.append(Measure(Column("Each seed", explained), _per_seed))
    return table_of(report, "Quality: every metric with its interval", measures, report["rows"])


def training(report: Report) -> Table:
    """What the techniques learn from, what they train and keep, and what that takes."""
    rows = [row for row in report["rows"] if row["kind"] == "technique"]
    return table_of(report, "Training: what it takes and what is kept", _TRAINING, rows)


def serving(report: Report) -> Table:
    """What one request costs beside the plain base, and what else changes for those who run the model."""
    rows = [row for row in report["rows"] if row["kind"] != "baseline"]
    return table_of(report, "Serving: waiting, computation and side effects", _SERVING, rows)


def against_best(report: Report, row: Row) -> Cell | None:
    """`best`, `tie`, or the difference; its interval below."""
    verdict = report["verdict"]
    if row["id"] == verdict["best"]:
        return Cell("best", mark="good")
    found = next((d for d in verdict["differences"] if d["id"] == row["id"]), None)
    if found is None:
        return None
    mean = q.difference(found["mean"])
    interval = "" if found["low"] is None else q.span(found["low"], found["high"], signed=True)
    word = word_for(report, found)
    if found["tie"]:
        note = ", ".join(part for part in (mean, interval) if part)
        return Cell(word, note, mark="tie", brief=f"{word} {mean}")
    return Cell(f"{word} {mean}", interval)


def word_for(report: Report, difference: Mapping[str, Any]) -> str:
    """A difference to the best in one word: tie, worse or better."""
    if difference["tie"]:
        return "tie"
    return "better" if (difference["mean"] > 0) == report["metric"]["higher_is_better"] else "worse"


def scored(score: Mapping[str, float]) -> Cell:
    """A score with its interval below."""
    mean, low, high = (q.score(score[key]) for key in ("mean", "low", "high"))
    return Cell(mean, q.span(score["low"], score["high"]), brief=f"{mean} [{low}, {high}]")


def _decisive(report: Report) -> Measure:
    name, description = report["metric"]["name"], report["metric"]["description"]
    percent = q.number(100 * report["settings"]["confidence"]).removesuffix(".0")
    explained = f"{description}; below it the {percent} % interval, where it may lie on other rows of the same kind"
    return Measure(Column(metric_title(report), explained), _score_named(name))


def _against_best(report: Report) -> list[Measure]:
    if report["verdict"]["best"] is None:
        return []
    explained = "difference to the best language model on the same test rows; a tie is within the noise"
    return [Measure(Column("Against the best", explained), lambda row: against_best(report, row))]


def _cost(report: Report) -> Measure:
    rate = report["settings"]["rate"]
    if rate:
        explained = f"price of this machine's time at {q.money(rate)} an hour; {_MULTIPLE}"
        return Measure(Column("Cost of 1,000 requests", explained), _served("cost_per_1000", q.money))
    explained = f"how long this machine works for them; {_MULTIPLE}"
    column = Column("Time for 1,000 requests", explained)
    return Measure(column, _served("seconds_per_request", lambda seconds: q.duration(1000 * seconds)))


def _metric(name: str) -> Measure:
    return Measure(Column(name, DESCRIPTIONS.get(name, "")), _score_named(name))


def _score_named(name: str) -> Callable[[Row], Cell | None]:
    return lambda row: scored(row["metrics"][name]) if name in row["metrics"] else None


def _per_seed(row: Row) -> Cell | None:
    return Cell(", ".join(q.score(value) for value in row["per_seed"])) if row["per_seed"] else None


def _trained(key: str, written: Callable[[Any], str]) -> Callable[[Row], Cell | None]:
    def cell(row: Row) -> Cell | None:
        value = (row["training"] or {}).get(key)
        return None if value is None else Cell(written(value))

    return cell


def _training_time(row: Row) -> Cell | None:
    training = row["training"]
    if not training or training["seconds"] is None:
        return None
    names = ", ".join(training["shared_with"])
    several = len(training["shared_with"]) > 1
    note = f"one pass with {'others' if several else names}" if names else ""
    return Cell(q.duration(training["seconds"]), note, f"trained in one pass with {names}" if several else "")


def _parameters(row: Row) -> Cell | None:
    if row["kind"] != "technique" or row["num_parameters"] is None:
        return None
    share = row["parameter_share"]
    return Cell(q.count(row["num_parameters"]), f"{q.share(share)} of the base" if share else "")


def _rows_used(row: Row) -> Cell | None:
    used = row["rows_used"]
    return None if used is None else Cell(q.count(used["train"]), f"+ {q.count(used['validation'])}")


def _trains(row: Row) -> Cell | None:
    traits = row["traits"]
    if not traits:
        return None
    return Cell(traits["trains"], "the base stays frozen" if traits["frozen_base"] else "the base itself changes")


def _steps(row: Row) -> Cell | None:
    training = row["training"]
    if not training or training["num_steps"] is None:
        return None
    return Cell(q.count(training["num_steps"]), training["stopped"] or "")


def _kept(row: Row) -> Cell | None:
    return None if row["artifact_bytes"] is None else Cell(q.size(row["artifact_bytes"]))


def _served(key: str, written: Callable[[float], str]) -> Callable[[Row], Cell | None]:
    """A number of the probe; below it the multiple of the plain base's, and the same after merging."""

    def cell(row: Row) -> Cell | None:
        inference = row["inference"]
        if not inference or inference.get(key) is None:
            return None
        own, merged = ((inference.get(name) or {}).get(key) for name in ("ratio", "merged_ratio"))
        parts = [q.ratio(own)] if own is not None and row["kind"] != "base" else []
        parts += [q.tied(f"merged {q.ratio(merged)}")] if merged is not None else []
        return Cell(written(inference[key]), "; ".join(parts), brief=" ".join([written(inference[key]), *parts[:1]]))

    return cell


def _mixed(row: Row) -> Cell | None:
    mixed = row["mixed_batch"]
    if mixed is None:
        return None
    apart = f"apart by {q.number(mixed['max_difference'])} nats"
    return Cell("yes", apart, mark="good") if mixed["passed"] else Cell("no", apart, mark="bad")


def _forgetting(row: Row) -> Cell | None:
    found = row["forgetting"]
    if found is None:
        return None
    return Cell(q.ratio(found["ratio"]), q.tied(f"{q.number(found['before'])} to {q.number(found['after'])}"))


def _measure(header: str, explained: str, cell: Callable[[Row], Cell | None], number: bool = True) -> Measure:
    return Measure(Column(header, explained, number), cell)


def _of_training(header: str, explained: str, cell: Callable[[Row], Cell | None]) -> Measure:
    return Measure(Column(header, explained), cell, of_training=True)


_MULTIPLE = "below it how many times the plain base's, also after merging"
_TRAINING_TIME = _of_training("Training time", "how long one training took on this machine", _training_time)
_PARAMETERS = _of_training("Trained parameters", "how many numbers are trained and kept, and their share", _parameters)
_FORGETTING = _measure(
    "Forgetting", "growth of the perplexity (surprise) on text that is not the task; ×1.00 is none", _forgetting
)
_TRAINING = (
    _measure("Rows", "training rows; below them the validation rows, by which settings are chosen", _rows_used),
    _measure("Trains", "what is trained, and whether the base's own weights stay as they are", _trains, number=False),
    _PARAMETERS,
    _of_training("On disk", "size of what is kept", _kept),
    _TRAINING_TIME,
    _of_training("Tokens", "pieces of text that training went through", _trained("num_tokens", q.count)),
    _of_training("Steps", "updates of the trained parameters; below it what ended them early", _steps),
    _of_training("Learning rate", "how far an update goes", _trained("learning_rate", lambda rate: f"{rate:.3g}")),
    _of_training("Peak memory", "the most memory in use during training", _trained("peak_memory", q.size)),
)
_SERVING = (
    _measure("First token", f"wait until an answer begins; {_MULTIPLE}", _served("time_to_first_token", q.duration)),
    _measure(
        "First token, shared",
        "the same wait when another request came before: what both begin with (shots, virtual tokens) is computed once",
        _served("time_to_first_shared", q.duration),
    ),
    _measure("Each token", "time for every further token (piece of text)", _served("seconds_per_token", q.duration)),
    _measure("Prompt tokens", "what the model reads per request", _served("prompt_tokens", q.number)),
    _measure("Answer tokens", "what it writes per request", _served("completion_tokens", q.number)),
    _measure("Computation", "operations per request", _served("flops_per_request", q.operations)),
    _measure("Each request", "time per request when served together", _served("seconds_per_request", q.duration)),
    _measure(
        "Mixes in a batch",
        "whether its requests, run in one batch with other techniques', got the answers they get alone (tested)",
        _mixed,
    ),
    _FORGETTING,
)
