"""Tune: rows in, a working customization out. And resume: go on from a checkpoint to the same result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Self

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import Artifact
from tailor.config import Strict, dump_yaml, load_recipe
from tailor.data.dataset import Dataset, DataSettings, load_dataset
from tailor.data.examples import Bundle, Rendering
from tailor.data.progress import Progress, silent, stages
from tailor.data.records import Record, completion_of
from tailor.data.tokenise import tokenise
from tailor.errors import ConfigError, ConflictError, DataError, InterruptedRunError, ResourceError, TailorError
from tailor.evaluation.parity import MAX_TWIN_PARAMETERS
from tailor.evaluation.task import MAX_LABELS, find_task
from tailor.models.base import Base, dtype_name, load_base
from tailor.models.files import absolute_name
from tailor.models.slots import Slot
from tailor.objectives import check_consumed, find_objective
from tailor.objectives.objective import Objective
from tailor.recipes.verify import rendering_for, verify_artifact
from tailor.runs import Run
from tailor.techniques import Technique, TechniqueList
from tailor.techniques.technique import training_defaults
from tailor.training.checkpoint import load_checkpoint, save_checkpoint
from tailor.training.interrupt import StopRequest, stop_on_signal
from tailor.training.progress import peak_memory, show_progress
from tailor.training.settings import Resolved, TrainSettings, resolve_settings
from tailor.training.track import tensorboard_writer
from tailor.training.trainer import SlotRun, StepReport, Trainer, finish


class BaseSettings(Strict):
    """The `base` block; a plain name will do."""

    name: str = Field("tailor-nano", description="tailor-nano (embedded), a local folder, or a hub id")
    device: str = Field("auto", description="auto, cpu, cuda or mps")
    dtype: str = Field("auto", description="auto, float32, bfloat16, float16")

    def absolute(self) -> Self:
        """With the absolute path where the name is that of a local folder."""
        return self.model_copy(update={"name": absolute_name(self.name)})


def named_base(base: Any) -> Any:
    """`base: tailor-nano` is short for `base: {name: tailor-nano}`; with overrides on it it arrives as `type`."""
    if isinstance(base, str):
        return {"name": base}
    if isinstance(base, dict) and isinstance(base.get("type"), str):
        return {"name": base["type"], **{key: value for key, value in base.items() if key != "type"}}
    return base


class OutputSettings(Strict):
    """The `output` block."""

    name: str = Field(description="the artifact's name")
    force: bool = Field(False, description="replace an artifact of that name")
    verify: bool = Field(True, description="prove at the end that what was trained is what is served")


class TuneRecipe(Strict):
    """A tuning run. A resolved recipe alone repeats it."""

    base: Annotated[BaseSettings, BeforeValidator(named_base)] = BaseSettings()
    data: DataSettings
    technique: TechniqueList
    start: str | None = Field(None, description="an artifact of the same technique: training goes on from it")
    objective: str = Field("sft", description="what is optimised")
    train: TrainSettings = TrainSettings()
    output: OutputSettings

    @field_validator("technique")
    @classmethod
    def _full_runs_alone(cls, techniques: tuple[Technique, ...]) -> tuple[Technique, ...]:
        if len(techniques) > 1 and (owners := [t.type for t in techniques if not t.traits.frozen_base]):
            raise ValueError(f"{owners[0]} changes the base itself and cannot be combined with others")
        return techniques


@dataclass(frozen=True)
class TuneResult:
    """What a run came to. `artifact.manifest` holds metrics and the parity record."""

    artifact: Artifact
    run: Run | None
    dataset: Dataset
    base: Base
    slot: Slot
    seconds: float


@dataclass(frozen=True)
class _Prepared:
    """A run that is ready to train: everything up to the first step, rebuilt the same way when it is resumed."""

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
        }


def tune(
    recipe: TuneRecipe | str | Path, overrides: Sequence[str] = (), *, base: Base | None = None, quiet: bool = False
) -> TuneResult:
    """Tune a base on rows and save the artifact. `recipe` is a TuneRecipe or the path of one (with `overrides`).

    `base` is one that is loaded already; else the recipe's is loaded. Raises the errors of its steps (ConfigError,
    DataError, ConflictError, …); an interrupted run raises InterruptedRunError after saving its checkpoint, and
    `resume` goes on from there.
    """
    if not isinstance(recipe, TuneRecipe):
        recipe = load_recipe(recipe, TuneRecipe, overrides).recipe
    elif overrides:
        raise ConfigError("overrides go with the path of a recipe; change a TuneRecipe with model_copy(update=…)")
    artifacts.check_free(recipe.output.name, recipe.output.force)
    recipe = _absolute(recipe)
    prepared = _prepare(recipe, base, quiet=quiet)
    if not prepared.slot.parameters:
        return _save(prepared, None, None)
    manifest = {**prepared.facts, "num_threads": torch.get_num_threads()}
    run = Run.create(recipe.output.name, dump_yaml(recipe.model_dump(mode="json")), manifest)
    return _train(prepared, run, quiet=quiet)


def resume(name_or_path: str | Path, *, quiet: bool = False) -> TuneResult:
    """Go on with an interrupted or killed run, to the losses it would have had.

    Raises NotFoundError, ConflictError when it is finished, in use, or when its data, base, device or precision are
    not those it began with.
    """
    run = Run.open(name_or_path)
    manifest = run.manifest
    if manifest["status"] == "finished":
        raise ConflictError(f"run {run.name} is finished already", hint=f"its artifact is {manifest.get('artifact')!r}")
    recipe = load_recipe(run.folder / "recipe.yaml", TuneRecipe).recipe
    torch.set_num_threads(int(manifest["num_threads"]))  # sums are rounded by how they are cut up
    prepared = _prepare(recipe, None, quiet=quiet)
    changed = [key for key, value in prepared.facts.items() if manifest.get(key) != value]
    if changed:
        was = ", ".join(f"{key} was {manifest.get(key)}, is {prepared.facts[key]}" for key in changed)
        raise ConflictError(
            f"run {run.name} cannot be resumed: something has changed since it began ({was})",
            hint="restore it, or start anew with `tailor tune`",
        )
    return _train(prepared, run, quiet=quiet)


def _absolute(recipe: TuneRecipe) -> TuneRecipe:
    """The recipe with absolute paths, so that it can be resumed and verified from any folder."""
    paths = {"train": recipe.data.train, "validation": recipe.data.validation}
    found = {key: str(Path(path).expanduser().absolute()) for key, path in paths.items() if path is not None}
    return recipe.model_copy(update={"base": recipe.base.absolute(), "data": recipe.data.model_copy(update=found)})


def _prepare(recipe: TuneRecipe, base: Base | None, *, quiet: bool) -> _Prepared:
    objective = find_objective(recipe.objective)
    with stages(quiet) as progress:
        dataset = load_dataset(recipe.data, recipe.train.seed, progress)
    check_consumed(objective, dataset.train, dataset.validation)
    base = base or load_base(recipe.base.name, recipe.base.device, recipe.base.dtype)
    techniques = tuple(technique.prepare(dataset.train, recipe.train.seed) for technique in recipe.technique)
    slot = base.host.attach(techniques, seed=recipe.train.seed)
    try:
        if recipe.start is not None:
            artifacts.start_from(slot, artifacts.find(recipe.start))
        rendering = rendering_for(recipe.data, base, slot)
        with stages(quiet) as progress:
            train, dropped = bundles_of(dataset.train, objective, rendering, techniques, progress)
            validation, dropped_too = bundles_of(dataset.validation, objective, rendering, techniques, progress)
    except BaseException:
        base.host.detach(slot)  # the base may be the caller's, to be used again
        raise
    notes = (*dataset.notes, *_dropped_note((dropped, dropped_too), rendering))
    return _Prepared(recipe, base, dataset, techniques, slot, rendering, objective, train, validation, notes)


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


def _dropped_note(sides: Sequence[Sequence[Record]], rendering: Rendering) -> list[str]:
    num_dropped = sum(len(side) for side in sides)
    if not num_dropped:
        return []
    first = [str(record.source) for record in islice(chain(*sides), 10)]
    some = ", ".join(first) + (", …" if num_dropped > len(first) else "")
    return [f"{num_dropped} rows are longer than {rendering.max_seq_len} tokens and were dropped ({some})"]


def _resolved(prepared: _Prepared) -> Resolved:
    defaults = training_defaults(prepared.techniques)
    return resolve_settings(prepared.recipe.train, defaults, len(prepared.train), prepared.base.host.embedding_rms())


def _train(prepared: _Prepared, run: Run, *, quiet: bool) -> TuneResult:
    recipe = prepared.recipe
    slot_run = SlotRun(
        recipe.output.name,
        prepared.slot,
        prepared.objective,
        prepared.train,
        prepared.validation,
        recipe.train,
        _resolved(prepared),
    )
    with run.lock(), stop_on_signal() as request:
        load_checkpoint(run.folder, [slot_run])
        run.truncate(slot_run.step)
        run.set_status("running")
        try:
            _loop(prepared, run, slot_run, request, quiet=quiet)
            result = _save(prepared, run, slot_run, finish(slot_run))
        except InterruptedRunError:
            run.set_status("interrupted")
            raise
        except torch.OutOfMemoryError as error:
            run.set_status("failed")
            raise ResourceError(
                f"step {slot_run.step + 1} does not fit into the memory of {prepared.base.device}",
                hint=f"lower train.tokens_per_batch (it was {recipe.train.tokens_per_batch}; the result is the same)",
            ) from error
        except BaseException:
            run.set_status("failed")
            raise
        run.set_status("finished", artifact=result.artifact.name, best_step=slot_run.best_step)
    return result


def _loop(prepared: _Prepared, run: Run, slot_run: SlotRun, request: StopRequest, *, quiet: bool) -> None:
    writer = tensorboard_writer(run.folder) if prepared.recipe.train.tensorboard else None
    device, num_steps = prepared.base.device, slot_run.resolved.num_steps
    with show_progress(slot_run.name, num_steps, slot_run.step, quiet=quiet, device=device) as show:

        def listen(report: StepReport) -> None:
            _log(run, report, slot_run, device)
            if writer is not None:
                writer(report)
            show(report)

        trainer = Trainer(prepared.base, [slot_run], listen)
        while not trainer.done:
            trainer.step()
            told = f"stopped at step {slot_run.step}; the checkpoint is saved"
            request.stop_if_asked(run.folder, [slot_run], told, hint=f"tailor resume {run.name}")
            if trainer.done or slot_run.step % slot_run.resolved.checkpoint_every == 0:
                save_checkpoint(run.folder, [slot_run])


def _labels(records: Sequence[Record]) -> list[str] | None:
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


def _log(run: Run, report: StepReport, slot_run: SlotRun, device: torch.device) -> None:
    values: dict[str, Any] = {
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "tokens_per_second": round(report.tokens_per_second, 1),
        "seconds": round(report.seconds, 4),
        "num_tokens": slot_run.num_tokens,
        "peak_memory": peak_memory(device),
    }
    if report.validation_loss is not None:
        values["validation_loss"] = report.validation_loss
    run.log(report.step, **values)


def _save(
    prepared: _Prepared,
    run: Run | None,
    slot_run: SlotRun | None,
    training_state: Mapping[str, Tensor] = MappingProxyType({}),
) -> TuneResult:
    recipe = prepared.recipe
    facts: dict[str, Any] = {
        "recipe": recipe.model_dump(mode="json"),
        "objective": recipe.objective,
        "data": {
            "content_hash": prepared.dataset.content_hash,
            "num_train": len(prepared.train),
            "num_validation": len(prepared.validation),
        },
        "labels": _labels(prepared.dataset.train),
        "notes": list(prepared.notes),
    }
    seconds = 0.0
    if slot_run is not None and run is not None:
        seconds = sum(float(line.get("seconds", 0.0)) for line in run.metrics())
        facts["run"] = run.name
        facts["metrics"] = {
            "validation_loss": slot_run.best_loss if slot_run.best_state else None,
            "best_step": slot_run.best_step,
            "num_steps": slot_run.step,
            "stopped": slot_run.stopped,
            "num_tokens": slot_run.num_tokens,
            "seconds": round(seconds, 2),
            "peak_memory": peak_memory(prepared.base.device),
        }
    force = recipe.output.force or (run is not None and artifacts.made_by(recipe.output.name, run.name))
    what = (recipe.output.name, prepared.base, prepared.slot, prepared.techniques, facts)
    artifact = artifacts.save(*what, training_state=training_state, force=force)
    if recipe.output.verify:
        artifact = artifacts.update_manifest(artifact, parity=_parity(artifact, prepared))
    return TuneResult(artifact, run, prepared.dataset, prepared.base, prepared.slot, seconds)


def _parity(artifact: Artifact, prepared: _Prepared) -> dict[str, Any]:
    """The parity record. When the check itself cannot run (memory, disk), the artifact stays and the record says so."""
    copies = prepared.base.num_parameters < MAX_TWIN_PARAMETERS
    try:
        parity = verify_artifact(
            artifact, prepared.base, prepared.slot, prepared.rendering, prepared.dataset.validation, copies=copies
        )
    except (TailorError, RuntimeError, MemoryError, OSError) as error:
        return {"passed": None, "hops": [], "noise_floor": None, "error": f"{type(error).__name__}: {error}"}
    return parity.to_dict()
