"""The demo: the comparison on the sample tickets, with steps that fit into minutes on two cores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.evaluation.evaluate import EvalSettings, Progress
from tailor.recipes.compare import CompareResult, compare
from tailor.recipes.compare_settings import CompareRecipe, CompareSettings

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "tickets.jsonl"
NAME = "demo"
ANSWER = r"^Queue: (\w+)"
HELD_OUT = 0.25

# Steps that fit the demo's minutes on two cores; everything else is each technique's default.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "prompting": {},
    "prompt_tuning": {"num_steps": 160},
    "lora": {"num_steps": 140},
    "full": {"num_steps": 120},
}


@dataclass(frozen=True)
class Shown:
    """A test ticket with its answers: by the plain base, and by the best technique."""

    ticket: str
    before: str
    after: str


@dataclass(frozen=True)
class Demo:
    """The comparison, and test tickets of different queues to show answers of."""

    result: CompareResult
    best: str | None
    shown: tuple[Shown, ...]


def demo(
    techniques: Sequence[str] = tuple(TECHNIQUES),
    *,
    progress: Progress = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Demo:
    """Tune `tailor-nano` on the sample tickets with every technique and measure each, in a few minutes."""
    recipe = CompareRecipe(
        name=NAME,
        data=CompareSettings(train=str(SAMPLE), test_fraction=HELD_OUT),
        techniques=[{"technique": name, "train": TECHNIQUES[name]} for name in techniques],
        evaluation=EvalSettings(answer_pattern=ANSWER, metrics=("accuracy", "label_accuracy", "rougeL", "perplexity")),
    )
    result = compare(recipe, command="tailor demo", force=True, progress=progress, say=say)
    best = result.report["verdict"]["best"]
    name = next((row["name"] for row in result.report["rows"] if row["id"] == best), None)
    return Demo(result, name, tuple(_shown(result.folder, name, 3)) if name is not None else ())


def _shown(folder: Path, best: str, number: int) -> list[Shown]:
    """The first test tickets of different queues: chosen before anybody looked at the answers."""
    cells = [json.loads(path.read_text("utf-8")) for path in (folder / "cells").glob("*.json")]
    answers = {cell["name"]: cell["outcomes"] for cell in cells if cell["base"] is not None}
    seen: dict[str, int] = {}
    for row, outcome in enumerate(answers["base"]):
        seen.setdefault(outcome["reference"].split("\n")[0], row)
    rows = list(seen.values())[:number]
    return [
        Shown(answers["base"][k]["prompt"], str(answers["base"][k]["completion"]), str(answers[best][k]["completion"]))
        for k in rows
    ]
