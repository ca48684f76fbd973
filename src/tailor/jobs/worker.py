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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from tailor.config import Strict
from tailor.errors import ConflictError, DataError, UnavailableError
from tailor.jobs.database import DATABASE_VARIABLE
from tailor.jobs.outcome import Outcome, discard, outcome_of, run_of
from tailor.jobs.process import IDLE, Process, is_locked, take_lock, this_system
from tailor.jobs.queue import Queue
from tailor.jobs.tables import Job, NewEvent, new_id
from tailor.runs import home

_TAILOR = "from tailor.cli.main import main; main()"
_CANCEL_SECONDS = 3.0
"""How long a cancelled process may take to end by itself: nobody wants its checkpoint."""

_SECRETS = (DATABASE_VARIABLE, "PGPASSWORD", "TAILOR_API_KEY")
"""Environment variables of the server that are not for its jobs."""

log = logging.getLogger(__name__)


class WorkerSettings(Strict):
    """How jobs are run beside the server that answers."""

    concurrency: int = Field(1, ge=0, description="processes at a time; 0 only keeps the queue")
    niceness: int = Field(
        19, ge=0, le=IDLE, description="how far training gives way to answering (nice); 20: it gets idle time only"
    )
    num_threads: int | None = Field(None, ge=1, description="threads of a job; half of the cores when not given")
    together: int = Field(1, ge=1, description="queued jobs of one base that are trained in one process")
    poll_seconds: float = Field(0.5, gt=0, description="how often processes and requests are looked at")
    grace_seconds: float = Field(120.0, gt=0, description="how long a paused job may take to save its checkpoint")
    max_crashes: int = Field(3, ge=1, description="how often a process may die without a new step before the job fails")
    lease_seconds: float = Field(
        120.0, gt=0, description="silence after which a worker on another machine counts as lost; the same for all"
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

    `deadline` (monotonic) is there when it was asked to stop; `lost`: it ends, or ended, with its worker's lease.
    """

    process: Process
    job_ids: list[str]
    deadline: float | None = None
    lost: bool = False
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> str:
        """The jobs, for people."""
        return ", ".join(self.job_ids)


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
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._last_beat = time.monotonic()
        _forget_dead(queue)
        self._lock = take_lock(_sign_of_life(self.id))
        if self._lock is not None:
            os.write(self._lock, this_system().encode())

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Work in a thread; another one sees to it that no process outlives the lease."""
        for name, work in (("tailor-jobs", self._work), ("tailor-jobs-lease", self._guard)):
            self._threads.append(threading.Thread(target=work, name=name, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Stop: processes save their checkpoints, and their jobs wait in the queue for the next worker.

        When the database does not answer, the processes end all the same, and the next worker finds their jobs.
        """
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        for running in self._running:
            self._ask_to_stop(running, self.settings.grace_seconds)
        told = True
        while self._running:
            with suppress(UnavailableError):
                self._beat()
            self._fence()
            for running in [r for r in self._running if not r.process.is_here]:  # none of ours to end; others see to it
                self._running.remove(running)
                told = False
            for running in list(self._running):
                told = self._see_off(running) and told
            time.sleep(min(0.05, self.settings.poll_seconds))
        self.close()
        if told:
            _sign_of_life(self.id).unlink(missing_ok=True)

    def _see_off(self, running: _Running) -> bool:
        """Look after a process that was asked to stop; False when it has ended and the database cannot be told."""
        try:
            self._look(running)
        except UnavailableError:
            if not running.process.alive():
                self._running.remove(running)
                return False
            if running.deadline is not None and time.monotonic() > running.deadline:
                running.process.signal(signal.SIGKILL)
        return True

    def close(self) -> None:
        """Show no life any more. Processes go on, and another worker takes them over."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _work(self) -> None:
        while not self._stopping.is_set():
            try:
                self.step()
            except UnavailableError:  # the database says so itself; for a while the jobs' processes do not need it
                pass
            except Exception:
                log.exception("the jobs could not be looked after; trying again")
            self._stopping.wait(self.settings.poll_seconds)

    def _guard(self) -> None:
        """Fence in time, also while the database keeps the other thread waiting."""
        while not self._stopping.wait(self.settings.lease_seconds / 20):
            self._fence()

    def _fence(self) -> None:
        """Stop our processes before another machine may believe that we are lost and go on with the jobs."""
        if not self._is_late():
            return
        for running in list(self._running):
            if not running.lost:
                log.warning("jobs %s stop for now: the database was not reached for too long", running.names)
            running.lost = True  # no fault of theirs
            running.process.signal(signal.SIGKILL)

    def _is_late(self) -> bool:
        """Whether the lease may be over soon."""
        return self.queue.shared and time.monotonic() - self._last_beat > self.settings.lease_seconds / 2

    def _beat(self) -> None:
        self.queue.beat(self.id)
        self._last_beat = time.monotonic()

    def step(self) -> None:
        """Show life, look after the processes, take over those of lost workers, begin what may begin."""
        self._beat()
        for running in list(self._running):
            try:
                self._look(running)
            except UnavailableError:
                raise
            except Exception:  # a full disk, say; the others are looked after, and this one again at the next step
                log.exception("jobs %s could not be looked after; trying again", running.names)
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
        if self._is_late():
            running.lost = True
            return False
        try:
            running.process.start(self._command(jobs), self._environment(), self.settings.niceness)
        except (OSError, ConflictError):
            log.exception("the process of job %s could not be started", first.id)
        return True

    def _environment(self) -> dict[str, str]:
        threads = str(self.settings.threads())
        ours = {"TAILOR_HOME": str(home()), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        return {name: value for name, value in os.environ.items() if name not in _SECRETS} | ours

    # --- looking after -----------------------------------------------------------------------------------------------

    def _look(self, running: _Running) -> None:
        """Report new steps; end the process when nobody wants it; take its results when it is gone."""
        alive = running.process.alive()
        jobs = [self.queue.get(job_id) for job_id in running.job_ids]
        for job in jobs:
            self._report(running, job)
        if not alive:
            self._settle(running, [job for job in jobs if job.worker == self.id])
        elif any(job.worker != self.id for job in jobs):  # this machine stood still for longer than the lease
            running.process.signal(signal.SIGKILL)
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

    def _settle(self, running: _Running, jobs: Sequence[Job]) -> None:
        """A process is gone: say what became of its jobs."""
        for job in jobs:
            self._settle_one(running, job)
        self._running.remove(running)

    def _settle_one(self, running: _Running, job: Job) -> None:
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
        size, known = path.stat().st_size, running.sizes.get(job.id, 0)
        if size == known:
            return
        new = []
        try:  # only what is new: parsing all of a long run twice a second would hold up the answers
            new = [line for line in run.metrics(known) if line["step"] > job.logged]
        except DataError:
            log.exception("the metrics of job %s cannot be read", job.id)
        if new:
            self.queue.log(job.id, self.id, new[-1]["step"], [_step_event(line, job.num_steps) for line in new])
        running.sizes[job.id] = size

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
                known = _Running(found, [], lost=not (found.alive() and found.is_here))
                self._running.append(known)
            known.job_ids.append(job.id)

    def _is_lost(self, job: Job) -> bool:
        """Whether the job's worker is gone: its file says so; of one elsewhere, that it has been silent for long."""
        assert job.worker is not None
        if (held := self._is_held(job.worker)) is not None:
            return not held
        seen = self._seen.get(job.id)
        if seen is None or seen[:2] != (job.worker, job.beat):
            self._seen[job.id] = (job.worker, job.beat, time.monotonic())
            return False
        return time.monotonic() - seen[2] > self.settings.lease_seconds

    def _is_held(self, worker: str) -> bool | None:
        """Whether a worker holds its file; None when that cannot be told, because it is, or may be, elsewhere."""
        file = _sign_of_life(worker)
        try:
            system = file.read_text("ascii")
        except FileNotFoundError:
            return None
        return is_locked(file) if not self.queue.shared or system == this_system() else None


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
