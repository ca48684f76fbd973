"""The training of a sweep: some trials side by side on one base, given up when the pruner says so, resumable."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from tailor.artifacts import artifact as artifacts
from tailor.errors import ConfigError, ResourceError
from tailor.evaluation.evaluate import Progress
from tailor.models.base import Base
from tailor.recipes.compare_cells import failed, takes_its_row
from tailor.recipes.sweep_settings import SweepRecipe
from tailor.recipes.sweep_space import Range
from tailor.recipes.sweep_study import TrialStudy
from tailor.recipes.tune_prepare import Prepared, Rows, prepare
from tailor.recipes.tune_save import labels_of
from tailor.recipes.tune_settings import OutputSettings, TuneRecipe
from tailor.store import write_json
from tailor.techniques.technique import training_defaults
from tailor.training.checkpoint import FOLDER, load_checkpoint, save_checkpoint
from tailor.training.interrupt import stop_on_signal
from tailor.training.progress import peak_memory
from tailor.training.trainer import SlotRun, StepReport, Trainer, finish

PASS = "pass"
"""In a sweep's folder: the trials that are trained right now (numbers.json) and their checkpoint."""

GIVEN_UP = "pruned"


@dataclass(frozen=True)
class Sweep:
    """A sweep under way: what every step needs to know."""

    recipe: SweepRecipe
    folder: Path
    rows: Rows
    study: TrialStudy
    progress: Progress
    say: Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A trial that is ready to train; `recipe` alone repeats it."""

    number: int
    recipe: TuneRecipe
    prepared: Prepared
    run: SlotRun


def next_pass(sweep: Sweep) -> list[int]:
    """The trials to train next: those of an interrupted pass, else new ones; none when all are finished."""
    path = sweep.folder / PASS / "numbers.json"
    if path.is_file():
        known: list[int] = json.loads(path.read_text("utf-8"))
        if len(known) <= sweep.recipe.in_parallel or (path.parent / FOLDER).exists():
            return known
    shutil.rmtree(sweep.folder / PASS, ignore_errors=True)
    numbers = sweep.study.unfinished()[: sweep.recipe.in_parallel]
    while len(numbers) < sweep.recipe.in_parallel and len(sweep.study.all()) < sweep.recipe.num_trials:
        numbers.append(sweep.study.draw())
    if numbers:
        write_json(path, numbers)
    return numbers


def train_pass(sweep: Sweep, base: Base, numbers: Sequence[int], keep: Callable[[Trial], None]) -> None:
    """Train these trials side by side and tell the study what came of each; the best of all trials so far is kept.

    A trial that cannot be attached or diverges before any validation has failed, and no other with it. Raises
    InterruptedRunError after saving a checkpoint, from which the same call goes on to the same losses.
    """
    trials: list[Trial] = []
    try:
        for number in numbers:
            if (trial := _attached(sweep, base, number)) is not None:
                trials.append(trial)
        if trials:
            _loop(sweep, base, trials)
        _tell(sweep, trials, keep)
    finally:
        for trial in trials:
            trial.run.optimizer.close()
            base.host.detach(trial.run.slot)
    (sweep.folder / PASS / "numbers.json").unlink()  # first: a pass without numbers is over
    shutil.rmtree(sweep.folder / PASS)


def _attached(sweep: Sweep, base: Base, number: int) -> Trial | None:
    """The trial on a slot of its own; None when it cannot be, which its entry in the study says."""
    if sweep.study.state(number) == "fail":
        return None
    try:
        recipe = _recipe_of(sweep, base, number)
        prepared = prepare(recipe, sweep.rows, base, quiet=True)
    except Exception as error:
        if not takes_its_row(error):
            raise
        sweep.study.fail(number, failed(error)["error"])
        sweep.say(f"trial {number}: {error}")
        return None
    run = prepared.slot_run()
    run.name = f"trial {number}"
    trial = Trial(number, _settled(recipe, run), prepared, run)
    if sweep.study.state(number) == GIVEN_UP:
        run.stopped = GIVEN_UP
    elif sweep.study.state(number) == "running":
        sweep.study.note(number, recipe=trial.recipe.model_dump(mode="json"), num_parameters=run.slot.num_parameters)
    return trial


def _recipe_of(sweep: Sweep, base: Base, number: int) -> TuneRecipe:
    """What the trial drew, as a tuning run. Raises ConfigError for values that do not go together."""
    recipe = sweep.recipe
    title, values = sweep.study.values(number)
    alternative = recipe.space.named(title)
    own = training_defaults(alternative.techniques).peak(base.host.embedding_rms())
    for key, space in recipe.space.spaces.items():
        if key in values and isinstance(space, Range) and space.relative:
            values[key] *= own
    try:
        techniques, train = alternative.settings(values, recipe.train)
    except ValidationError as error:
        told = "; ".join(detail["msg"].removeprefix("Value error, ") for detail in error.errors())
        raise ConfigError(f"these values do not go together: {told}") from None
    return TuneRecipe(
        base=recipe.base,
        data=recipe.data,
        technique=techniques,
        objective=recipe.objective,
        train=train,
        output=OutputSettings(name=f"{recipe.name}-best"),
    )


def _settled(recipe: TuneRecipe, run: SlotRun) -> TuneRecipe:
    """With every number of the training written out: other defaults do not change what it repeats."""
    resolved = run.resolved
    train = recipe.train.model_copy(
        update={
            "learning_rate": resolved.learning_rate,
            "num_epochs": None,
            "num_steps": resolved.num_steps,
            "batch_size": resolved.batch_size,
            "eval_every": resolved.eval_every,
            "checkpoint_every": resolved.checkpoint_every,
        }
    )
    return recipe.model_copy(update={"train": train})


def _loop(sweep: Sweep, base: Base, trials: Sequence[Trial]) -> None:
    runs = [trial.run for trial in trials]
    folder = sweep.folder / PASS
    with stop_on_signal() as request:
        known = [run.stopped for run in runs]
        load_checkpoint(folder, runs)
        for run, stopped in zip(runs, known, strict=True):
            run.stopped = stopped or run.stopped  # given up after the checkpoint was saved
        trainer = Trainer(base, runs)
        every = min(run.resolved.checkpoint_every for run in runs)
        total = max(run.resolved.num_steps for run in runs)
        stage = f"{sweep.recipe.name}: trials {', '.join(str(trial.number) for trial in trials)}"
        while not trainer.done:
            try:
                reports = trainer.step()
            except torch.OutOfMemoryError as error:
                raise _does_not_fit(base, runs) from error
            _listen(sweep, trials, reports)
            step = max(run.step for run in runs)
            sweep.progress(stage, step, total)
            told = "stopped; finished trials are kept, and the checkpoint of the others is saved"
            save = partial(save_checkpoint, folder, runs)
            request.stop_if_asked(save, told, hint=f"tailor resume {sweep.recipe.name}")
            if trainer.done or step % every == 0:
                save_checkpoint(folder, runs)


def _does_not_fit(base: Base, runs: Sequence[SlotRun]) -> ResourceError:
    fewer = "lower in_parallel (finished trials are kept), or " if len(runs) > 1 else ""
    return ResourceError(
        f"{len(runs)} trials side by side do not fit into the memory of {base.device}",
        hint=f"{fewer}lower train.tokens_per_batch (it was {runs[0].settings.tokens_per_batch})",
    )


def _listen(sweep: Sweep, trials: Sequence[Trial], reports: Sequence[StepReport]) -> None:
    """Report the validation losses of a step, then give up those without hope: they leave, the others do not notice."""
    by_name = {trial.run.name: trial for trial in trials}
    validated = {report.name: report for report in reports if report.validation_loss is not None}
    for name, report in validated.items():
        assert report.validation_loss is not None
        sweep.study.report(by_name[name].number, report.step / report.num_steps, report.validation_loss)
    for name in validated:
        trial = by_name[name]
        if trial.run.active and sweep.study.gives_up(trial.number):
            trial.run.stopped = GIVEN_UP
            sweep.study.note(trial.number, **_came_to(trial.run))
            sweep.study.prune(trial.number)


def _came_to(run: SlotRun) -> dict[str, Any]:
    return {
        "num_steps": run.step,
        "num_tokens": run.num_tokens,
        "best_step": run.best_step,
        "stopped": run.stopped,
    }


def _tell(sweep: Sweep, trials: Sequence[Trial], keep: Callable[[Trial], None]) -> None:
    """Keep the best trial of the pass when it is the best of all, then tell the study every result."""
    scored = [trial for trial in trials if trial.run.stopped != GIVEN_UP and trial.run.best_state]
    best = min(scored, key=lambda trial: (trial.run.best_loss, trial.number), default=None)
    before = sweep.study.best()
    if best is not None and (before is None or before.number == best.number or best.run.best_loss < before.value):
        keep(best)
    for trial in trials:
        run, number = trial.run, trial.number
        if sweep.study.state(number) != "running":
            continue
        sweep.study.note(number, **_came_to(run))
        if run.best_state and math.isfinite(run.best_loss):
            sweep.study.finish(number, run.best_loss)
        else:
            sweep.study.fail(number, {"code": "failed", "message": f"the loss {run.stopped}", "hint": None})


def save_best(sweep: Sweep, trial: Trial) -> str:
    """Write the trial's weights as the artifact of the sweep's name, in the place of an earlier best one."""
    name, run, prepared = sweep.recipe.name, trial.run, trial.prepared
    training_state = finish(run)
    facts = {
        "recipe": trial.recipe.model_copy(update={"output": OutputSettings(name=name)}).model_dump(mode="json"),
        "objective": sweep.recipe.objective,
        "run": f"sweep {name}",
        "data": {
            "content_hash": prepared.dataset.content_hash,
            "num_train": len(prepared.train),
            "num_validation": len(prepared.validation),
        },
        "labels": labels_of(prepared.dataset.train),
        "notes": list(prepared.notes),
        "metrics": {
            "validation_loss": run.best_loss,
            **_came_to(run),
            "trial": trial.number,
            "peak_memory": peak_memory(prepared.base.device),
        },
    }
    what = (name, prepared.base, run.slot, prepared.techniques, facts)
    artifacts.save(*what, training_state=training_state, force=True)
    return name
