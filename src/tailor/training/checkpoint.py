"""Checkpoints: all it takes to go on to bit-identical losses. Written atomically, so a kill leaves the one before.

A run's random numbers come from (seed, step, …) and its rows from (seed, epoch), so a checkpoint holds no generator
state: parameters, moments, best weights, and counters.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from tailor.errors import ConflictError, DataError
from tailor.store import atomic_folder, recover, write_json, writing
from tailor.training.trainer import SlotRun

FOLDER = "checkpoint"


def save_checkpoint(folder: Path, runs: list[SlotRun]) -> None:
    """Replace the checkpoint in a run folder."""
    from safetensors.torch import save_file

    with atomic_folder(folder / FOLDER, force=True) as draft:
        for number, run in enumerate(runs):
            tensors = {f"optimizer/{name}": tensor for name, tensor in run.optimizer.state().items()}
            tensors |= {f"best/{name}": tensor.contiguous() for name, tensor in run.best_state.items()}
            with writing(folder / FOLDER):
                save_file(tensors, draft / f"{number}.safetensors")
            write_json(draft / f"{number}.json", _counters(run))


def _counters(run: SlotRun) -> dict[str, object]:
    return {
        "name": run.name,
        "parameters": {name: list(p.shape) for name, p in run.slot.parameters.items()},
        "step": run.step,
        "num_tokens": run.num_tokens,
        "best_loss": run.best_loss if math.isfinite(run.best_loss) else None,
        "best_step": run.best_step,
        "stale": run.stale,
        "stopped": run.stopped,
    }


def load_checkpoint(folder: Path, runs: list[SlotRun]) -> bool:
    """Put the runs where the checkpoint left them; False when there is none. Raises ConflictError for another's."""
    from safetensors.torch import load_file

    recover(folder / FOLDER)
    if not (folder / FOLDER).is_dir():
        return False
    for number, run in enumerate(runs):
        try:
            counters = json.loads((folder / FOLDER / f"{number}.json").read_text("utf-8"))
            tensors = load_file(folder / FOLDER / f"{number}.safetensors")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / FOLDER}: the checkpoint is damaged: {error}") from None
        if counters["parameters"] != _counters(run)["parameters"]:
            raise ConflictError(f"{folder / FOLDER}: the checkpoint's parameters are not those of this recipe")
        run.optimizer.load({k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")})
        run.best_state = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        run.best_loss = math.inf if counters["best_loss"] is None else float(counters["best_loss"])
        run.best_step, run.stale, run.stopped = counters["best_step"], counters["stale"], counters["stopped"]
        run.step, run.num_tokens = counters["step"], counters["num_tokens"]
    return True
