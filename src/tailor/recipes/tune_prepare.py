"""What comes before the first step of a tuning run: rows, base, slot, sequences. The same again when it is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import Artifact
from tailor.config import dump_yaml, load_recipe
from tailor.data.dataset import Dataset, load_dataset
from tailor.data.examples import Bundle, Rendering
from tailor.data.progress import Progress, silent, stages
from tailor.data.records import Record
from tailor.data.tokenise import tokenise
from tailor.errors import ConfigError, ConflictError, DataError
from tailor.models.base import Base, dtype_name
from tailor.models.slots import Slot
from tailor.objectives import check_consumed, find_objective
from tailor.objectives.objective import Objective
from tailor.recipes.prompt_reasoning import bootstrapped
from tailor.recipes.tune_settings import TuneRecipe
from tailor.recipes.verify import rendering_for
from tailor.runs import Run
from tailor.techniques import Technique
from tailor.techniques.soft_prompt import tasks_of, templates_of
from tailor.techniques.technique import training_defaults
from tailor.training.settings import resolve_settings
from tailor.training.trainer import SlotRun


@dataclass(frozen=True)
class Rows:
    """The rows of a recipe, and what is optimised on them."""

    dataset: Dataset
    objective: Objective


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train: everything up to the first step."""

    recipe: TuneRecipe
    base: Base
    dataset: Dataset
    techniques: tuple[Technique, ...]
    slot: Slot
    rendering: Rendering
    objective: Objective
    train: Sequence[Bundle]
    validation: Sequence[Bundle]
    notes: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to come to the same numbers."""
        return {
            "data_hash": self.dataset.content_hash,
            "base_fingerprint": self.base.fingerprint,
            "device": self.base.device.type,
            "dtype": dtype_name(self.base.dtype),
            "quantize": self.base.quantize,
        }

    def slot_run(self) -> SlotRun:
        """The training of its slot, at the first step. The slot has parameters."""
        settings, defaults = self.recipe.train, training_defaults(self.techniques)
        resolved = resolve_settings(settings, defaults, len(self.train), self.base.host.embedding_rms())
        what = (self.recipe.output.name, self.slot, self.objective)
        return SlotRun(*what, self.train, self.validation, settings, resolved)


def read_rows(recipe: TuneRecipe, *, quiet: bool) -> Rows:
    """Read the data of a recipe. Raises DataError, and ConfigError for an objective that is not for such rows."""
    objective = find_objective(recipe.objective)
    with stages(quiet) as progress:
        dataset = load_dataset(recipe.data, recipe.train.seed, progress, templates_of(recipe.technique))
    check_consumed(objective, dataset.train, dataset.validation)
    return Rows(dataset, objective)


def prepare(recipe: TuneRecipe, rows: Rows, base: Base, *, quiet: bool) -> Prepared:
    """Attach the recipe's techniques to the base and cut its rows into sequences. Leaves nothing there on an error."""
    dataset, objective = rows.dataset, rows.objective
    if recipe.output.add:
        artifacts.check_same_base(recipe.output.name, base)
    techniques = tuple(technique.prepare(dataset.train, recipe.train.seed) for technique in recipe.technique)
    techniques = bootstrapped(techniques, base)
    slot = base.host.attach(techniques, seed=recipe.train.seed)
    try:
        if recipe.start is not None:
            artifacts.start_from(slot, _start_of(recipe.start, techniques))
        rendering = rendering_for(recipe.data, base, slot)
        with stages(quiet) as progress:
            train, dropped = bundles_of(dataset.train, objective, rendering, techniques, progress)
            validation, dropped_too = bundles_of(dataset.validation, objective, rendering, techniques, progress)
    except BaseException:
        base.host.detach(slot)  # the base may be the caller's, to be used again
        raise
    notes = (*recipe.notes, *dataset.notes, *dropped_note((dropped, dropped_too), rendering))
    return Prepared(recipe, base, dataset, techniques, slot, rendering, objective, train, validation, notes)


def _start_of(name: str, techniques: Sequence[Technique]) -> Artifact:
    """The artifact that training goes on from; of a prompt table, the task that is trained.

    Raises ConfigError when it is of another technique.
    """
    artifact, tasks = artifacts.find(name), tasks_of(techniques)
    artifact = artifact.of_task(tasks[0] if tasks and artifact.tasks else None)
    theirs, ours = ([technique.type for technique in some] for some in (artifact.techniques, techniques))
    if theirs != ours:
        raise ConfigError(
            f"start: {name} is {'+'.join(theirs)}, and {'+'.join(ours)} is to be trained: going on takes the same",
            hint=f"give the technique and settings that it has: tailor artifacts show {name}",
        )
    return artifact


def bundles_of(
    records: Sequence[Record],
    objective: Objective,
    rendering: Rendering,
    techniques: Sequence[Technique] = (),
    progress: Progress = silent,
) -> tuple[Sequence[Bundle], Sequence[Record]]:
    """The sequences of every record, and the records that `truncation: drop` left out.

    Those of many rows are kept for other runs, unless prompts are rewritten and `techniques` does not say by whom.
    """
    rewriting = [technique.model_dump(mode="json") for technique in techniques] if rendering.compose else []
    made_by = None if rendering.compose and not rewriting else [repr(objective), rewriting]
    bundles, dropped = tokenise(records, objective.examples, rendering, made_by=made_by, progress=progress)
    if not bundles:
        raise DataError(f"none of the {len(records)} rows fits into {rendering.max_seq_len} tokens")
    return bundles, dropped


def dropped_note(sides: Sequence[Sequence[Record]], rendering: Rendering) -> list[str]:
    """What is said of rows that were too long: how many, and which the first ten are."""
    num_dropped = sum(len(side) for side in sides)
    if not num_dropped:
        return []
    first = [str(record.source) for record in islice(chain(*sides), 10)]
    some = ", ".join(first) + (", …" if num_dropped > len(first) else "")
    return [f"{num_dropped} rows are longer than {rendering.max_seq_len} tokens and were dropped ({some})"]


def recipe_of(run: Run) -> TuneRecipe:
    """The recipe of a run that is to go on. Raises ConflictError for one that is finished."""
    manifest = run.manifest
    if manifest["status"] == "finished":
        raise ConflictError(f"run {run.name} is finished already", hint=f"its artifact is {manifest.get('artifact')!r}")
    return load_recipe(run.folder / "recipe.yaml", TuneRecipe).recipe


def new_run(prepared: Prepared) -> Run:
    """A folder for the run, holding what it takes to resume it."""
    recipe = prepared.recipe
    manifest = {**prepared.facts, "num_threads": torch.get_num_threads()}
    return Run.create(recipe.output.name, dump_yaml(recipe.model_dump(mode="json")), manifest)


def check_unchanged(prepared: Prepared, run: Run) -> None:
    """Raise ConflictError when data, base, device or precision are not those the run began with."""
    manifest = run.manifest
    changed = [key for key, value in prepared.facts.items() if manifest.get(key) != value]
    if changed:
        was = ", ".join(f"{key} was {manifest.get(key)}, is {prepared.facts[key]}" for key in changed)
        raise ConflictError(
            f"run {run.name} cannot be resumed: something has changed since it began ({was})",
            hint="restore it, or start anew with `tailor tune`",
        )
