"""The measurements of a comparison, one cell after the other; what is on disk already is not measured again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tailor.artifacts import artifact as artifacts
from tailor.data.records import prompt_of
from tailor.evaluation.baselines import BASELINES
from tailor.evaluation.evaluate import evaluate, evaluate_answers
from tailor.evaluation.scores import METRICS
from tailor.inference.local import LocalBackend
from tailor.models.base import Base
from tailor.models.files import is_hosted
from tailor.recipes.compare_bases import LoadedBase
from tailor.recipes.compare_cells import (
    Cell,
    Choice,
    Comparison,
    Trial,
    attach_trials,
    choices,
    failed,
    measured,
    takes_its_row,
)
from tailor.recipes.compare_groups import groups_of, split_off
from tailor.recipes.compare_hosted import measure_hosted
from tailor.recipes.compare_rows import Draw
from tailor.recipes.compare_settings import Entry
from tailor.recipes.compare_train import forget, train_together


def measure(comparison: Comparison) -> None:
    """Fill in every missing cell: baselines, then each base, plain and customized, from few rows to many."""
    recipe = comparison.recipe
    draws = [(size, seed) for size in comparison.sizes for seed in range(recipe.seeds)]
    if recipe.baselines:
        for size, seed in draws:
            _baselines(comparison, size, seed)
    for settings in recipe.base:
        if is_hosted(settings.name):
            measure_hosted(comparison, settings.name, draws)
            continue
        loaded = LoadedBase(settings, comparison.folder)
        _plain(comparison, loaded)
        for size, seed in draws:
            if _entries(comparison, loaded, size, seed):  # else the checkpoints are those of a draw to come
                forget(comparison)
        loaded.drop()


def _baselines(comparison: Comparison, size: int, seed: int) -> None:
    draw = comparison.rows.draw(size, seed)
    metrics = tuple(name for name in comparison.settings.metrics if METRICS[name].needs == "completions")
    if not metrics:
        return  # all that is measured asks a model
    settings = comparison.settings.model_copy(update={"metrics": metrics})
    for name, baseline in BASELINES.items():
        cell = comparison.cell(None, name, size, seed)
        if not baseline.applies(comparison.kind) or not comparison.is_missing(cell):
            continue
        comparison.progress("baselines", comparison.sizes.index(size) + 1, len(comparison.sizes))
        facts: dict[str, Any] = {"rows": {"train": len(draw.train), "validation": 0}}
        try:
            prompts = [prompt_of(record) for record in comparison.rows.test]
            answers = baseline.answers(draw.train, prompts, comparison.settings.answer_pattern)
            facts |= measured(
                evaluate_answers(answers, comparison.rows.test, settings=settings, labels=comparison.labels, name=name)
            )
        except Exception as error:
            if not takes_its_row(error):
                raise
            facts |= failed(error)
        cell.write(comparison.folder, "baseline", facts)


def _plain(comparison: Comparison, loaded: LoadedBase) -> None:
    """The base as it is: it learns from nothing, so it is measured once."""
    cell = comparison.cell(loaded.settings.name, "base", comparison.sizes[-1], 0)
    if not comparison.is_missing(cell):
        return
    base = loaded.get()
    facts: dict[str, Any] = {"rows": {"train": 0, "validation": 0}, "base_parameters": base.num_parameters}
    try:
        facts |= _answers(comparison, LocalBackend(base), None, cell.key)
    except Exception as error:
        if not takes_its_row(error):
            raise
        facts |= failed(error)
    cell.write(comparison.folder, "base", facts)


def _answers(comparison: Comparison, backend: LocalBackend, name: str | None, key: str) -> dict[str, Any]:
    def tell(stage: str, done: int, total: int) -> None:
        comparison.progress(f"{key}: {stage}", done, total)

    evaluation = evaluate(
        backend, name, comparison.rows.test, settings=comparison.settings, labels=comparison.labels, progress=tell
    )
    return measured(evaluation)


def _entries(comparison: Comparison, loaded: LoadedBase, size: int, seed: int) -> bool:
    """All entries of one draw: those that freeze the base in shared passes, the others each on a copy of its own.

    Returns whether any was missing.
    """
    draw = comparison.rows.draw(size, seed)
    cell = partial(comparison.cell, loaded.settings.name, size=size, seed=seed)
    missing = [e.title for e in comparison.recipe.techniques if comparison.is_missing(cell(name=e.title))]
    sharing = [entry for entry in comparison.recipe.techniques if not entry.owns_base]
    if any(entry.title in missing for entry in sharing):
        place = cell(name="")
        for group in groups_of(comparison, loaded, sharing, draw, place.key):
            _group(comparison, loaded, group, draw, place)
    for entry in comparison.recipe.techniques:
        if entry.owns_base and entry.title in missing:
            _owner(comparison, loaded, entry, draw, cell(name=entry.title))
    return bool(missing)


def _group(comparison: Comparison, loaded: LoadedBase, entries: Sequence[Entry], draw: Draw, place: Cell) -> None:
    """Train entries in one pass and measure each. What goes wrong for all together is tried again one by one."""
    alone = _pass(comparison, loaded, entries, draw, place)
    for entry in alone:
        split_off(comparison.folder, place.key, [entry.title])
    for entry in alone:
        _pass(comparison, loaded, [entry], draw, place)


def _pass(comparison: Comparison, loaded: LoadedBase, entries: Sequence[Entry], draw: Draw, place: Cell) -> list[Entry]:
    """Train entries together and measure them; returns those that must be tried alone: their common pass failed.

    Whoever is measured already takes part as long as others are missing: a pass that was interrupted between two
    measurements is the same pass again.
    """
    cells = {entry.title: place.of(entry.title) for entry in entries}
    if not any(comparison.is_missing(cell) for cell in cells.values()):
        return []
    base = loaded.get()
    trials: list[Trial] = []
    try:
        for entry in entries:
            trials += _attached(comparison, base, entry, draw, cells[entry.title])
        together = [entry for entry in entries if any(trial.entry is entry for trial in trials)]
        try:
            train_together(comparison, base, trials, cells.values(), _stage(trials, place))
        except Exception as error:
            if len(together) > 1 and takes_its_row(error):
                return together
            _give_up(comparison, cells[together[0].title], base, together[0], draw, error)
            return []
        for entry in together:
            own = [trial for trial in trials if trial.entry is entry]
            told = [trial.told() for trial in own]
            _measure(comparison, base, min(own, key=lambda t: t.rank), told, draw, cells[entry.title])
        return []
    finally:
        for trial in trials:
            base.host.detach(trial.slot)


def _attached(comparison: Comparison, base: Base, entry: Entry, draw: Draw, cell: Cell) -> list[Trial]:
    try:
        return attach_trials(comparison, base, entry, choices(entry, comparison.recipe), draw, cell.seed)
    except Exception as error:
        _give_up(comparison, cell, base, entry, draw, error)
        return []


def _stage(trials: Sequence[Trial], place: Cell) -> str:
    """What a pass is called in progress lines."""
    titles = dict.fromkeys(trial.entry.title for trial in trials if trial.run is not None)
    return f"{place.base}: {', '.join(titles)} ({place.size} rows, seed {place.seed})"


def _owner(comparison: Comparison, loaded: LoadedBase, entry: Entry, draw: Draw, cell: Cell) -> None:
    """An entry that changes the base: every trial on a copy of its own, one at a time, and then the best one again."""
    told: list[dict[str, Any]] = []
    ranks: list[tuple[bool, float]] = []
    trial: Trial | None = None
    base: Base | None = None
    chosen = choices(entry, comparison.recipe)
    try:
        for choice in chosen:
            trial = base = None
            loaded.drop()  # two copies of a large base may not fit
            base = loaded.fresh()
            trial = _alone(comparison, base, entry, choice, draw, cell)
            told.append(trial.told())
            ranks.append(trial.rank)
        best = ranks.index(min(ranks))
        if best != len(chosen) - 1:
            trial = base = None
            loaded.drop()
            base = loaded.fresh()
            trial = _alone(comparison, base, entry, chosen[best], draw, cell)  # from its checkpoint, without a step
    except Exception as error:
        _give_up(comparison, cell, base, entry, draw, error)
        return
    assert base is not None
    assert trial is not None
    _measure(comparison, base, trial, told, draw, cell)


def _alone(comparison: Comparison, base: Base, entry: Entry, choice: Choice, draw: Draw, cell: Cell) -> Trial:
    (trial,) = attach_trials(comparison, base, entry, [choice], draw, cell.seed)
    train_together(comparison, base, [trial], [cell], _stage([trial], cell))
    return trial


def _give_up(
    comparison: Comparison, cell: Cell, base: Base | None, entry: Entry, draw: Draw, error: BaseException
) -> None:
    if not takes_its_row(error):
        raise error
    if not comparison.is_missing(cell):
        return
    comparison.say(f"{cell.key}: {error}")
    cell.write(comparison.folder, "technique", {**_described(base, entry, draw), **failed(error)})


def _described(base: Base | None, entry: Entry, draw: Draw, trial: Trial | None = None) -> dict[str, Any]:
    techniques = trial.settings if trial is not None else entry.technique
    traits = [technique.traits for technique in techniques]
    return {
        "settings": [technique.model_dump(mode="json") for technique in techniques],
        "traits": {
            "trains": ", ".join(t.trains for t in traits),
            "where": ", ".join(t.where for t in traits),
            **{name: all(getattr(t, name) for t in traits) for name in ("frozen_base", "merges", "mixes", "peft")},
        },
        "num_parameters": trial.slot.num_parameters + trial.slot.num_dropped if trial is not None else 0,
        "base_parameters": base.num_parameters if base is not None else None,
        "rows": {"train": len(draw.train), "validation": len(draw.validation)},
        "notes": list(trial.notes) if trial is not None else [],
    }


def _measure(
    comparison: Comparison, base: Base, best: Trial, told: Sequence[dict[str, Any]], draw: Draw, cell: Cell
) -> None:
    """Answer the test rows with the trial that was chosen on validation, keep it if it is a main one."""
    if not comparison.is_missing(cell):
        return
    facts = _described(base, best.entry, draw, best)
    if len(told) > 1:
        facts["trials"] = [{**trial, "chosen": trial["label"] == best.label} for trial in told]
    try:
        if best.error is not None:
            raise best.error
        backend = LocalBackend(base, {cell.name: best.slot})
        facts |= {"training": best.training, **_answers(comparison, backend, cell.name, cell.key)}
        if cell.main and comparison.recipe.save:
            facts |= _keep(comparison, base, best, cell)
    except Exception as error:
        if not takes_its_row(error):
            raise
        comparison.say(f"{cell.key}: {error}")
        facts |= failed(error)
    cell.write(comparison.folder, "technique", facts)


def _keep(comparison: Comparison, base: Base, trial: Trial, cell: Cell) -> dict[str, Any]:
    """Save the customization under the comparison's name, with a recipe that repeats it."""
    recipe = comparison.recipe
    name = recipe.artifact_name(base.name, cell.name)
    data = comparison.folder / "data"
    train = trial.trained_with or recipe.train_of(trial.entry)
    tuned = {
        "base": next(b for b in recipe.base if b.name == base.name).model_dump(mode="json"),
        "data": {
            "train": str(data / "train.jsonl"),
            "validation": str(data / "validation.jsonl"),
            "max_seq_len": recipe.data.max_seq_len,
            "truncation": recipe.data.truncation,
            "trained_turns": recipe.data.trained_turns,
        },
        "technique": [technique.model_dump(mode="json") for technique in trial.techniques],
        "objective": recipe.objective,
        "train": train.model_dump(mode="json"),
        "output": {"name": name},
    }
    facts = {
        "recipe": tuned,
        "objective": recipe.objective,
        "run": f"comparison {recipe.name}",
        "data": {
            "content_hash": comparison.dataset.content_hash,
            "num_train": len(comparison.dataset.train),
            "num_validation": len(comparison.dataset.validation),
        },
        "labels": list(comparison.labels) if comparison.kind == "labels" else None,
        "notes": list(trial.notes),
        "metrics": trial.training,
    }
    artifact = artifacts.save(name, base, trial.slot, trial.techniques, facts, force=True)
    size = sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file())
    return {"artifact": name, "artifact_bytes": size}
