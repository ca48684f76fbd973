"""Training inside a comparison: everything that shares a frozen base in one pass, resumable after any kill."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tailor.evaluation.memory import highest, peak_of
from tailor.models.base import Base
from tailor.recipes.compare_cells import Cell, Comparison, Trial, takes_its_row
from tailor.runs import Run
from tailor.store import write_json
from tailor.techniques import Technique
from tailor.training.checkpoint import load_checkpoint, save_checkpoint
from tailor.training.interrupt import stop_on_signal
from tailor.training.trainer import SlotRun, StepReport, Trainer, finish, mean_loss

PROBE_STEPS = 3
"""Steps that each technique takes alone, before the shared pass, to know its own cost. The first one warms up."""


@dataclass(frozen=True)
class Cost:
    """What one technique's training costs when nothing shares its passes."""

    seconds_per_token: float
    peak_memory: int


def train_together(
    comparison: Comparison, base: Base, trials: Sequence[Trial], cells: Iterable[Cell], key: str
) -> None:
    """Train the trials of these cells side by side and fill in validation losses and costs.

    A trial that diverges keeps its error. Raises InterruptedRunError after saving a checkpoint; the same call goes on
    from there to the same losses and costs, also when the pass has come to its end already.
    """
    trained = [trial for trial in trials if trial.run is not None]
    if trained:
        names = [cell.key for cell in cells] + [_run(trial).name for trial in trained]
        folder = comparison.folder / "passes" / hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        costs = _costs(folder, base, trained)
        seconds, peak = _loop(comparison, base, trained, folder, key)
        _account(trained, costs, seconds, peak)
    for trial in trials:
        try:
            _settle(comparison, base, trial)
        except Exception as error:
            if not takes_its_row(error):
                raise
            trial.error = error.with_traceback(None)  # its frames hold the gradients


def _settle(comparison: Comparison, base: Base, trial: Trial) -> None:
    """Put the best weights in place and let go of gradients and moments; or score what needs no training."""
    run, trial.run = trial.run, None
    if run is not None:
        trial.trained_with = run.settings
        finish(run)
    elif trial.validation:
        tokens = comparison.recipe.train_of(trial.entry).tokens_per_batch
        loss = mean_loss(base, trial.slot, comparison.objective, trial.validation, tokens)
        trial.validation_loss = loss if math.isfinite(loss) else None


def forget(comparison: Comparison) -> None:
    """Remove the checkpoints of passes whose cells are all written."""
    shutil.rmtree(comparison.folder / "passes", ignore_errors=True)


def _loop(comparison: Comparison, base: Base, trials: Sequence[Trial], folder: Path, key: str) -> tuple[float, int]:
    """Every step that is left; seconds and peak memory of all steps, those before an interruption included."""
    runs = [_run(trial) for trial in trials]
    log = Run(folder)
    stage = f"train {key}"
    with stop_on_signal() as request, peak_of(base.device):
        load_checkpoint(folder, runs)
        log.truncate(max(run.step for run in runs))
        total = max(run.resolved.num_steps for run in runs)
        trainer = Trainer(base, runs, _teller(comparison, stage, total))
        every = min(run.resolved.checkpoint_every for run in runs)
        while not trainer.done:
            started = time.perf_counter()
            trainer.step()
            step = max(run.step for run in runs)
            seconds = round(time.perf_counter() - started, 5)
            log.log(step, seconds=seconds, peak_memory=highest(base.device))
            told = "stopped; what is measured is kept, and the checkpoint is saved"
            save = partial(save_checkpoint, folder, runs)
            request.stop_if_asked(save, told, hint=f"tailor resume {comparison.recipe.name}")
            if trainer.done or step % every == 0:
                save_checkpoint(folder, runs)
    lines = log.metrics()
    return sum(float(line["seconds"]) for line in lines), max(int(line["peak_memory"]) for line in lines)


def _teller(comparison: Comparison, stage: str, total: int) -> Callable[[StepReport], None]:
    return lambda report: comparison.progress(stage, report.step, total)


def _costs(folder: Path, base: Base, trials: Sequence[Trial]) -> dict[str, Cost]:
    """Each trial's cost alone, measured on throw-away slots; a pass of one needs none, it is its own measurement."""
    if len(trials) == 1:
        return {}
    path = folder / "costs.json"
    if path.is_file():
        return {name: Cost(**cost) for name, cost in json.loads(path.read_text("utf-8")).items()}
    known: dict[str, Cost] = {}
    found: dict[str, Cost] = {}
    for trial in trials:
        shape = repr((trial.entry.title, [technique.type for technique in trial.techniques], trial.slot.num_parameters))
        known[shape] = known.get(shape) or _solo_cost(base, trial.techniques, _run(trial))
        found[_run(trial).name] = known[shape]
    write_json(path, {name: vars(cost) for name, cost in found.items()})
    return found


def _solo_cost(base: Base, techniques: Sequence[Technique], like: SlotRun) -> Cost:
    slot = base.host.attach(techniques, seed=like.settings.seed)
    try:
        with peak_of(base.device) as memory:
            resolved = replace(like.resolved, num_steps=PROBE_STEPS)
            run = SlotRun(like.name, slot, like.objective, like.train, (), like.settings, resolved)
            trainer = Trainer(base, [run])
            begun = time.perf_counter()
            trainer.step()
            warm, started = run.num_tokens, time.perf_counter()
            for _ in range(PROBE_STEPS - 1):
                trainer.step()
            ended = time.perf_counter()
        run.optimizer.close()
        timed = run.num_tokens - warm
        if not timed:  # it has diverged in its first step: that one has to do
            return Cost((started - begun) / max(1, warm), memory.bytes)
        return Cost((ended - started) / timed, memory.bytes)
    finally:
        base.host.detach(slot)


def _account(trials: Sequence[Trial], costs: dict[str, Cost], seconds: float, peak: int) -> None:
    """Share the pass's time by each run's tokens times what a token costs it alone."""
    runs = [_run(trial) for trial in trials]
    weights = [run.num_tokens * (costs[run.name].seconds_per_token if costs else 1.0) for run in runs]
    for trial, run, weight in zip(trials, runs, weights, strict=True):
        trial.validation_loss = run.best_loss if run.best_state else None
        others = dict.fromkeys(other.entry.title for other in trials if other.entry.title != trial.entry.title)
        trial.training = {
            "seconds": round(seconds * weight / max(sum(weights), 1e-9), 3),
            "pass_seconds": round(seconds, 3),
            "num_tokens": run.num_tokens,
            "num_steps": run.step,
            "peak_memory": costs[run.name].peak_memory if costs else peak,
            "shared_with": list(others),
            "stopped": run.stopped,
            "best_step": run.best_step,
            "validation_loss": trial.validation_loss,
            "learning_rate": run.resolved.learning_rate,
        }


def _run(trial: Trial) -> SlotRun:
    assert trial.run is not None
    return trial.run
