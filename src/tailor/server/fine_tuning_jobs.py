"""Fine-tuning jobs: taken, checked, handed to the queue as recipes, and shown; and the models that they made."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import statistics
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.artifacts import artifact as artifacts
from tailor.config import write_resolved
from tailor.errors import ConflictError, TailorError, UnavailableError
from tailor.jobs.outcome import run_of
from tailor.jobs.process import take_lock
from tailor.jobs.queue import Queue
from tailor.jobs.tables import Job, NewJob, new_id
from tailor.jobs.worker import folder_of
from tailor.recipes.tune_settings import BaseSettings, TuneRecipe
from tailor.runs import home
from tailor.server.errors import NO_RETRY, ApiError, invalid, without_paths
from tailor.server.file_store import FileStore
from tailor.server.fine_tuning_recipe import (
    Bases,
    FineTuningSettings,
    Start,
    check_integrations,
    method_of,
    names_of,
    pool_of,
    recipe_of,
    starting_point,
)
from tailor.server.fine_tuning_rows import Refused, check_rows
from tailor.server.job_events import STEP, kept, kept_states, model_of_checkpoint, results_csv
from tailor.server.protocol_jobs import RESULTS, CreateJob, FineTuningJob, JobError, JobHyperparameters
from tailor.store import text_hash

log = logging.getLogger(__name__)

ERRORS: Mapping[str, tuple[str, str | None]] = {
    "data": ("invalid_training_file", "training_file"),
    "resources": ("out_of_memory", None),
    "config": ("invalid_value", None),
}
"""A process's error code → the job's, and the parameter that is to blame."""

LOOK_SECONDS = 2.0
"""How often jobs are looked for that another server took and did not come to check."""


@dataclass(frozen=True)
class FineTuned:
    """A model that a job has made: its id, the artifact that it is, and when it was finished (seconds since 1970)."""

    id: str
    artifact: str
    base: str
    job_id: str
    created: int


class FineTuning:
    """Takes jobs for the bases that are served. `start` checks the files of new jobs in a thread."""

    def __init__(
        self, queue: Queue, files: FileStore, bases: Bases, settings: FineTuningSettings | None = None
    ) -> None:
        self.queue = queue
        self.files = files
        self.settings = settings or FineTuningSettings()
        self._bases = bases
        self._made: dict[str, str] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # --- taking ------------------------------------------------------------------------------------------------------

    def create(self, request: CreateJob, *, key: str | None = None, caller: str = "", retried: bool = False) -> Job:
        """Take a job. The same request again (by its idempotency `key`, or `retried` as its caller says) is that job.

        Raises ApiError for what can be known to be wrong before the rows are read.
        """
        check_integrations(request)
        kind, numbers = method_of(request)
        start = starting_point(request.model, self._bases, self.artifact_of)
        self._check_files(request)
        seed = request.seed if request.seed is not None else secrets.randbelow(2**31)
        tail, organization = new_id("", 8), self.settings.organization
        model, name = names_of(request.model, start, request.suffix, organization, tail)
        files = [Path("train.jsonl"), Path("validation.jsonl")][: 2 if request.validation_file else 1]
        recipe = recipe_of(request, start, self.settings, name=name, seed=seed, files=files)
        asked = request.model_dump(mode="json", exclude_unset=True)
        facts = {
            "request": asked,
            "method": kind,
            "numbers": numbers.model_dump(include=set(JobHyperparameters.model_fields)),
            "seed": seed,
            "technique": "+".join(technique.type for technique in recipe.technique),
            "base": start.base.model_dump(mode="json"),
            "start": start.artifact.name if start.artifact else None,
        }
        new = NewJob(
            id=new_id("ftjob-"),
            name=name,
            model=model,
            facts=facts,
            body_hash=text_hash(caller + json.dumps(asked, sort_keys=True)),
            pool=pool_of(recipe),
            idempotency=text_hash(f"{caller}\n{key}") if key else None,
        )
        try:
            job = self.queue.put(new, retried=retried)
        except ConflictError as error:
            raise ApiError(409, error.message, code="idempotency_key_reused", headers=NO_RETRY) from error
        self._wake.set()
        return job

    def _check_files(self, request: CreateJob) -> None:
        for param in ("training_file", "validation_file"):
            if (file_id := getattr(request, param)) is None:
                continue
            purpose = self.files.get(file_id, param).purpose
            if purpose != "fine-tune":
                raise invalid(param, f"{file_id} has the purpose {purpose!r}; upload it with the purpose 'fine-tune'.")

    # --- checking the files ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Check the files of jobs in a thread until `stop`."""
        self._thread = threading.Thread(target=self._check_all, name="tailor-validation", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop; what is being checked is finished first."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _check_all(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self.check_waiting()
            except UnavailableError:  # the database says so itself
                pass
            except Exception:
                log.exception("the files of new jobs could not be checked; trying again")
            self._wake.wait(LOOK_SECONDS)

    def check_waiting(self) -> None:
        """Check the files of every new job: those that are good are queued, the others have failed.

        What another server on this machine is at is left to it; one elsewhere may do it a second time, to no effect.
        Raises UnavailableError, which says nothing about a job.
        """
        for job in self.queue.with_status("validating_files"):
            if self._stopping:
                return
            self._check_one(job)

    def _check_one(self, job: Job) -> None:
        try:
            lock = take_lock(folder_of(job.id) / "checking", seconds=0)
            if lock is None:
                return
            try:
                if self.queue.get(job.id).status == "validating_files":
                    self._check(job)
            finally:
                os.close(lock)
        except UnavailableError:
            raise
        except Refused as error:
            self.queue.refused(job.id, error.facts)
        except ApiError as error:
            facts = {"code": error.code or "invalid_value", "message": error.message, "param": error.param}
            self.queue.refused(job.id, facts)
        except Exception as error:
            log.exception("the files of job %s could not be checked", job.id)
            told = without_paths(error.message) if isinstance(error, TailorError) else "The files cannot be checked."
            self.queue.refused(job.id, {"code": "internal_error", "message": told, "param": None})

    def _check(self, job: Job) -> None:
        request = CreateJob.model_validate(job.facts["request"])
        self._copy(job, request)
        recipe = self._recipe(job, request)
        numbers = check_rows(recipe, self.settings.min_rows)
        write_resolved(recipe, folder_of(job.id) / "recipe.yaml")
        multiplier = recipe.train.learning_rate_multiplier
        resolved = {
            "n_epochs": numbers.num_epochs,
            "batch_size": numbers.batch_size,
            "learning_rate_multiplier": multiplier,
        }
        messages = [f"Files validated: {numbers.told}", "Files validated, moving job to queued state"]
        self.queue.prepared(job.id, {**job.facts, "resolved": resolved}, numbers.num_steps, messages)

    def _recipe(self, job: Job, request: CreateJob) -> TuneRecipe:
        facts, folder = job.facts, folder_of(job.id)
        artifact = artifacts.find(facts["start"]) if facts["start"] else None
        files = [folder / "train.jsonl", folder / "validation.jsonl"][: 2 if request.validation_file else 1]
        start = Start(BaseSettings(**facts["base"]), artifact)
        return recipe_of(request, start, self.settings, name=job.name, seed=facts["seed"], files=files)

    def _copy(self, job: Job, request: CreateJob) -> None:
        """Give the job its own names for its files, so that deleting them does not hurt it."""
        folder = folder_of(job.id)
        folder.mkdir(parents=True, exist_ok=True)
        for param, name in (("training_file", "train.jsonl"), ("validation_file", "validation.jsonl")):
            if (file_id := getattr(request, param)) is None or (folder / name).exists():
                continue
            path = self.files.path(self.files.get(file_id, param))
            try:
                os.link(path, folder / name)
            except FileNotFoundError:
                self.files.get(file_id, param)
                raise
            except FileExistsError:  # another server was faster
                continue
            except OSError:  # another disk, or one without links
                draft = folder / f".{name}.{secrets.token_hex(4)}.tmp"
                shutil.copyfile(path, draft)
                draft.rename(folder / name)

    # --- what became of them -----------------------------------------------------------------------------------------

    def finished(self, job: Job, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the results file of a job; what the job is to remember of its result. For the worker."""
        run, metrics = run_of(job.name), result.get("metrics") or {}
        lines = run.metrics() if run is not None else []
        file_id = f"file-{text_hash(job.id)[:24]}"
        self.files.add(results_csv(lines), filename="step_metrics.csv", purpose=RESULTS, id=file_id)
        steps = {step: one.name for step, one in artifacts.checkpoints(job.name).items()}
        measured = metrics.get("validation_loss") is not None
        best = metrics.get("best_step" if measured else "num_steps", 0)
        return {
            "artifact": job.name,
            "result_files": [file_id],
            "trained_tokens": metrics.get("num_tokens", 0),
            "checkpoints": [_json(facts) for facts in kept(best, steps, job.name, lines)],
        }

    def artifact_of(self, model: str) -> str | None:
        """The artifact that a model of a job is, as long as it is there; None for other names."""
        if model not in self._made:
            if not model.startswith("ft:") or len(model) > 400 or not model.isprintable():
                return None
            job = self.queue.of_model(model.partition(STEP)[0])
            if job is None or job.status != "succeeded":
                return None
            self._made |= _models_of(job)
        name = self._made.get(model)
        return name if name is not None and is_there(name) else None

    def fine_tuned(self) -> list[FineTuned]:
        """All models that jobs have made, checkpoints included, and that are still there, oldest first."""
        return [
            FineTuned(model, name, job.facts["request"]["model"], job.id, job.finished_at or job.created_at)
            for job in self.queue.with_status("succeeded")
            for model, name in _models_of(job).items()
            if is_there(name)
        ]

    def show(self, job: Job) -> FineTuningJob:
        """A job in OpenAI's words."""
        facts, result = job.facts, job.result or {}
        request = CreateJob.model_validate(facts["request"])
        kind = facts["method"]
        numbers = JobHyperparameters(**{**facts["numbers"], **facts.get("resolved", {})})
        done = job.status == "succeeded"
        tailor = {"technique": facts["technique"], "step": job.logged, "num_steps": job.num_steps}
        return FineTuningJob(
            id=job.id,
            created_at=job.created_at,
            finished_at=job.finished_at,
            estimated_finish=_estimated_finish(job),
            model=request.model,
            fine_tuned_model=job.model if done else None,
            organization_id=self.settings.organization,
            status=job.status,
            training_file=request.training_file,
            validation_file=request.validation_file,
            result_files=list(result.get("result_files", [])),
            hyperparameters=numbers,
            method={"type": kind, kind: {"hyperparameters": numbers.model_dump()}},
            seed=facts["seed"],
            trained_tokens=result.get("trained_tokens"),
            error=_error(job),
            integrations=[],
            metadata=request.metadata,
            tailor={**tailor, "artifact": job.name if done else None},
        )


def is_there(name: str) -> bool:
    """Whether there is an artifact of this name."""
    return (home() / "artifacts" / name / artifacts.MANIFEST).is_file()


def _models_of(job: Job) -> dict[str, str]:
    """The models that a job has made, and their artifacts."""
    states = {model_of_checkpoint(job, facts): facts["artifact"] for facts in kept_states(job)}
    return {job.model: job.name, **states}


def _error(job: Job) -> JobError | None:
    if job.error is None:
        return None
    code, param = ERRORS.get(job.error["code"], (job.error["code"], job.error.get("param")))
    hint = job.error.get("hint")
    message = job.error["message"] if not hint else f"{job.error['message']} ({hint})"
    return JobError(code=code, message=without_paths(message), param=param)


def _estimated_finish(job: Job) -> int | None:
    """When a running job will be done, by the seconds that its steps have taken."""
    if job.status != "running" or not job.num_steps:
        return None
    with contextlib.suppress(TailorError, OSError):
        run = run_of(job.name)
        taken = [float(line["seconds"]) for line in (run.metrics() if run else []) if "seconds" in line]
        if taken:
            return int(time.time() + (job.num_steps - len(taken)) * statistics.fmean(taken[-100:]))
    return None


def _json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without numbers that JSON has none of."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
