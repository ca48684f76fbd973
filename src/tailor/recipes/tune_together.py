"""Tune several: recipes of one base trained side by side on one loaded copy of it, each to the result it has alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor.errors import ConfigError, ConflictError, TailorError
from tailor.models.base import Base, dtype_name, load_base, pick_device, pick_dtype
from tailor.recipes.tune import read_recipe
from tailor.recipes.tune_checkpoints import check_free
from tailor.recipes.tune_prepare import Prepared, check_unchanged, new_run, prepare, read_rows, recipe_of
from tailor.recipes.tune_save import TuneResult, save
from tailor.recipes.tune_settings import TuneRecipe
from tailor.recipes.tune_train import Outcome, ended, train
from tailor.runs import Run, list_runs


@dataclass(frozen=True)
class TunedTogether:
    """What several runs came to, in the order of their recipes."""

    outcomes: tuple[Outcome, ...]

    @property
    def results(self) -> tuple[TuneResult, ...]:
        """Every result. Raises an error that names the runs that failed, of the first one's kind."""
        self.check()
        return tuple(outcome.checked() for outcome in self.outcomes)

    def check(self) -> None:
        """Raise an error that names the runs that failed, of the first one's kind."""
        errors = [(outcome.name, outcome.error) for outcome in self.outcomes if outcome.error is not None]
        if not errors:
            return
        kept = "; the others are saved" if len(errors) < len(self.outcomes) else ""
        told = [error.message if isinstance(error, TailorError) else f"{name}: {error!r}" for name, error in errors]
        first = errors[0][1]
        kind, hint = (type(first), first.hint) if isinstance(first, TailorError) else (TailorError, None)
        raise kind("\n".join([f"{len(errors)} of {len(self.outcomes)} failed{kept}", *told]), hint=hint) from first


def tune_many(
    recipes: Sequence[TuneRecipe | str | Path],
    overrides: Sequence[str] = (),
    *,
    base: Base | None = None,
    quiet: bool = False,
) -> TunedTogether:
    """Tune several recipes of one base side by side: techniques, rows, rates, sizes and ends may all differ.

    Each has its own run folder, checkpoints and artifact, and gets the updates it would get alone. One that is done is
    saved and detached while the others go on; one that diverges has its error in its outcome. `overrides` apply to all
    recipes, which are paths then. Raises ConfigError before anything is trained for recipes that cannot share a base,
    the errors of `tune`, and InterruptedRunError after saving every checkpoint: `resume_many` goes on, all together
    by the name that the error tells, or `resume` with one of them alone.
    """
    read = [_read(recipe, overrides) for recipe in recipes]
    titles = [f"recipe {k}" if isinstance(given, TuneRecipe) else str(given) for k, given in enumerate(recipes, 1)]
    _check_names(titles, read)
    if base is None:
        _check_one_base(titles, read)
    for recipe in read:
        check_free(recipe)
    read = [recipe.absolute() for recipe in read]
    prepared = _prepare_all(read, base, quiet=quiet)
    outcomes = {part.recipe.output.name: _saved(part) for part in prepared if not part.slot.parameters}
    trained = [part for part in prepared if part.slot.parameters]
    if trained:
        parts = [(part, new_run(part)) for part in trained]
        group = _named(parts[0][1].name, [run for _, run in parts])
        outcomes |= {outcome.name: outcome for outcome in train(parts, group, detach=True, quiet=quiet)}
    return TunedTogether(tuple(outcomes[recipe.output.name] for recipe in read))


def resume_many(names: Sequence[str | Path], *, quiet: bool = False) -> TunedTogether:
    """Go on with several interrupted or killed runs of one base in the same passes, as with `resume`.

    A name may be that of a group: all runs that were started together and are not finished.
    """
    runs = runs_of(names)
    recipes = [recipe_of(run) for run in runs]
    titles = [run.name for run in runs]
    _check_names(titles, recipes)
    _check_one_base(titles, recipes)
    threads = {int(run.manifest["num_threads"]) for run in runs}
    if len(threads) > 1:
        raise ConflictError(
            f"these runs began with different numbers of threads ({', '.join(map(str, sorted(threads)))})",
            hint="resume them one by one",
        )
    torch.set_num_threads(threads.pop())
    prepared = _prepare_all(recipes, None, quiet=quiet)
    for part, run in zip(prepared, runs, strict=True):
        check_unchanged(part, run)
    group = _named(runs[0].name, runs)
    parts = list(zip(prepared, runs, strict=True))
    return TunedTogether(tuple(train(parts, group, detach=True, quiet=quiet)))


def runs_of(names: Sequence[str | Path]) -> list[Run]:
    """The runs of these names, each once; the name of a group stands for its runs that are not finished.

    Raises NotFoundError, and ConflictError for a group that is finished.
    """
    groups: dict[str, list[Run]] = {}
    for run in reversed(list_runs()):
        groups.setdefault(run.manifest.get("group", ""), []).append(run)
    found: dict[str, Run] = {}
    for name in map(str, names):
        if name and name in groups:
            left = [run for run in groups[name] if run.manifest["status"] != "finished"]
            if not left:
                raise ConflictError(f"the runs of {name} are all finished")
        else:
            left = [Run.open(name)]
        found |= {run.name: run for run in left}
    return list(found.values())


def _read(recipe: TuneRecipe | str | Path, overrides: Sequence[str]) -> TuneRecipe:
    """As `read_recipe`; what is wrong with an override names the recipe that it does not suit."""
    try:
        return read_recipe(recipe, overrides)
    except ConfigError as error:
        if isinstance(recipe, TuneRecipe) or str(recipe) in error.message:
            raise
        raise ConfigError(f"{recipe}: {error.message}", hint=error.hint) from None


def _named(first: str, runs: Sequence[Run]) -> str:
    """What to resume all of them by; noted in their manifests. A single run has its own name."""
    if len(runs) == 1:
        return first
    group = f"group-{first}"
    for run in runs:
        run.set_status("running", group=group)
    return group


def _check_names(titles: Sequence[str], recipes: Sequence[TuneRecipe]) -> None:
    """Raise ConfigError when there is nothing to train, two want one name, or one owns the base's weights."""
    if not recipes:
        raise ConfigError("there is no recipe to train")
    problems = []
    writers: dict[str, str] = {}
    for title, recipe in zip(titles, recipes, strict=True):
        other = writers.setdefault(recipe.output.name, title)
        if other is not title:
            problems.append(f"{other} and {title}: both are to write artifact {recipe.output.name!r} (output.name)")
        owners = [technique.type for technique in recipe.technique if not technique.traits.frozen_base]
        if owners and len(recipes) > 1:
            problems.append(f"{title}: {owners[0]} changes the base itself and is trained alone")
    if problems:
        raise ConfigError("\n".join(problems))


def _check_one_base(titles: Sequence[str], recipes: Sequence[TuneRecipe]) -> None:
    """Raise ConfigError when the recipes are not all for one base on one device in one precision."""
    found: dict[tuple[str, ...], list[str]] = {}
    for title, recipe in zip(titles, recipes, strict=True):
        name = recipe.base.absolute().name
        device = pick_device(recipe.base.device)
        kind = (
            os.path.realpath(name) if Path(name).is_dir() else name,
            str(device),
            dtype_name(pick_dtype(recipe.base.dtype, device)),
            recipe.base.quantize or "unquantised",
        )
        found.setdefault(kind, []).append(title)
    if len(found) > 1:
        each = "\n".join(f"{', '.join(who)}: {' '.join(kind)}" for kind, who in found.items())
        raise ConfigError(
            f"one call trains on one base, device, dtype and quantize\n{each}", hint="make one call for each"
        )


def _prepare_all(recipes: Sequence[TuneRecipe], base: Base | None, *, quiet: bool) -> list[Prepared]:
    """All of them attached to one base, or none: all rows are read before the base is loaded."""
    rows = [read_rows(recipe, quiet=quiet) for recipe in recipes]
    first = recipes[0].base
    base = base or load_base(first.name, first.device, first.dtype, first.quantize)
    prepared: list[Prepared] = []
    try:
        for recipe, own in zip(recipes, rows, strict=True):
            prepared.append(prepare(recipe, own, base, quiet=quiet))
    except BaseException:
        for part in prepared:
            base.host.detach(part.slot)
        raise
    return prepared


def _saved(prepared: Prepared) -> Outcome:
    """The outcome of a recipe that trains nothing."""
    try:
        return ended(prepared.recipe.output.name, None, lambda: save(prepared))
    finally:
        prepared.base.host.detach(prepared.slot)
