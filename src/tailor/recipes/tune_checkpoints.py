"""The states at the ends of a run's last epochs, which become artifacts of their own beside the best one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.files import load_tensors
from tailor.errors import ConflictError
from tailor.recipes.tune_prepare import Prepared
from tailor.recipes.tune_settings import TuneRecipe
from tailor.runs import Run
from tailor.store import write_bytes
from tailor.training.trainer import SlotRun

FOLDER = "epochs"


def ends_epoch(step: int, batch_size: int, num_rows: int) -> bool:
    """Whether this many steps are a whole number of epochs, rounded as `train.num_epochs` is.

    >>> [step for step in range(1, 10) if ends_epoch(step, batch_size=4, num_rows=11)]
    [3, 6, 8]
    """
    epoch = round(step * batch_size / num_rows)
    return epoch > 0 and step == max(1, round(epoch * num_rows / batch_size))


def keep_state(prepared: Prepared, run: Run, slot_run: SlotRun) -> None:
    """Keep the slot's state in the run folder if an epoch has just ended there, and of others only the latest."""
    num_kept = prepared.recipe.output.checkpoints
    due = ends_epoch(slot_run.step, slot_run.resolved.batch_size, len(slot_run.train))
    if not (num_kept and due) or slot_run.stopped == "diverged":
        return
    from safetensors.torch import save

    write_bytes(run.folder / FOLDER / f"{slot_run.step}.safetensors", save(slot_run.slot.state()))
    for path in _kept(run)[:-num_kept]:
        path.unlink()


def save_states(prepared: Prepared, run: Run, slot_run: SlotRun, facts: Mapping[str, Any]) -> None:
    """Save what `keep_state` has kept as artifacts NAME-step-N; the state that the run's own artifact holds is not one.

    Those of an earlier run go, when the recipe's output has `force`; without it others of these names are a
    ConflictError.
    """
    output = prepared.recipe.output
    best_step = slot_run.best_step if slot_run.best_state else slot_run.step
    losses = {line["step"]: line for line in run.metrics()}
    for path in _kept(run):
        step = int(path.stem)
        if step == best_step:
            continue
        name = artifacts.checkpoint_name(output.name, step)
        loss = losses[step].get("validation_loss")
        finite = loss is not None and math.isfinite(loss)
        metrics = {"validation_loss": loss if finite else None, "num_steps": step}
        own = {**facts, "run": run.name, "metrics": metrics, "checkpoint": {"of": output.name, "step": step}}
        slot = prepared.base.host.attach(prepared.techniques, seed=prepared.recipe.train.seed)
        try:
            slot.load(load_tensors(path))
            what = (name, prepared.base, slot, prepared.techniques, own)
            force = output.force or artifacts.made_by(name, run.name)
            artifacts.save(*what, training_state=slot.bake(), force=force)
        finally:
            prepared.base.host.detach(slot)
    if output.force and output.checkpoints:
        for earlier in artifacts.checkpoints(output.name).values():
            if earlier.manifest["run"] != run.name:
                artifacts.remove(earlier)


def check_free(recipe: TuneRecipe) -> None:
    """Raise ConflictError when the artifact's name, or those of its checkpoints, are taken and may not be replaced."""
    output = recipe.output
    artifacts.check_free(output.name, output.force, recipe.added_task)
    if output.checkpoints and not output.force and (taken := artifacts.checkpoints(output.name)):
        raise ConflictError(
            f"there are checkpoints of {output.name!r} already: {', '.join(one.name for one in taken.values())}",
            hint="choose another name, or use --force",
        )


def _kept(run: Run) -> list[Path]:
    return sorted((run.folder / FOLDER).glob("*.safetensors"), key=lambda path: int(path.stem))
