"""Tune: rows in, a working customization out. And resume: go on from a checkpoint to the same result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tailor.config import load_recipe
from tailor.errors import ConfigError
from tailor.models.base import Base, load_base
from tailor.recipes.hosted_prompting import check_not_hosted
from tailor.recipes.tune_checkpoints import check_free
from tailor.recipes.tune_prepare import check_unchanged, new_run, prepare, read_rows, recipe_of
from tailor.recipes.tune_save import TuneResult, save
from tailor.recipes.tune_settings import TuneRecipe
from tailor.recipes.tune_train import train
from tailor.runs import Run


def tune(
    recipe: TuneRecipe | str | Path, overrides: Sequence[str] = (), *, base: Base | None = None, quiet: bool = False
) -> TuneResult:
    """Tune a base on rows and save the artifact. `recipe` is a TuneRecipe or the path of one (with `overrides`).

    `base` is one that is loaded already; else the recipe's is loaded. Raises the errors of its steps (ConfigError,
    DataError, ConflictError, …); an interrupted run raises InterruptedRunError after saving its checkpoint, and
    `resume` goes on from there. `tune_many` trains several recipes of one base in the same passes.
    """
    recipe = read_recipe(recipe, overrides)
    check_free(recipe)
    recipe = recipe.absolute()
    check_not_hosted(recipe)
    rows = read_rows(recipe, quiet=quiet)
    base = base or load_base(recipe.base.name, recipe.base.device, recipe.base.dtype, recipe.base.quantize)
    prepared = prepare(recipe, rows, base, quiet=quiet)
    if not prepared.slot.parameters:
        return save(prepared)
    run = new_run(prepared)
    return train([(prepared, run)], run.name, quiet=quiet)[0].checked()


def resume(name_or_path: str | Path, *, quiet: bool = False) -> TuneResult:
    """Go on with an interrupted or killed run, to the losses it would have had.

    Raises NotFoundError, ConflictError when it is finished, in use, or when its data, base, device or precision are
    not those it began with.
    """
    run = Run.open(name_or_path)
    recipe = recipe_of(run)
    torch.set_num_threads(int(run.manifest["num_threads"]))  # sums are rounded by how they are cut up
    rows = read_rows(recipe, quiet=quiet)
    base = load_base(recipe.base.name, recipe.base.device, recipe.base.dtype, recipe.base.quantize)
    prepared = prepare(recipe, rows, base, quiet=quiet)
    check_unchanged(prepared, run)
    return train([(prepared, run)], run.name, quiet=quiet)[0].checked()


def read_recipe(recipe: TuneRecipe | str | Path, overrides: Sequence[str]) -> TuneRecipe:
    """The recipe at a path, with overrides; a TuneRecipe as it is. Raises ConfigError for overrides of the latter."""
    if not isinstance(recipe, TuneRecipe):
        return load_recipe(recipe, TuneRecipe, overrides).recipe
    if overrides:
        raise ConfigError("overrides go with the path of a recipe; change a TuneRecipe with model_copy(update=…)")
    return recipe
