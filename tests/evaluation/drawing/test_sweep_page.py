"""The page of a sweep: well-formed, self-contained, every trial on it; what is foreign in it is text."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from tailor.evaluation.drawing.plot import Frame
from tailor.evaluation.drawing.sweep_charts import Weight, importances
from tailor.evaluation.drawing.sweep_page import render_sweep, trials_table

SVG = "{http://www.w3.org/2000/svg}"


def trial(number: int, state: str, loss: float | None, technique: str = "lora", **values: Any) -> dict[str, Any]:
    return {
        "number": number,
        "state": state,
        "technique": technique,
        "values": values or {"lora.train.learning_rate": 0.5, "lora.rank": 8},
        "validation_loss": loss if state == "complete" else None,
        "last_loss": loss,
        "curve": [],
        "recipe": {"train": {"learning_rate": 0.0015, "batch_size": 8, "num_steps": 20}},
        "num_parameters": 1024,
        "num_steps": None if state == "failed" else 20,
        "error": {"message": "target '<b>' matches nothing"} if state == "failed" else None,
    }


def report(trials: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    complete = [one for one in trials if one["state"] == "complete"]
    losses = [one["validation_loss"] for one in complete]
    return {
        "name": "tickets & <more>",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "tailor sweep rows.jsonl",
        "data": {"num_train": 90, "num_validation": 10, "notes": ["a note"]},
        "machine": {"system": "Linux", "cpu": "some"},
        "versions": {"python": "3"},
        "recipe": {"base": {"name": "tailor-nano"}, "pruner": {"type": "median"}, "in_parallel": 4},
        "space": {
            "lora.train.learning_rate": {"low": 0.3, "high": 3.0, "log": True, "relative": True},
            "lora.rank": [4, 8],
        },
        "techniques": ["lora", "ia3"],
        "trials": trials,
        "num_trials": len(trials),
        "best": min(complete, key=lambda one: one["validation_loss"], default=None),
        "artifact": "tickets",
        "history": [[one["number"], min(losses[: k + 1])] for k, one in enumerate(complete)],
        "importance": {"lora.rank": 0.25, "lora.train.learning_rate": 0.75},
        "importance_note": None,
        **more,
    }


MIXED = [
    trial(0, "complete", 2.0),
    trial(1, "pruned", 3.0, "ia3", **{"lora.rank": 4}),
    trial(2, "complete", 1.5),
    trial(3, "failed", None),
    trial(4, "complete", 1.75),
]


def drawings(html: str) -> dict[str, ElementTree.Element]:
    found = [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    return {(one.find(f"{SVG}title").attrib["id"]).removesuffix("-title"): one for one in found}  # type: ignore[union-attr]


def test_every_trial_is_drawn_where_its_loss_is() -> None:
    html = render_sweep(report(MIXED))
    found = drawings(html)
    assert set(found) == {"history-wide", "history-narrow", "importance-wide", "importance-narrow"}
    history = found["history-wide"]
    told = [one.text or "" for one in history.iter(f"{SVG}title")]
    assert [text for text in told if text.startswith("trial")] == [
        "trial 0, lora, learning_rate ×0.5, rank 8: 2.00",
        "trial 1, ia3, rank 4: 3.00",
        "trial 2, lora, learning_rate ×0.5, rank 8: 1.50",
        "trial 4, lora, learning_rate ×0.5, rank 8: 1.75",
    ]
    rings = [one for one in history.iter() if one.get("class") == "ring"]
    assert len(rings) == 1
    line = next(one for one in history.iter() if one.get("class") == "line dashed")
    places = [tuple(map(float, place.split(","))) for place in line.attrib["d"][1:].split("L")]
    heights = [y for _, y in places]
    assert heights == sorted(heights)  # the best so far only goes down the losses, that is down the page
    assert (float(rings[0].attrib["cx"]), float(rings[0].attrib["cy"])) == pytest.approx(places[2], abs=0.11)


def test_bars_are_as_long_as_their_shares() -> None:
    drawn = ElementTree.fromstring(
        importances(Frame("x", "t", "d", 860), [Weight("rate", 0.6), Weight("rank", 0.3), Weight("none", 0.0)])
    )
    widths = [float(one.attrib["width"]) for one in drawn.iter(f"{SVG}rect")]
    assert math.isclose(widths[0], 2 * widths[1], rel_tol=0.01)
    assert widths[2] == 1


def test_trials_stand_in_the_order_of_their_losses() -> None:
    table = trials_table(report(MIXED))
    assert [line[0].text for line in table.lines] == ["2", "4", "0", "1", "3"]
    assert table.picked == 0
    assert [line[0].note for line in table.lines] == ["", "", "", "given up", "failed"]


def test_the_page_is_alone_and_escapes_what_it_is_given() -> None:
    html = render_sweep(report(MIXED))
    assert "<more>" not in html
    assert "&lt;b&gt;" in html
    assert "<script" not in html
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', html)) == {"data:,", "best.yaml", "report.json"}
    assert "1 of 5 trials given up early." in html
    assert re.search(r"<title>[^<]*1\.50?, the lowest of 5 trials", html)


@pytest.mark.parametrize("trials", [[], [trial(0, "failed", None)], [trial(0, "complete", 1.0)]])
def test_a_page_of_little(trials: list[dict[str, Any]]) -> None:
    html = render_sweep(report(trials, importance={}, importance_note="too few"))
    assert "too few" in html
    assert len(drawings(html)) == (2 if trials and trials[0]["state"] == "complete" else 0)
