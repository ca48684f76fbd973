"""Small comparisons for tests: their recipes, and what of their results does not depend on the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tailor.recipes.compare import CompareResult
from tailor.recipes.compare_settings import CompareRecipe
from tailor.techniques import TECHNIQUES

ALL = [name for name, kind in TECHNIQUES.items() if kind.has_defaults()]
SHARING = [name for name in ALL if TECHNIQUES[name].traits.defaults and TECHNIQUES[name].traits.frozen_base]
"""Those that are trained in one pass."""
STEPS = {"num_steps": 6, "batch_size": 4, "eval_every": 3, "learning_rate": 0.01}
CLOCKS = ("seconds", "pass_seconds", "peak_memory")


def recipe(base: Path, rows: Path, *, techniques: list[Any] = ALL, **more: Any) -> CompareRecipe:
    """A comparison called `mine` of techniques by name, or of whole entries."""
    small = {"type": "prompt_tuning", "num_virtual_tokens": 4}
    return CompareRecipe.model_validate(
        {
            "name": "mine",
            "base": str(base),
            "techniques": [small if entry == "prompt_tuning" else entry for entry in techniques],
            "train": STEPS,
            "evaluation": {"sampling": {"max_new_tokens": 4}},
            **more,
            "data": {"train": str(rows), **more.get("data", {})},
        }
    )


def quick(base: Path, rows: Path, **more: Any) -> CompareRecipe:
    """A comparison that leaves out what a test does not look at: baselines, probes, most metrics."""
    short = {"metrics": ["accuracy"], "sampling": {"max_new_tokens": 2}}
    return recipe(base, rows, **{"baselines": False, "save": False, "evaluation": short, **more})


def row_of(result: CompareResult, name: str) -> dict[str, Any]:
    """A line of the report's table, by its technique."""
    return next(row for row in result.report["rows"] if row["name"] == name)


def cells_of(result: CompareResult) -> dict[str, dict[str, Any]]:
    """What was measured, by file name."""
    return {path.name: json.loads(path.read_text()) for path in (result.folder / "cells").glob("*.json")}


def timeless(result: CompareResult) -> Any:
    """Everything that was measured and does not depend on the clock."""
    curves = {curve["id"]: [(p["size"], p["mean"]) for p in curve["points"]] for curve in result.report["curves"]}
    keys = ("id", "status", "metrics", "per_seed", "num_parameters", "rows_used", "artifact", "notes")
    table = [{key: row[key] for key in keys} for row in result.report["rows"]]
    return table, curves, {name: _learned(cell) for name, cell in cells_of(result).items()}


def _learned(cell: dict[str, Any]) -> Any:
    training = {key: value for key, value in (cell["training"] or {}).items() if key not in CLOCKS}
    trials = [{key: value for key, value in trial.items() if key != "seconds"} for trial in cell["trials"]]
    answers = [(o["prompt"], o["completion"], o["scores"]) for o in cell["outcomes"]]
    return cell["settings"], training, trials, answers
