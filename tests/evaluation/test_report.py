from __future__ import annotations

import io
import json
import math
from typing import Any

from rich.console import Console

from tailor.evaluation.evaluate import Evaluation, RowResult
from tailor.evaluation.parity import Hop, Parity
from tailor.evaluation.report import as_dict, render
from tailor.metrics.bootstrap import Interval


def text(thing: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=160, color_system=None).print(render(thing))
    return stream.getvalue()


ROW = RowResult("d.jsonl:1", "p", "r", "c", "c", {"accuracy": 1.0}, "stop")


def test_an_evaluation_shows_scores_intervals_reason_and_notes() -> None:
    metrics = {"accuracy": Interval(0.5, 0.25, 0.75, 1), "perplexity": Interval(31.42, 20.0, 40.0, 1)}
    found = Evaluation("mine", "labels", "labels: they repeat [sic]", metrics, [ROW], ["a note"])
    shown = text(found)
    for part in ("mine on 1 rows", "0.500", "0.250 to 0.750", "31.4", "lower is better", "they repeat [sic]", "a note"):
        assert part in shown
    assert as_dict(found) == found.to_dict()


def test_a_parity_record_shows_what_failed_and_where() -> None:
    good, bad = (
        Hop("cached generation", 1e-6, 1e-7, True, "fine"),
        Hop("merged", math.inf, math.inf, False, "token 3 of d:1"),
    )
    shown = text(Parity((good, bad), 2e-6, 1e-4, 4, 40))
    for part in ("cached generation", "NO", "merged: token 3 of d:1", "noise floor 2.0e-06", "gate 1.0e-04"):
        assert part in shown
    assert "fine" not in shown


def test_runs_become_one_table() -> None:
    runs: list[dict[str, Any]] = [
        {"name": "base", "metrics": {"accuracy": Interval(0.1, 0.0, 0.2, 9)}},
        {
            "name": "lora",
            "parameters": 12345,
            "merges": True,
            "metrics": {"accuracy": {"mean": 0.9, "low": 0.8, "high": 1.0}},
        },
    ]
    shown = text(runs)
    for part in ("0.100 [0.000, 0.200]", "12,345", "yes", "0.900 [0.800, 1.000]", "–"):
        assert part in shown
    plain = json.loads(json.dumps(as_dict(runs)))
    assert plain["runs"][0]["metrics"]["accuracy"] == {"mean": 0.1, "low": 0.0, "high": 0.2, "n": 9}
