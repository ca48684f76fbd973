"""The worker: leases jobs and runs each recipe as `tailor tune` or `tailor resume` in a process of its own.

It knows no technique and holds no model. It may be killed at any moment: what it needs is in the database and in the
jobs' folders, processes go on without it, and the next worker takes them over (or their checkpoints).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from tailor.config import Strict
from tailor.errors import ConflictError, DataError
from tailor.jobs.outcome import Outcome, discard, outcome_of, run_of
from tailor.jobs.process import Process, is_locked, take_lock
from tailor.jobs.queue import Queue
from tailor.jobs.tables import Job, NewEvent, new_id
from tailor.runs import home

_TAILOR = "from tailor.cli.main import main; main()"
_CANCEL_SECONDS = 3.0
"""How long a cancelled process may take to end by itself: nobody wants its checkpoint."""

log = logging.getLogger(__name__)


class WorkerSettings(Strict):
    """How jobs are run beside the server that answers."""

    concurrency: int = Field(1, ge=0, description="processes at a time; 0 only keeps the queue")
    niceness: int = Field(10, ge=0, le=19, description="how far training gives way to answering (nice)")
    num_threads: int | None = Field(None, ge=1, description="threads of a job; half of the cores when not given")
    together: int = Field(1, ge=1, description="queued jobs of one base that are trained in one process")
    poll_seconds: float = Field(0.5, gt=0, description="how often processes and requests are looked at")
    grace_seconds: float = Field(120.0, gt=0, description="how long a paused job may take to save its checkpoint")
    max_crashes: int = Field(3, ge=1, description="how often a process may die without a new step before the job fails")
    lease_seconds: float = Field(
        120.0, gt=0, description="silence after which a worker on another machine counts as lost"
    )

    def threads(self) -> int:
        """The number of threads a job may use."""
        return self.num_threads or max(1, (os.cpu_count() or 1) // 2)


Command = Callable[[Sequence[Job]], Sequence[str]]
Finished = Callable[[Job, Mapping[str, Any]], Mapping[str, Any]]


def tailor_command(jobs: Sequence[Job]) -> list[str]:
    """Go on with the runs of these jobs; or begin them, when they have none. All must be alike in this."""
    runs = [run_of(job.name) for job in jobs]
    verb, what = "tune", [str(folder_of(job.id) / "recipe.yaml") for job in jobs]
    if all(runs):
        verb, what = "resume", [run.name for run in runs if run is not None]
    return [sys.executable, "-P", "-c", _TAILOR, verb, *what, "--json"]


def folder_of(job_id: str) -> Path:
    """Where a job's recipe, rows and output are."""
    return home() / "jobs" / job_id


@dataclass(eq=False)
class _Running:
    """A process and the jobs it is for.

    `deadline` (monotonic) is there when it was asked to stop; `lost`: it died while no worker looked.
    """

    process: Process
    job_ids: list[str]
    deadline: float | None = None
    lost: bool = False
    sizes: dict[str, int] = field(default_factory=dict)


class Worker:
    """Runs the jobs of a queue. `step` does what there is to do now; `start` does so in a thread until `stop`."""

    def __init__(
        self,
        queue: Queue,
        settings: WorkerSettings | None = None,
        *,
        finished: Finished = lambda job, result: result,
        command: Command = tailor_command,
    ) -> None:
        """`finished(job, result)` is called before a job counts as succeeded, again after a kill in between, and
        returns what the job is to remember. `command` makes the command line for jobs that share a process."""
        self.queue = queue
        self.settings = settings or WorkerSettings()
        self.id = new_id("worker-", 16)
        self._finished = finished
        self._command = command
        self._running: list[_Running] = []
        self._seen: dict[str, tuple[str | None, int, float]] = {}
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._last_beat = time.monotonic()
        _forget_dead(queue)
        self._lock = take_lock(_sign_of_life(self.id))

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Work in a thread."""
        self._thread = threading.Thread(target=self._work, name="tailor-jobs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop: processes save their checkpoints, and their jobs wait in the queue for the next worker."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        for running in self._running:
            self._ask_to_stop(running, self.settings.grace_seconds)
        while self._running:
            for running in list(self._running):
                self._look(running)
            time.sleep(min(0.05, self.settings.poll_seconds))
        self.close()
        _sign_of_life(self.id).unlink(missing_ok=True)

    def close(self) -> None:
        """Show no life any more. Processes go on, and another worker takes them over."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self.step()
            except Exception:  # the database may be away for a while; the jobs' processes do not need it
                log.exception("the jobs could not be looked after; trying again")
                self._fence()
            self._stopping.wait(self.settings.poll_seconds)

    def _fence(self) -> None:
        """Stop our processes before another machine may believe that we are lost and go on with the jobs."""
        if time.monotonic() - self._last_beat > self.settings.lease_seconds / 2:
            for running in self._running:
                running.process.signal(signal.SIGKILL)

    def step(self) -> None:
        """Show life, look after the processes, take over those of lost workers, begin what may begin."""
        self.queue.beat(self.id)
        self._last_beat = time.monotonic()
        for running in list(self._running):
            try:
                self._look(running)
            except Exception:  # a full disk, say; the others are looked after, and this one again at the next step
                log.exception("jobs %s could not be looked after; trying again", ", ".join(running.job_ids))
        self._take_over()
        while len(self._running) < self.settings.concurrency and self._begin():
            pass

    # --- beginning ---------------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Lease a job, and others that may share its process; False when none waits."""
        first = self.queue.lease(self.id)
        if first is None:
            return False
        jobs = [first]
        if first.pool is not None:
            begun = run_of(first.name) is not None
            while len(jobs) < self.settings.together:
                other = self.queue.lease(
                    self.id, beside=first, accept=lambda job: (run_of(job.name) is not None) == begun
                )
                if other is None:
                    break
                jobs.append(other)
        running = _Running(Process(folder_of(first.id)), [job.id for job in jobs])
        self._running.append(running)
        try:
            running.process.start(self._command(jobs), self._environment(), self.settings.niceness)
        except (OSError, ConflictError):
            log.exception("the process of job %s could not be started", first.id)
        return True

    def _environment(self) -> dict[str, str]:
        threads = str(self.settings.threads())
        return {**os.environ, "TAILOR_HOME": str(home()), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    # --- looking after -----------------------------------------------------------------------------------------------

    def _look(self, running: _Running) -> None:
        """Report new steps; end the process when nobody wants it; take its results when it is gone."""
        alive = running.process.alive()
        jobs = [self.queue.get(job_id) for job_id in running.job_ids]
        for job in jobs:
            self._report(running, job)
        if not alive:
            for job in jobs:
                self._settle(running, job)
            self._running.remove(running)
        elif running.deadline is not None:
            if time.monotonic() > running.deadline:
                running.process.signal(signal.SIGKILL)
        elif unwanted := [job.status for job in jobs if job.status in ("paused", "cancelled")]:
            everyone = len(unwanted) == len(jobs)
            quick = everyone and "paused" not in unwanted
            self._ask_to_stop(running, _CANCEL_SECONDS if quick else self.settings.grace_seconds)
        else:
            for job in jobs:
                if job.status == "queued":
                    self.queue.run_again(job.id, self.id)

    def _ask_to_stop(self, running: _Running, seconds: float) -> None:
        running.deadline = time.monotonic() + seconds
        running.process.signal(signal.SIGTERM)

    def _settle(self, running: _Running, job: Job) -> None:
        outcome = outcome_of(running.process, job.name) if job.status != "cancelled" else None
        if outcome is None:
            crashed = running.deadline is None and not running.lost
            self.queue.release(job.id, self.id, crashed=crashed, max_crashes=self.settings.max_crashes)
            done = False
        else:
            done = self._end(job, outcome)
        if not done and self.queue.get(job.id).status == "cancelled":
            discard(job.name)

    def _end(self, job: Job, outcome: Outcome) -> bool:
        """Whether the job, if it was not cancelled, has ended with its outcome."""
        if outcome.error is not None:
            return self.queue.failed(job.id, self.id, outcome.error)
        result = self._finished(job, outcome.result or {})
        messages = [f"New fine-tuned model created: {job.model}", "The job has successfully completed"]
        return self.queue.succeeded(job.id, self.id, result, messages)

    def _report(self, running: _Running, job: Job) -> None:
        """Make events of the steps that the run has logged since the last look."""
        run = run_of(job.name)
        path = run.folder / "metrics.jsonl" if run is not None else None
        if run is None or path is None or not path.is_file():
            return
        size = path.stat().st_size
        if running.sizes.get(job.id) == size:
            return
        running.sizes[job.id] = size
        try:
            new = [line for line in run.metrics() if line["step"] > job.logged]
        except DataError:
            log.exception("the metrics of job %s cannot be read", job.id)
            return
        if new:
            self.queue.log(job.id, self.id, new[-1]["step"], [_step_event(line, job.num_steps) for line in new])

    # --- taking over -------------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Adopt the processes, or what they left, of workers that are gone."""
        ours = {job_id for running in self._running for job_id in running.job_ids}
        for job in self.queue.leased():
            if job.id in ours:
                continue
            if job.worker != self.id and not (self._is_lost(job) and self.queue.take_over(job, self.id)):
                continue
            self._seen.pop(job.id, None)
            process = job.process or job.id
            known = next((one for one in self._running if one.process.folder.name == process), None)
            if known is None:
                found = Process(folder_of(process))
                known = _Running(found, [], lost=not found.alive())
                self._running.append(known)
            known.job_ids.append(job.id)

    def _is_lost(self, job: Job) -> bool:
        """Whether the job's worker is gone: its file says so; of one elsewhere, that it has been silent for long."""
        assert job.worker is not None
        file = _sign_of_life(job.worker)
        if file.exists():
            return not is_locked(file)
        seen = self._seen.get(job.id)
        if seen is None or seen[:2] != (job.worker, job.beat):
            self._seen[job.id] = (job.worker, job.beat, time.monotonic())
            return False
        return time.monotonic() - seen[2] > self.settings.lease_seconds


def _sign_of_life(worker: str) -> Path:
    return home() / "jobs" / "workers" / worker


def _forget_dead(queue: Queue) -> None:
    """Remove the files of workers that are gone and have no jobs."""
    needed = {job.worker for job in queue.leased()}
    for file in (home() / "jobs" / "workers").glob("worker-*"):
        if file.name not in needed and not is_locked(file):
            file.unlink(missing_ok=True)


def _step_event(line: Mapping[str, Any], num_steps: int | None) -> NewEvent:
    """A line of `metrics.jsonl` as an event."""
    validation = line.get("validation_loss")
    more = "" if validation is None else f", validation loss={_short(validation)}"
    of = f"/{num_steps}" if num_steps else ""
    message = f"Step {line['step']}{of}: training loss={_short(line.get('loss'))}{more}"
    return NewEvent(message, type="metrics", data={**_plain(line), "num_steps": num_steps})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    """The line without numbers that JSON has none of: a diverged loss is null."""
    return {
        key: value if not isinstance(value, float) or abs(value) < float("inf") else None for key, value in line.items()
    }
