"""The rows of a job's files: read as the training will read them, so that what is wrong is said before it waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailor.data.dataset import load_dataset, read
from tailor.data.records import Record
from tailor.data.rows import LISTED, BadRow, BadRowsError
from tailor.errors import TailorError
from tailor.objectives import check_consumed, find_objective
from tailor.recipes.tune_settings import TuneRecipe
from tailor.server.errors import without_paths
from tailor.techniques.soft_prompt import templates_of
from tailor.techniques.technique import training_defaults
from tailor.training.settings import resolve_settings

MAX_STEPS = (1 << 31) - 1


class Refused(Exception):
    """Files that a job cannot be done with; `facts` are its error."""

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.facts: dict[str, Any] = {"code": code, "message": without_paths(message), "param": param}


@dataclass(frozen=True)
class Numbers:
    """What the rows decide; `num_steps` is None for a technique that trains nothing. `told` is for people."""

    num_epochs: int
    batch_size: int
    num_steps: int | None
    told: str


def check_rows(recipe: TuneRecipe, min_rows: int) -> Numbers:
    """Read the files of a recipe. Raises Refused."""
    records = _read(recipe, recipe.data.train, "training_file")
    if len(records) < min_rows:
        message = f"The training file has {len(records)} examples; a job takes at least {min_rows}."
        raise Refused("invalid_n_examples", message, "training_file")
    if recipe.data.validation is not None:
        _read(recipe, recipe.data.validation, "validation_file")
    try:
        dataset = load_dataset(recipe.data, recipe.train.seed, templates=templates_of(recipe.technique))
    except TailorError as error:
        raise Refused("invalid_training_file", error.message, "training_file") from error
    told = f"{len(dataset.train)} examples to train on, {len(dataset.validation)} set aside to validate"
    trained = [technique for technique in recipe.technique if technique.traits.defaults is not None]
    if not trained:
        return Numbers(1, 1, None, told)
    resolved = resolve_settings(recipe.train, training_defaults(trained), len(dataset.train), embedding_rms=1.0)
    if resolved.num_steps > MAX_STEPS:
        message = f"The job would take {resolved.num_steps} steps; it may take up to {MAX_STEPS}."
        raise Refused("invalid_value", message, "hyperparameters")
    epochs = max(1, round(resolved.num_steps * resolved.batch_size / len(dataset.train)))
    return Numbers(epochs, resolved.batch_size, resolved.num_steps, told)


def _read(recipe: TuneRecipe, path: str, param: str) -> Sequence[Record]:
    templates = templates_of(recipe.technique)
    try:
        records = read(path, recipe.data, templates=templates, training=True).records
        check_consumed(find_objective(recipe.objective), records)
    except BadRowsError as error:
        raise Refused("invalid_training_file", _told(error.bad_rows), param) from error
    except TailorError as error:
        message = error.message if error.hint is None else f"{error.message} ({error.hint})"
        raise Refused("unsupported_format", message.replace(path, "the file"), param) from error
    return records


def _told(bad_rows: Sequence[BadRow]) -> str:
    lines = [f"Line {bad.line}: {bad.reason}" for bad in bad_rows[:LISTED]]
    more = [f"… and {len(bad_rows) - LISTED} more"] if len(bad_rows) > LISTED else []
    return "\n".join([f"{len(bad_rows)} examples cannot be used.", *lines, *more])
