"""The training of prepared runs side by side: each has its own folder, checkpoint and end. One run is a case of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tailor.errors import InterruptedRunError, ResourceError
from tailor.recipes.tune_checkpoints import keep_state, save_states
from tailor.recipes.tune_prepare import Prepared
from tailor.recipes.tune_save import TuneResult, facts_of, save
from tailor.runs import Run, Status
from tailor.training.checkpoint import load_checkpoint, save_checkpoint
from tailor.training.interrupt import StopRequest, stop_on_signal
from tailor.training.progress import Track, peak_memory, show_progress
from tailor.training.track import tensorboard_writer
from tailor.training.trainer import Listener, SlotRun, StepReport, Trainer, finish


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its result, or the error that ended it and no other."""

    name: str
    run: Run | None
    result: TuneResult | None = None
    error: Exception | None = None

    def checked(self) -> TuneResult:
        """The result. Raises the error when there is none."""
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


@dataclass(eq=False)
class _Job:
    """A run under way."""

    prepared: Prepared
    run: Run
    slot_run: SlotRun
    write: Listener | None = None

    @property
    def name(self) -> str:
        return self.slot_run.name

    def keep(self) -> None:
        """Keep the state of an epoch that has just ended, where the recipe wants that."""
        keep_state(self.prepared, self.run, self.slot_run)

    def checkpoint(self) -> None:
        save_checkpoint(self.run.folder, [self.slot_run])

    def log(self, report: StepReport) -> None:
        """Append a step to `metrics.jsonl`, and to TensorBoard's events when they are wanted."""
        values: dict[str, Any] = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            "tokens_per_second": round(report.tokens_per_second, 1),
            "seconds": round(report.seconds, 4),
            "num_tokens": self.slot_run.num_tokens,
            "peak_memory": peak_memory(self.prepared.base.device),
        }
        if report.validation_loss is not None:
            values["validation_loss"] = report.validation_loss
        self.run.log(report.step, **values)
        if self.write is not None:
            self.write(report)


def train(
    parts: Sequence[tuple[Prepared, Run]], resumed_by: str, *, detach: bool = False, quiet: bool = False
) -> list[Outcome]:
    """Train runs of one base in the same passes, from their checkpoints where they have some; outcomes in their order.

    A run that is done is saved at once (and detached, with `detach`) while the others go on; one that fails has its
    error in its outcome. What ends all of them is raised: InterruptedRunError after a signal, when every checkpoint is
    saved (`resumed_by` names what to resume), and ResourceError when a step does not fit into memory.
    """
    jobs = [_Job(prepared, run, prepared.slot_run()) for prepared, run in parts]
    outcomes: dict[str, Outcome] = {}
    with ExitStack() as held:
        for job in jobs:
            held.enter_context(job.run.lock())
        request = held.enter_context(stop_on_signal())
        for job in jobs:
            load_checkpoint(job.run.folder, [job.slot_run])
        for job in jobs:
            job.run.truncate(job.slot_run.step)
            job.run.set_status("running")
        with _told_to_those_left(jobs):
            _loop(jobs, outcomes, request, resumed_by, detach=detach, quiet=quiet)
    return [outcomes[prepared.recipe.output.name] for prepared, _ in parts]


@contextmanager
def _told_to_those_left(jobs: Sequence[_Job]) -> Iterator[None]:
    """What ends the block also ends the runs that are still in `jobs`: their folders say so, their slots go."""
    try:
        yield
    except BaseException as error:
        status: Status = "interrupted" if isinstance(error, InterruptedRunError) else "failed"
        for job in jobs:
            job.run.set_status(status)
            job.prepared.base.host.detach(job.prepared.slot)
        if isinstance(error, torch.OutOfMemoryError):
            raise _does_not_fit(jobs) from error
        raise


def _loop(
    jobs: list[_Job], outcomes: dict[str, Outcome], request: StopRequest, resumed_by: str, *, detach: bool, quiet: bool
) -> None:
    """Steps until every job is done; those that are leave `jobs` for `outcomes`."""
    base = jobs[0].prepared.base
    names = [job.name for job in jobs]
    by_name = {job.name: job for job in jobs}
    for job in jobs:
        job.write = tensorboard_writer(job.run.folder) if job.prepared.recipe.train.tensorboard else None
    tracks = [Track(job.name, job.slot_run.resolved.num_steps, job.slot_run.step) for job in jobs]
    with show_progress(tracks, quiet=quiet, device=base.device) as show:

        def listen(report: StepReport) -> None:
            by_name[report.name].log(report)
            show(report)

        trainer = Trainer(base, [job.slot_run for job in jobs], listen)
        while jobs:
            if not trainer.done:
                trainer.step()
                for job in jobs:
                    job.keep()
            request.stop_if_asked(lambda: _save_all(jobs), *_stopped(jobs, resumed_by))
            for job in list(jobs):
                if not job.slot_run.active or job.slot_run.step % job.slot_run.resolved.checkpoint_every == 0:
                    job.checkpoint()
                if not job.slot_run.active:
                    outcomes[job.name] = _settled(job, [name for name in names if name != job.name])
                    jobs.remove(job)
                    del by_name[job.name]
                    trainer.leave(job.slot_run)
                    if detach or outcomes[job.name].error is not None:
                        base.host.detach(job.prepared.slot)


def _save_all(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        job.checkpoint()


def _stopped(jobs: Sequence[_Job], resumed_by: str) -> tuple[str, str]:
    """Message and hint of an interruption."""
    if len(jobs) == 1:
        return f"stopped at step {jobs[0].slot_run.step}; the checkpoint is saved", f"tailor resume {jobs[0].run.name}"
    steps = ", ".join(f"{job.name} at step {job.slot_run.step}" for job in jobs)
    return f"stopped ({steps}); the checkpoints are saved", f"tailor resume {resumed_by}"


def ended(name: str, run: Run | None, save: Callable[[], TuneResult]) -> Outcome:
    """The outcome of a run whose last step is to `save`. A full disk and an interruption are raised: all have them."""
    try:
        return Outcome(name, run, save())
    except (InterruptedRunError, OSError):
        raise
    except Exception as error:
        return Outcome(name, run, error=error)


def _settled(job: _Job, others: Sequence[str]) -> Outcome:
    """Bake and save what a job has come to, or take down why it failed."""
    run, slot_run = job.run, job.slot_run
    outcome = ended(job.name, run, lambda: _saved(job, others))
    if outcome.result is None:
        run.set_status("failed", error=str(outcome.error))
    else:
        run.set_status("finished", artifact=outcome.result.artifact.name, best_step=slot_run.best_step)
    return outcome


def _saved(job: _Job, others: Sequence[str]) -> TuneResult:
    """The artifact last: when it is there, so are its checkpoints."""
    training_state = finish(job.slot_run)
    save_states(job.prepared, job.run, job.slot_run, facts_of(job.prepared))
    return save(job.prepared, job.run, job.slot_run, training_state, shared_with=others)


def _does_not_fit(jobs: Sequence[_Job]) -> ResourceError:
    step = min(job.slot_run.step for job in jobs) + 1
    tokens = min(job.slot_run.settings.tokens_per_batch for job in jobs)
    fewer = "train fewer at once, or " if len(jobs) > 1 else ""
    return ResourceError(
        f"step {step} does not fit into the memory of {jobs[0].prepared.base.device}",
        hint=f"{fewer}lower train.tokens_per_batch (it was {tokens}; the result is the same)",
    )
