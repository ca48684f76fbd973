"""The demo: four techniques on the sample tickets, measured on tickets none of them has seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.data.dataset import DataSettings
from tailor.data.prepare import split
from tailor.data.readers import read_records
from tailor.data.records import Record, completion_of, prompt_of
from tailor.evaluation.evaluate import EvalSettings, Evaluation, evaluate
from tailor.inference.load import load
from tailor.inference.local import LocalBackend
from tailor.recipes.tune import OutputSettings, TuneRecipe, tune
from tailor.runs import home
from tailor.store import write_text
from tailor.training.settings import TrainSettings

SAMPLE = Path(__file__).parents[1] / "data" / "sample" / "tickets.jsonl"
ANSWER = r"^Queue: (\w+)"
HELD_OUT = 0.25

# Steps that fit the demo's three minutes on two cores; everything else is each technique's default.
TECHNIQUES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompting": ({"type": "prompting", "shots": 4}, {}),
    "prompt_tuning": ({"type": "prompt_tuning"}, {"num_steps": 160}),
    "lora": ({"type": "lora"}, {"num_steps": 140}),
    "full": ({"type": "full"}, {"num_steps": 120}),
}


@dataclass(frozen=True)
class DemoRow:
    """One line of the table."""

    name: str
    evaluation: Evaluation
    num_parameters: int
    seconds: float


@dataclass(frozen=True)
class Demo:
    """The table's lines (the base first), and held-out tickets to show answers of."""

    rows: tuple[DemoRow, ...]
    shown: tuple[int, ...]
    data: Path
    held_out: Path

    @property
    def best(self) -> DemoRow:
        """The line with the highest accuracy."""
        return max(self.rows, key=lambda row: row.evaluation.metrics["accuracy"].mean)


def demo(say: Callable[[str], None], *, techniques: Sequence[str] = tuple(TECHNIQUES), quiet: bool = False) -> Demo:
    """Tune `tailor-nano` on the sample tickets with every technique and measure each, in about three minutes."""
    parts = split(read_records(SAMPLE).records, validation_fraction=HELD_OUT, seed=0)
    folder = home() / "demo"
    data, held_out = folder / "tickets.jsonl", folder / "held-out.jsonl"
    _write(data, parts.train)
    _write(held_out, parts.validation)
    say(
        f"{len(parts.train)} tickets to learn from, {len(parts.validation)} held out; base tailor-nano (7 M parameters)"
    )
    settings = EvalSettings(answer_pattern=ANSWER, metrics=("accuracy", "label_accuracy", "rougeL", "perplexity"))
    base = load("tailor-nano")
    rows = [DemoRow("base", evaluate(base.backend, None, parts.validation, settings=settings), 0, 0.0)]
    for name in techniques:
        started = time.perf_counter()
        technique, train = TECHNIQUES[name]
        recipe = TuneRecipe(
            data=DataSettings(train=str(data)),
            technique=technique,
            train=TrainSettings(**train),
            output=OutputSettings(name=f"demo-{name.replace('_', '-')}", force=True),
        )
        result = tune(recipe, quiet=quiet)
        seconds = time.perf_counter() - started
        own = LocalBackend(result.base, {result.artifact.name: result.slot})
        evaluation = evaluate(own, result.artifact.name, parts.validation, settings=settings)
        rows.append(DemoRow(name, evaluation, result.slot.num_parameters, seconds))
    return Demo(tuple(rows), _shown(rows, 3), data, held_out)


def _shown(rows: Sequence[DemoRow], number: int) -> tuple[int, ...]:
    """The first held-out tickets of different queues: chosen before anybody looked at the answers."""
    seen: dict[str, int] = {}
    for k, row in enumerate(rows[0].evaluation.rows):
        seen.setdefault(row.reference.split("\n")[0], k)
    return tuple(seen.values())[:number]


def _write(path: Path, records: Sequence[Record]) -> None:
    import json

    lines = [{"prompt": prompt_of(r)[-1].content, "completion": completion_of(r)} for r in records]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
