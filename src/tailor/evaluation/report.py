"""Evaluations, parity records and lists of runs as tables for people and as plain dicts for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tailor.evaluation.evaluate import Evaluation
from tailor.evaluation.parity import Parity
from tailor.evaluation.scores import METRICS
from tailor.metrics.bootstrap import Interval

Runs = Sequence[Mapping[str, Any]]
"""One mapping per run; nested mappings become columns of their own, intervals one cell."""


def render(thing: Evaluation | Parity | Runs) -> RenderableType:
    """What to print: a table, with its notes under it."""
    if isinstance(thing, Evaluation):
        return _evaluation(thing)
    if isinstance(thing, Parity):
        return _parity(thing)
    return _runs(thing)


def as_dict(thing: Evaluation | Parity | Runs) -> dict[str, Any]:
    """The same as JSON knows it."""
    if isinstance(thing, Evaluation | Parity):
        return thing.to_dict()
    return {"runs": [_plain(run) for run in thing]}


def _evaluation(evaluation: Evaluation) -> RenderableType:
    title = f"{evaluation.artifact or 'base'} on {evaluation.num_rows} rows"
    table = _table(title, ["metric"], ["score", "interval"])
    for name, score in evaluation.metrics.items():
        table.add_row(_header(name), _number(score.mean), f"{_number(score.low)} to {_number(score.high)}")
    return Group(table, *(Text(line) for line in (evaluation.reason, *evaluation.notes)))


def _parity(parity: Parity) -> RenderableType:
    table = _table("token logprobs against the trainer's", ["hop"], ["largest difference", "mean", "passed"])
    for hop in parity.hops:
        row = [hop.name, f"{hop.max_difference:.1e}", f"{hop.mean_difference:.1e}", "yes" if hop.passed else "NO"]
        table.add_row(*row, style=None if hop.passed else "red")
    summary = (
        f"{parity.num_tokens} tokens in {parity.num_rows} rows; noise floor {parity.noise_floor:.1e}, "
        f"gate {parity.gate:.1e}"
    )
    notes = [f"{hop.name}: {hop.note}" for hop in parity.hops if not hop.passed]
    return Group(table, *(Text(line) for line in (summary, *notes)))


def _runs(runs: Runs) -> Table:
    flat = [dict(_flat(run)) for run in runs]
    columns = list(dict.fromkeys(key for run in flat for key in run))
    texts = [c for c in columns if all(isinstance(run.get(c), str | None) for run in flat)]
    table = _table(None, texts, [])
    table.columns.clear()
    for column in columns:
        table.add_column(_header(column), justify="left" if column in texts else "right")
    for run in flat:
        table.add_row(*(_cell(run.get(column)) for column in columns))
    return table


def _table(title: str | None, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _flat(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in run.items():
        if isinstance(value, Mapping) and not _is_interval(value):
            yield from _flat(value)
        else:
            yield key, value


def _is_interval(value: Mapping[str, Any]) -> bool:
    return {"mean", "low", "high"} <= value.keys()


def _header(name: str) -> str:
    return f"{name} (lower is better)" if name in METRICS and not METRICS[name].higher_is_better else name


def _cell(value: Any) -> str:
    if isinstance(value, Interval):
        value = {"mean": value.mean, "low": value.low, "high": value.high}
    if isinstance(value, Mapping):
        return f"{_number(value['mean'])} [{_number(value['low'])}, {_number(value['high'])}]"
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Three decimals for shares, one for scores up to 100, three digits beyond."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 10_000 else f"{value:.2e}"


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
