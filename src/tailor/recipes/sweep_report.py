"""The report of a sweep as a dict: every trial, the best one, and what mattered. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tailor.config import Strict
from tailor.recipes.sweep_settings import SweepRecipe
from tailor.recipes.sweep_study import MIN_IMPORTANCE_TRIALS, TENTHS, TrialStudy

SCHEMA_VERSION = 1


def build_report(manifest: Mapping[str, Any], recipe: SweepRecipe, study: TrialStudy) -> dict[str, Any]:
    """What report.json holds. Shares of importance sum to 1; `history` is the best loss so far, by trial."""
    trials = [_trial(study, number) for number in range(len(study.all()))]
    best = study.best()
    importance = study.importance()
    return {
        "schema_version": SCHEMA_VERSION,
        **{key: manifest[key] for key in ("name", "created", "status", "command", "data", "machine", "versions")},
        "recipe": recipe.model_dump(mode="json"),
        "metric": "validation_loss",
        "space": {key: _told(space) for key, space in recipe.space.spaces.items()},
        "techniques": [one.title for one in recipe.space.alternatives],
        "trials": trials,
        "num_trials": recipe.num_trials,
        "best": None if best is None else trials[best.number],
        "artifact": recipe.name if recipe.save and best is not None else None,
        "history": _history(trials),
        "importance": importance,
        "importance_note": None
        if importance
        else f"importance takes {MIN_IMPORTANCE_TRIALS} finished trials with different losses",
    }


def _trial(study: TrialStudy, number: int) -> dict[str, Any]:
    """One trial. Its learning curve is by tenths of its steps; a pruned one has its last loss as `last_loss` only."""
    frozen = study.all()[number]
    title, values = study.values(number) if frozen.params or frozen.state.is_finished() else (None, {})
    facts = dict(frozen.user_attrs)
    state = study.state(number)
    curve = sorted(frozen.intermediate_values.items())
    return {
        "number": number,
        "state": {"fail": "failed"}.get(state, state),
        "technique": title,
        "values": {key: _plain(value) for key, value in values.items()},
        "validation_loss": frozen.value if state == "complete" else None,
        "last_loss": curve[-1][1] if curve else None,
        "curve": [[tenth / TENTHS, loss] for tenth, loss in curve],
        "recipe": facts.get("recipe"),
        "learning_rate": ((facts.get("recipe") or {}).get("train") or {}).get("learning_rate"),
        **{key: facts.get(key) for key in ("num_parameters", "num_steps", "num_tokens", "best_step", "stopped")},
        "error": facts.get("error"),
    }


def _history(trials: list[dict[str, Any]]) -> list[list[float]]:
    """(trial, best loss until then) for every finished trial."""
    found: list[list[float]] = []
    for trial in trials:
        if (loss := trial["validation_loss"]) is not None:
            found.append([trial["number"], min(loss, found[-1][1]) if found else loss])
    return found


def _told(space: Any) -> Any:
    return space.model_dump(mode="json") if isinstance(space, Strict) else [_plain(value) for value in space]


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Strict) else value
