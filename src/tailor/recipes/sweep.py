"""Sweep: the settings that suit these rows best, searched with Optuna, many trials in one pass of one base."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailor.artifacts import artifact as artifacts
from tailor.config import dump_yaml, load_recipe
from tailor.data.dataset import load_dataset
from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError, TailorError, nearest
from tailor.evaluation.drawing.sweep_page import render_sweep, settings_of
from tailor.evaluation.evaluate import Progress
from tailor.machine import describe_machine
from tailor.models.base import Base, dtype_name, load_base
from tailor.objectives import check_consumed, find_objective
from tailor.recipes.sweep_report import build_report
from tailor.recipes.sweep_settings import SweepRecipe
from tailor.recipes.sweep_study import JOURNAL, TrialStudy
from tailor.recipes.sweep_train import PASS, Sweep, Trial, next_pass, save_best, train_pass
from tailor.recipes.tune_prepare import Rows
from tailor.runs import check_run_name, hold, home, versions
from tailor.store import write_json, write_text
from tailor.techniques.soft_prompt import templates_of

MAY_CHANGE = ("num_trials", "in_parallel", "save")
"""Settings with which a sweep may be gone on with in another way than it was begun."""


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its report as a dict, and the folder with report.json, report.html and best.yaml."""

    report: dict[str, Any]
    folder: Path

    @property
    def best_recipe(self) -> Path | None:
        """The recipe that repeats the best trial with `tailor tune`; None when every trial failed."""
        return self.folder / "best.yaml" if self.report["best"] is not None else None

    def check(self) -> None:
        """Raise TailorError when every trial failed: there is a report, but nothing to choose."""
        if self.report["best"] is None:
            first = next((trial["error"]["message"] for trial in self.report["trials"] if trial["error"]), "")
            raise TailorError(
                f"none of {len(self.report['trials'])} trials came to its end" + (f": {first}" if first else ""),
                hint=f"the report says why: {self.folder / 'report.html'}; --force starts anew",
            )


def sweep(
    recipe: SweepRecipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    command: str = "",
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> SweepResult:
    """Search a recipe's space on its validation rows. The same recipe again goes on where it stopped.

    A larger `num_trials` goes on with a finished one; `force` starts anew. Raises ConfigError, DataError,
    MissingDependencyError without Optuna, and ConflictError when another sweep, or an artifact of somebody else, has
    the name, or when its rows, base, device or precision are not those it began with.
    """
    if not isinstance(recipe, SweepRecipe):
        recipe = load_recipe(recipe, SweepRecipe, overrides).recipe
    elif overrides:
        raise ConfigError("overrides go with the path of a recipe; change a SweepRecipe with model_copy(update=…)")
    recipe = recipe.absolute()
    folder = folder_of(recipe.name)
    with hold(folder, f"sweep {recipe.name}"):
        manifest = _open(recipe, folder, command, force)
        torch.set_num_threads(int(manifest["machine"]["num_threads"]))  # sums are rounded by how they are cut up
        rows = _rows(recipe, progress)
        manifest["data"] = _described(recipe, rows, manifest.get("data"))
        under_way = Sweep(recipe, folder, rows, TrialStudy(folder, recipe), progress, say)
        write_text(folder / "recipe.yaml", dump_yaml(recipe.model_dump(mode="json")))
        write_json(folder / "sweep.json", manifest)
        try:
            _search(under_way, manifest)
        except BaseException:
            write_json(folder / "sweep.json", {**manifest, "status": "interrupted"})
            raise
        manifest["status"] = "finished"
        result = _report(under_way, manifest)
        write_json(folder / "sweep.json", manifest)  # last: whoever is finished has a report
        return result


def folder_of(name: str) -> Path:
    """Where a sweep lives. Raises ConfigError for what cannot be a folder's name."""
    return home() / "sweeps" / check_run_name(name)


def resume_sweep(name: str, **options: Any) -> SweepResult:
    """Go on with an interrupted sweep. Raises NotFoundError."""
    folder = folder_of(name)
    if not (folder / "recipe.yaml").is_file():
        raise NotFoundError(f"there is no sweep {name!r}", hint=nearest(name, known()))
    return sweep(load_recipe(folder / "recipe.yaml", SweepRecipe).recipe, **options)


def known() -> list[str]:
    """The names of all sweeps."""
    return sorted(path.parent.name for path in (home() / "sweeps").glob("*/sweep.json"))


def _open(recipe: SweepRecipe, folder: Path, command: str, force: bool) -> dict[str, Any]:
    """The manifest of a new sweep, or of the one that is gone on with."""
    path = folder / "sweep.json"
    if path.is_file() and not force:
        before = load_recipe(folder / "recipe.yaml", SweepRecipe).recipe.model_dump(mode="json")
        now = recipe.model_dump(mode="json")
        if changed := [key for key in now if now[key] != before[key] and key not in MAY_CHANGE]:
            raise ConflictError(
                f"there is a sweep {recipe.name!r} with other settings: {', '.join(changed)} ({folder})",
                hint="choose another --name, or use --force to replace it",
            )
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return {**manifest, "status": "running"}
    if recipe.save and not artifacts.made_by(recipe.name, f"sweep {recipe.name}"):
        artifacts.check_free(artifacts.check_name(recipe.name), force)
    path.unlink(missing_ok=True)  # first: without a manifest the next start begins anew as well
    for name in (JOURNAL, "best.yaml", "report.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / PASS, ignore_errors=True)
    return {
        "name": recipe.name,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "status": "running",
        "command": command or f"tailor sweep {folder / 'recipe.yaml'}",
        "versions": versions(),
        "machine": {**describe_machine(), "num_threads": torch.get_num_threads()},
    }


def _rows(recipe: SweepRecipe, progress: Progress) -> Rows:
    """The rows that every trial learns from and is judged by."""
    objective = find_objective(recipe.objective)
    dataset = load_dataset(recipe.data, recipe.train.seed, progress, templates_of(recipe.technique or ()))
    check_consumed(objective, dataset.train, dataset.validation)
    if not dataset.validation:
        raise DataError("there are no validation rows to judge trials by", hint="more rows, or give data.validation")
    return Rows(dataset, objective)


def _described(recipe: SweepRecipe, rows: Rows, before: dict[str, Any] | None) -> dict[str, Any]:
    digest = rows.dataset.content_hash
    if before is not None and before["content_hash"] != digest:
        raise ConflictError(
            f"the rows of sweep {recipe.name!r} have changed since it began",
            hint="restore them, or start anew with --force",
        )
    sides = {"num_train": len(rows.dataset.train), "num_validation": len(rows.dataset.validation)}
    return {"train": recipe.data.train, "content_hash": digest, **sides, "notes": list(rows.dataset.notes)}


def _search(under_way: Sweep, manifest: dict[str, Any]) -> None:
    """Pass after pass until every trial is finished; the base is loaded when there is something left to train."""
    base: Base | None = None
    while numbers := next_pass(under_way):
        if base is None:
            base = _load(under_way, manifest)
        train_pass(under_way, base, numbers, lambda trial: _keep(under_way, trial))
        report = _report(under_way, manifest).report
        for number in numbers:
            under_way.say(_line(report, number))


def _load(under_way: Sweep, manifest: dict[str, Any]) -> Base:
    """The base. Raises ConflictError when it is not the one that the sweep began with."""
    settings = under_way.recipe.base
    base = load_base(settings.name, settings.device, settings.dtype, settings.quantize)
    facts = {
        "fingerprint": base.fingerprint,
        "device": base.device.type,
        "dtype": dtype_name(base.dtype),
        "quantize": base.quantize,
    }
    was = manifest.setdefault("base", facts)
    if changed := [f"{key} was {was.get(key)}, is {value}" for key, value in facts.items() if was.get(key) != value]:
        raise ConflictError(
            f"base {settings.name} is not what it was when the sweep began ({', '.join(changed)})",
            hint="restore it, or start anew with --force",
        )
    write_json(under_way.folder / "sweep.json", manifest)
    return base


def _keep(under_way: Sweep, trial: Trial) -> None:
    """Write the best trial down: as a recipe, and its weights as an artifact."""
    write_text(under_way.folder / "best.yaml", dump_yaml(trial.recipe.model_dump(mode="json")))
    if under_way.recipe.save:
        save_best(under_way, trial)


def _line(report: dict[str, Any], number: int) -> str:
    """What is said of a trial when its pass is over."""
    trial = report["trials"][number]
    loss = trial["validation_loss"]
    came = trial["state"] if loss is None else f"validation loss {loss:.4f}"
    best = report["best"] is not None and report["best"]["number"] == number
    return f"trial {number}: {settings_of(report, trial)}: {came}{' (best so far)' if best else ''}"


def _report(under_way: Sweep, manifest: dict[str, Any]) -> SweepResult:
    report = build_report(manifest, under_way.recipe, under_way.study)
    write_json(under_way.folder / "report.json", report)
    write_text(under_way.folder / "report.html", render_sweep(report))
    return SweepResult(report, under_way.folder)
