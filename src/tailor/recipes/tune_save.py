"""What a finished tuning run leaves: the artifact with its metrics, its label set and its parity record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import Artifact
from tailor.data.dataset import Dataset
from tailor.data.records import Record, completion_of
from tailor.errors import TailorError
from tailor.evaluation.parity import MAX_TWIN_PARAMETERS
from tailor.evaluation.task import MAX_LABELS, find_task
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.recipes.tune_prepare import Prepared
from tailor.recipes.verify import verify_artifact
from tailor.runs import Run
from tailor.training.progress import peak_memory
from tailor.training.trainer import SlotRun


@dataclass(frozen=True)
class TuneResult:
    """What a run came to. `artifact.manifest` holds metrics and the parity record.

    `slot` is attached to `base` still, unless the run was one of several: theirs are detached as they finish.
    """

    artifact: Artifact
    run: Run | None
    dataset: Dataset
    base: Base
    slot: Slot
    seconds: float


def save(
    prepared: Prepared,
    run: Run | None = None,
    slot_run: SlotRun | None = None,
    training_state: Mapping[str, Tensor] = MappingProxyType({}),
    shared_with: Sequence[str] = (),
) -> TuneResult:
    """Write the artifact of a slot, trained or not; `shared_with` names the runs that were trained in its passes."""
    recipe, facts = prepared.recipe, facts_of(prepared)
    seconds = 0.0
    if slot_run is not None and run is not None:
        seconds = sum(float(line.get("seconds", 0.0)) for line in run.metrics())
        facts["run"] = run.name
        facts["metrics"] = _metrics(prepared, slot_run, seconds) | {"shared_with": list(shared_with)}
    force = recipe.output.force or (run is not None and artifacts.made_by(recipe.output.name, run.name))
    what = (recipe.output.name, prepared.base, prepared.slot, prepared.techniques, facts)
    artifact = artifacts.save(*what, training_state=training_state, force=force, add=recipe.output.add)
    if recipe.output.verify:
        artifact = artifacts.update_manifest(artifact, parity=_parity(artifact, prepared))
    return TuneResult(artifact, run, prepared.dataset, prepared.base, prepared.slot, seconds)


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """What `tailor.json` says of where an artifact comes from."""
    return {
        "recipe": prepared.recipe.model_dump(mode="json"),
        "objective": prepared.recipe.objective,
        "data": {
            "content_hash": prepared.dataset.content_hash,
            "num_train": len(prepared.train),
            "num_validation": len(prepared.validation),
        },
        "labels": labels_of(prepared.dataset.train),
        "notes": list(prepared.notes),
    }


def _metrics(prepared: Prepared, slot_run: SlotRun, seconds: float) -> dict[str, Any]:
    return {
        "validation_loss": slot_run.best_loss if slot_run.best_state else None,
        "best_step": slot_run.best_step,
        "num_steps": slot_run.step,
        "stopped": slot_run.stopped,
        "num_tokens": slot_run.num_tokens,
        "seconds": round(seconds, 2),
        "peak_memory": peak_memory(prepared.base.device),
    }


def labels_of(records: Sequence[Record]) -> list[str] | None:
    """The label set of a classification, for later evaluations; None for other tasks.

    The different completions decide, and that there are twice as many rows; free text is told by its first rows.
    """
    labels: dict[str, None] = {}
    for record in records:
        labels.setdefault(completion_of(record))
        if len(labels) > MAX_LABELS:
            return None
    completions = [*labels] * (2 if len(records) >= 2 * len(labels) else 1)
    task = find_task(completions, completions)
    return list(task.labels) if task.kind == "labels" else None


def _parity(artifact: Artifact, prepared: Prepared) -> dict[str, Any]:
    """The parity record. When the check itself cannot run (memory, disk), the artifact stays and the record says so."""
    copies = prepared.base.num_parameters < MAX_TWIN_PARAMETERS
    try:
        parity = verify_artifact(
            artifact, prepared.base, prepared.slot, prepared.rendering, prepared.dataset.validation, copies=copies
        )
    except (TailorError, RuntimeError, MemoryError, OSError) as error:
        return {"passed": None, "hops": [], "noise_floor": None, "error": f"{type(error).__name__}: {error}"}
    return parity.to_dict()
