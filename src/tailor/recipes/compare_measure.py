"""The measurements of a comparison, one cell after the other; what is on disk already is not measured again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from tailor.artifacts import artifact as artifacts
from tailor.data.records import prompt_of
from tailor.errors import TailorError
from tailor.evaluation.baselines import BASELINES
from tailor.evaluation.evaluate import evaluate, evaluate_answers
from tailor.evaluation.scores import METRICS
from tailor.inference.local import LocalBackend
from tailor.models.base import Base, load_base
from tailor.recipes.compare_cells import (
    Cell,
    Comparison,
    Trial,
    attach_trials,
    choices,
    failed,
    measured,
    takes_its_row,
)
from tailor.recipes.compare_rows import Draw
from tailor.recipes.compare_settings import Entry
from tailor.recipes.compare_train import forget, train_together
from tailor.recipes.machine import memory
from tailor.recipes.tune import BaseSettings
from tailor.store import write_json

BYTES_PER_PARAMETER = 20
"""Of a slot under training, in fp32: value, gradient, two moments, and the best values so far."""


def measure(comparison: Comparison) -> None:
    """Fill in every missing cell: baselines, then each base, plain and customized, from few rows to many."""
    recipe = comparison.recipe
    draws = [(size, seed) for size in comparison.sizes for seed in range(recipe.seeds)]
    if recipe.baselines:
        for size, seed in draws:
            _baselines(comparison, size, seed)
    for settings in recipe.base:
        loaded = _Loaded(settings)
        _plain(comparison, loaded)
        for size, seed in draws:
            _entries(comparison, loaded, size, seed)
            forget(comparison)
        loaded.drop()


class _Loaded:
    """A base that is loaded when it is first needed: a resumed comparison may not need it at all."""

    def __init__(self, settings: BaseSettings) -> None:
        self.settings = settings
        self._base: Base | None = None

    def get(self) -> Base:
        if self._base is None:
            self._base = self.fresh()
        return self._base

    def fresh(self) -> Base:
        """Another copy of its own, for whoever changes the weights."""
        return load_base(self.settings.name, self.settings.device, self.settings.dtype)

    def drop(self) -> None:
        self._base = None


def cell_of(comparison: Comparison, base: str | None, name: str, size: int, seed: int) -> Cell:
    """The place of a measurement. The main one of a technique has the most rows and the first seed."""
    return Cell(base, name, size, seed, size == comparison.sizes[-1] and seed == 0)


def _missing(comparison: Comparison, cell: Cell) -> bool:
    return not cell.path(comparison.folder).is_file()


def _baselines(comparison: Comparison, size: int, seed: int) -> None:
    draw = comparison.rows.draw(size, seed)
    metrics = tuple(name for name in comparison.settings.metrics if METRICS[name].needs == "completions")
    settings = comparison.settings.model_copy(update={"metrics": metrics})
    for name, baseline in BASELINES.items():
        cell = cell_of(comparison, None, name, size, seed)
        if not baseline.applies(comparison.kind) or not _missing(comparison, cell):
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


def _plain(comparison: Comparison, loaded: _Loaded) -> None:
    """The base as it is: it learns from nothing, so it is measured once."""
    cell = cell_of(comparison, loaded.settings.name, "base", comparison.sizes[-1], 0)
    if not _missing(comparison, cell):
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


def _entries(comparison: Comparison, loaded: _Loaded, size: int, seed: int) -> None:
    """All entries of one draw: those that freeze the base in shared passes, the others each on a copy of its own."""
    draw = comparison.rows.draw(size, seed)
    cell = partial(cell_of, comparison, loaded.settings.name, size=size, seed=seed)
    missing = [entry for entry in comparison.recipe.techniques if _missing(comparison, cell(name=entry.title))]
    sharing = [entry for entry in missing if not entry.owns_base]
    if sharing:
        for group in _groups(comparison, loaded, sharing, draw, cell(name="").key):
            _group(comparison, loaded, group, draw, size, seed)
    for entry in missing:
        if entry.owns_base:
            _owner(comparison, loaded, entry, draw, cell(name=entry.title))


def _groups(
    comparison: Comparison, loaded: _Loaded, entries: Sequence[Entry], draw: Draw, key: str
) -> Iterator[list[Entry]]:
    """Entries that are trained in the same pass: as many as half of the free memory holds.

    Decided once per draw and kept, so that a resumed comparison trains the same groups.
    """
    path = comparison.folder / "groups.json"
    known: dict[str, list[list[str]]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if key not in known:
        room = _room(loaded.get())
        groups: list[list[str]] = [[]]
        used = 0
        for entry in entries:
            needs = BYTES_PER_PARAMETER * _num_parameters(comparison, loaded.get(), entry, draw)
            if groups[-1] and used + needs > room:
                groups.append([])
                used = 0
            groups[-1].append(entry.title)
            used += needs
        known[key] = groups
        write_json(path, known)
    for titles in known[key]:
        if group := [entry for entry in entries if entry.title in titles]:
            yield group


def _room(base: Base) -> int:
    """Half of what is free where the base is."""
    if base.device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(base.device)[0]) // 2
    free = memory()
    return free[0] // 2 if free is not None else 2**31


def _num_parameters(comparison: Comparison, base: Base, entry: Entry, draw: Draw) -> int:
    """Of all the entry's trials together; 0 when it cannot be attached, which its own turn will report."""
    try:
        slot = base.host.attach(tuple(technique.prepare(draw.train, 0) for technique in entry.technique))
    except TailorError:
        return 0
    base.host.detach(slot)
    return slot.num_parameters * len(choices(entry, comparison.recipe))


def _group(comparison: Comparison, loaded: _Loaded, entries: Sequence[Entry], draw: Draw, size: int, seed: int) -> None:
    """Train entries in one pass and measure each. What goes wrong for all together is tried again one by one."""
    base = loaded.get()
    cells = {entry.title: cell_of(comparison, base.name, entry.title, size, seed) for entry in entries}
    trials: list[Trial] = []
    try:
        for entry in entries:
            try:
                trials += attach_trials(comparison, base, entry, choices(entry, comparison.recipe), draw, seed)
            except Exception as error:
                _give_up(comparison, cells[entry.title], base, entry, draw, error)
        titles = dict.fromkeys(trial.entry.title for trial in trials)
        trained = dict.fromkeys(trial.entry.title for trial in trials if trial.run is not None)
        key = f"{base.name}: {', '.join(trained)} ({size} rows, seed {seed})"
        try:
            train_together(comparison, base, trials, key)
        except Exception as error:
            if not takes_its_row(error):
                raise
            if len(titles) == 1:
                entry = trials[0].entry
                _give_up(comparison, cells[entry.title], base, entry, draw, error)
                return
            alone = [entry for entry in entries if entry.title in titles]
        else:
            alone = []
            for title in titles:
                own = [trial for trial in trials if trial.entry.title == title]
                _measure(comparison, base, own, draw, cells[title])
    finally:
        with contextlib.suppress(KeyError):
            for trial in trials:
                base.host.detach(trial.slot)
    for entry in alone:
        _group(comparison, loaded, [entry], draw, size, seed)


def _owner(comparison: Comparison, loaded: _Loaded, entry: Entry, draw: Draw, cell: Cell) -> None:
    """An entry that changes the base: every trial on a copy of its own, of which the best one is kept."""
    loaded.drop()  # two copies of a large base may not fit
    best: tuple[Base, Trial] | None = None
    trials: list[Trial] = []
    base = loaded.fresh()
    try:
        for choice in choices(entry, comparison.recipe):
            if trials:
                base = loaded.fresh()
            (trial,) = attach_trials(comparison, base, entry, [choice], draw, cell.seed)
            train_together(
                comparison, base, [trial], f"{base.name}: {trial.entry.title} ({cell.size} rows, seed {cell.seed})"
            )
            trials.append(trial)
            if best is None or _rank(trial) < _rank(best[1]):
                best = base, trial
    except Exception as error:
        if not takes_its_row(error):
            raise
        _give_up(comparison, cell, base, entry, draw, error)
        return
    assert best is not None
    _measure(comparison, best[0], trials, draw, cell)


def _rank(trial: Trial) -> tuple[bool, float]:
    """Lower is better: what failed comes last, then by validation loss."""
    return trial.error is not None, float("inf") if trial.validation_loss is None else trial.validation_loss


def _give_up(comparison: Comparison, cell: Cell, base: Base, entry: Entry, draw: Draw, error: BaseException) -> None:
    if not takes_its_row(error):
        raise error
    comparison.say(f"{cell.key}: {error}")
    cell.write(comparison.folder, "technique", {**_described(base, entry, draw), **failed(error)})


def _described(base: Base, entry: Entry, draw: Draw, trial: Trial | None = None) -> dict[str, Any]:
    techniques = trial.techniques if trial is not None else entry.technique
    traits = [technique.traits for technique in techniques]
    return {
        "settings": [technique.model_dump(mode="json") for technique in techniques],
        "traits": {
            "trains": ", ".join(t.trains for t in traits),
            "where": ", ".join(t.where for t in traits),
            **{name: all(getattr(t, name) for t in traits) for name in ("frozen_base", "merges", "mixes", "peft")},
        },
        "num_parameters": trial.slot.num_parameters if trial is not None else 0,
        "base_parameters": base.num_parameters,
        "rows": {"train": len(draw.train), "validation": len(draw.validation)},
        "notes": list(trial.notes) if trial is not None else [],
    }


def _measure(comparison: Comparison, base: Base, trials: Sequence[Trial], draw: Draw, cell: Cell) -> None:
    """Choose the best trial on validation, answer the test rows with it, keep it if it is a main one."""
    best = min(trials, key=_rank)
    facts = _described(base, best.entry, draw, best)
    if len(trials) > 1:
        facts["trials"] = [
            {
                "label": trial.label,
                "validation_loss": trial.validation_loss,
                "chosen": trial is best,
                "seconds": (trial.training or {}).get("seconds"),
                "error": str(trial.error) if trial.error else None,
            }
            for trial in trials
        ]
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
    recipe, name = comparison.recipe, artifact_name(comparison, base.name, cell.name)
    data = comparison.folder / "data"
    train = trial.run.settings if trial.run is not None else recipe.train_of(trial.entry)
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


def artifact_name(comparison: Comparison, base: str, title: str) -> str:
    """`<comparison>-<entry>`, with the base's place in front when there are several."""
    number = [settings.name for settings in comparison.recipe.base].index(base) + 1
    several = f"base{number}-" if len(comparison.recipe.base) > 1 else ""
    readable = "".join(c if c.isalnum() or c in "-." else "-" for c in title)
    return f"{comparison.recipe.name}-{several}{readable}"
