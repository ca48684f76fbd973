"""The queue: jobs and their events in a database. Every change is one transaction that says what it expects to find.

A job has a `status`, which is what people asked for and see, and a `worker`, which is who has a process for it. The
two change apart: a job that is cancelled while it runs is cancelled at once and keeps its worker until the process is
gone, and only a job without a worker can be leased. Nothing compares clocks: a worker shows that it lives by counting
`beat` up, and by a file that it holds locked (worker.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, Select, insert, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from tailor.errors import ConflictError, NotFoundError
from tailor.jobs.database import is_shared, make_tables, reading
from tailor.jobs.tables import EVENTS, JOBS, TABLES, VERSION, Event, Job, NewEvent, NewJob, Status, new_id

TERMINAL: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
RETRY_SECONDS = 600
"""How long a repeated request without an idempotency key is known to be one."""

PAGE = 200
_FREE = JOBS.c.worker.is_(None)


class Queue:
    """Jobs in a database that any number of servers and workers share."""

    def __init__(self, engine: Engine) -> None:
        make_tables(engine, "jobs", VERSION, TABLES)
        self.engine = engine
        self.shared = is_shared(engine)
        self._reading = reading(engine)

    # --- putting and finding -----------------------------------------------------------------------------------------

    def put(self, new: NewJob, *, retried: bool = False) -> Job:
        """Add a job, or return the one that this very request made before.

        It is the same request when its idempotency key and body are, or, with `retried` (the caller says it is a
        repetition), when the body is that of a job made within the last minutes. Raises ConflictError for a key that
        came with another body.
        """
        try:
            with self.engine.begin() as connection:
                if (known := self._made_before(connection, new, retried)) is not None:
                    return known
                connection.execute(insert(JOBS).values(**new.columns(), created_at=now()))
                _add_events(connection, new.id, [NewEvent(f"Created fine-tuning job: {new.id}")])
                return _fetch(connection, JOBS.c.id == new.id)
        except IntegrityError:  # another server put the same request at the same moment
            with self._reading.connect() as connection:
                if (known := self._made_before(connection, new, retried)) is not None:
                    return known
            raise

    def _made_before(self, connection: Connection, new: NewJob, retried: bool) -> Job | None:
        if new.idempotency is not None:
            row = connection.execute(select(JOBS).where(JOBS.c.idempotency == new.idempotency)).first()
            if row is not None and row.body_hash != new.body_hash:
                raise ConflictError("this idempotency key came with another request before", hint="use a new key")
            return Job.of(row) if row is not None else None
        if not retried:
            return None
        same = (JOBS.c.body_hash == new.body_hash, JOBS.c.created_at >= now() - RETRY_SECONDS)
        row = connection.execute(select(JOBS).where(*same).order_by(JOBS.c.seq.desc())).first()
        return Job.of(row) if row is not None else None

    def get(self, job_id: str) -> Job:
        """Raises NotFoundError."""
        with self._reading.connect() as connection:
            return _fetch(connection, JOBS.c.id == job_id)

    def page(
        self, limit: int, after: str | None = None, wanted: Callable[[Job], bool] = lambda job: True
    ) -> tuple[list[Job], bool]:
        """Up to `limit` of the wanted jobs, newest first and older than `after`; and whether there are more."""
        found: list[Job] = []
        for job in self.newest(after):
            if wanted(job):
                found.append(job)
            if len(found) > limit:
                return found[:limit], True
        return found, False

    def newest(self, after: str | None = None) -> Iterator[Job]:
        """All jobs, newest first, from the one after `after` on. Raises NotFoundError."""
        query = select(JOBS).order_by(JOBS.c.seq.desc()).limit(PAGE)
        last = self.get(after).seq if after is not None else None
        while True:
            rows = self._rows(query if last is None else query.where(JOBS.c.seq < last))
            yield from map(Job.of, rows)
            if len(rows) < PAGE:
                return
            last = rows[-1].seq

    def with_status(self, status: Status) -> list[Job]:
        """Oldest first."""
        return [Job.of(row) for row in self._rows(select(JOBS).where(JOBS.c.status == status).order_by(JOBS.c.seq))]

    def of_model(self, model: str) -> Job | None:
        """The job that makes, or made, the model of this name."""
        rows = self._rows(select(JOBS).where(JOBS.c.model == model))
        return Job.of(rows[0]) if rows else None

    # --- what people ask for -----------------------------------------------------------------------------------------

    def cancel(self, job_id: str) -> Job:
        """Cancelled at once; whoever has a process for it ends it. Raises ConflictError for a job that has ended."""
        values = {"status": "cancelled", "finished_at": now()}
        return self._ask(job_id, "cancelled", ("validating_files", "queued", "running", "paused"), values)

    def pause(self, job_id: str) -> Job:
        """Paused at once; a process that runs saves its checkpoint first. Raises ConflictError as `cancel`."""
        return self._ask(job_id, "paused", ("validating_files", "queued", "running"), {"status": "paused"})

    def resume(self, job_id: str) -> Job:
        """Back into the queue, to go on from its checkpoint. Raises ConflictError for a job that is not paused."""
        job = self.get(job_id)
        if job.status in ("validating_files", "queued", "running"):
            return job
        status: Status = "queued" if job.prepared else "validating_files"
        return self._ask(job_id, "resumed", ("paused",), {"status": status})

    def _ask(self, job_id: str, what: str, possible: Sequence[Status], values: Mapping[str, Any]) -> Job:
        with self.engine.begin() as connection:
            job = _fetch(connection, JOBS.c.id == job_id, hold=True)
            if job.status == values["status"]:
                return job
            if not _change(connection, JOBS.c.id == job_id, JOBS.c.status.in_(possible), **values):
                raise ConflictError(f"job {job_id} is {job.status}: it cannot be {what} any more")
            _add_events(connection, job_id, [NewEvent(f"The job was {what}.")])
            return _fetch(connection, JOBS.c.id == job_id)

    def prepared(
        self, job_id: str, facts: Mapping[str, Any], num_steps: int | None, messages: Sequence[str] = ()
    ) -> bool:
        """A job's files are good: it may be leased. False when it is no longer being validated."""
        values = {"status": "queued", "prepared": 1, "facts": dict(facts), "num_steps": num_steps}
        return self._validated(job_id, values, [NewEvent(message) for message in messages])

    def refused(self, job_id: str, error: Mapping[str, Any]) -> bool:
        """A job's files are not good: it has failed. False when it is no longer being validated."""
        values = {"status": "failed", "error": dict(error), "finished_at": now()}
        return self._validated(job_id, values, [NewEvent(str(error["message"]), level="error")])

    def _validated(self, job_id: str, values: Mapping[str, Any], events: Sequence[NewEvent]) -> bool:
        with self.engine.begin() as connection:
            changed = _change(connection, JOBS.c.id == job_id, JOBS.c.status == "validating_files", **values)
            if changed:
                _add_events(connection, job_id, events)
            return changed

    # --- what workers do ---------------------------------------------------------------------------------------------

    def lease(
        self, worker: str, *, beside: Job | None = None, accept: Callable[[Job], bool] = lambda job: True
    ) -> Job | None:
        """The oldest job that waits, now running and this worker's; None when there is none.

        With `beside`, the oldest accepted one that may share the process of that job.
        """
        where: list[ColumnElement[bool]] = [JOBS.c.status == "queued", _FREE]
        if beside is not None:
            where.append(JOBS.c.pool == beside.pool)
        with self.engine.begin() as connection:
            for row in connection.execute(waiting(where, 1 if beside is None else PAGE)):
                job = Job.of(row)
                if beside is not None and not accept(job):
                    continue
                process = job.id if beside is None else beside.id
                started = job.started_at if job.started_at is not None else now()
                values = {"status": "running", "worker": worker, "process": process, "started_at": started}
                if _change(connection, JOBS.c.id == job.id, JOBS.c.status == "queued", _FREE, **values):
                    told = "Fine-tuning job started" if job.started_at is None else "The job goes on"
                    _add_events(connection, job.id, [NewEvent(told)])
                    return _fetch(connection, JOBS.c.id == job.id)
        return None

    def beat(self, worker: str) -> None:
        """Show that the worker lives."""
        with self.engine.begin() as connection:
            _change(connection, JOBS.c.worker == worker, beat=JOBS.c.beat + 1)

    def leased(self) -> list[Job]:
        """All jobs that some worker has a process for, whatever their status is."""
        return [Job.of(row) for row in self._rows(select(JOBS).where(~_FREE).order_by(JOBS.c.seq))]

    def take_over(self, job: Job, worker: str) -> bool:
        """Make a lost worker's job this worker's; False when it is not as it was seen any more."""
        with self.engine.begin() as connection:
            seen = (JOBS.c.id == job.id, JOBS.c.worker == job.worker, JOBS.c.beat == job.beat)
            return _change(connection, *seen, worker=worker, beat=JOBS.c.beat + 1)

    def run_again(self, job_id: str, worker: str) -> None:
        """A job that was paused and resumed before its process noticed goes on running."""
        with self.engine.begin() as connection:
            mine = (JOBS.c.id == job_id, JOBS.c.worker == worker, JOBS.c.status == "queued")
            _change(connection, *mine, status="running")

    def log(self, job_id: str, worker: str, step: int, events: Sequence[NewEvent]) -> None:
        """Add the events of new steps, each step once whoever reports it."""
        with self.engine.begin() as connection:
            mine = (JOBS.c.id == job_id, JOBS.c.worker == worker, JOBS.c.logged < step)
            if _change(connection, *mine, logged=step):
                _add_events(connection, job_id, events)

    def succeeded(self, job_id: str, worker: str, result: Mapping[str, Any], messages: Sequence[str]) -> bool:
        """The work is done. Whoever paused it in the last moment has it done; who cancelled it does not (False)."""
        values = {"status": "succeeded", "result": dict(result), "finished_at": now()}
        return self._end(job_id, worker, values, [NewEvent(message) for message in messages])

    def failed(self, job_id: str, worker: str, error: Mapping[str, Any]) -> bool:
        """It cannot be done. False for a job that was cancelled."""
        values = {"status": "failed", "error": dict(error), "finished_at": now()}
        return self._end(job_id, worker, values, [NewEvent(str(error["message"]), level="error")])

    def _end(self, job_id: str, worker: str, values: Mapping[str, Any], events: Sequence[NewEvent]) -> bool:
        with self.engine.begin() as connection:
            mine = (JOBS.c.id == job_id, JOBS.c.worker == worker)
            open_ones = JOBS.c.status.in_(("running", "paused", "queued"))
            if _change(connection, *mine, open_ones, **values, worker=None, process=None):
                _add_events(connection, job_id, events)
                return True
            _change(connection, *mine, worker=None, process=None)
            return False

    def release(self, job_id: str, worker: str, *, crashed: bool, max_crashes: int) -> None:
        """The process is gone without a result. A job that should run waits again; after too many crashes it fails.

        Only crashes without a new step in between are counted.
        """
        with self.engine.begin() as connection:
            mine = (JOBS.c.id == job_id, JOBS.c.worker == worker)
            row = connection.execute(select(JOBS).where(*mine).with_for_update()).first()
            if row is None:
                return
            job = Job.of(row)
            values: dict[str, Any] = {"worker": None, "process": None}
            if job.status == "running":
                values["status"] = "queued"
            event = NewEvent("The process that trained the job was stopped; the job waits to go on.", level="warn")
            if crashed and job.status == "running":
                values["crashes"] = 1 if job.logged > job.crashed_at else job.crashes + 1
                values["crashed_at"] = job.logged
                if values["crashes"] >= max_crashes:
                    message = f"The process that trained the job ended {max_crashes} times without a result."
                    error = {"code": "crashed", "message": message, "param": None}
                    values |= {"status": "failed", "error": error, "finished_at": now()}
                    event = NewEvent(message, level="error")
            _change(connection, *mine, **values)
            if job.status == "running":
                _add_events(connection, job_id, [event])

    # --- events ------------------------------------------------------------------------------------------------------

    def add_event(self, job_id: str, event: NewEvent) -> None:
        """Add an event to a job. Raises NotFoundError."""
        with self.engine.begin() as connection:
            _fetch(connection, JOBS.c.id == job_id, hold=True)
            _add_events(connection, job_id, [event])

    def events(self, job_id: str, limit: int, after: str | None = None) -> tuple[list[Event], bool]:
        """Up to `limit` events, newest first and older than `after`; and whether there are more.

        Raises NotFoundError for an `after` that is no event of the job.
        """
        query = select(EVENTS).where(EVENTS.c.job_id == job_id).order_by(EVENTS.c.seq.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(EVENTS.c.seq < self.event(job_id, after).seq)
        rows = self._rows(query)
        return [Event.of(row) for row in rows[:limit]], len(rows) > limit

    def events_since(self, job_id: str, seq: int) -> list[Event]:
        """The events after row number `seq`, oldest first."""
        query = select(EVENTS).where(EVENTS.c.job_id == job_id, EVENTS.c.seq > seq).order_by(EVENTS.c.seq)
        return [Event.of(row) for row in self._rows(query.limit(PAGE))]

    def event(self, job_id: str, event_id: str) -> Event:
        """Raises NotFoundError."""
        rows = self._rows(select(EVENTS).where(EVENTS.c.job_id == job_id, EVENTS.c.id == event_id))
        if not rows:
            raise NotFoundError(f"job {job_id} has no event {event_id!r}")
        return Event.of(rows[0])

    def _rows(self, query: Select[Any]) -> Sequence[Row[Any]]:
        with self._reading.connect() as connection:
            return connection.execute(query).all()


def waiting(where: Sequence[ColumnElement[bool]], limit: int) -> Select[Any]:
    """The jobs to lease one of, oldest first. PostgreSQL locks them for this worker and skips what others look at."""
    return select(JOBS).where(*where).order_by(JOBS.c.seq).limit(limit).with_for_update(skip_locked=True)


def now() -> int:
    """Seconds since 1970; to be shown, never to decide by."""
    return int(time.time())


def _fetch(connection: Connection, where: ColumnElement[bool], *, hold: bool = False) -> Job:
    """A job; with `hold` nobody else changes it until the transaction ends (in SQLite that is always so)."""
    query = select(JOBS).where(where)
    row = connection.execute(query.with_for_update() if hold else query).first()
    if row is None:
        raise NotFoundError("there is no such job")
    return Job.of(row)


def _change(connection: Connection, *where: ColumnElement[bool], **values: Any) -> bool:
    return connection.execute(update(JOBS).where(*where).values(**values)).rowcount > 0


def _add_events(connection: Connection, job_id: str, events: Sequence[NewEvent]) -> None:
    """Add events in a transaction that has changed the job's row or holds it, so that the row numbers of a job's events
    are in the order in which they become visible: `events_since` misses none."""
    if events:
        at = now()
        rows = [event.columns() | {"id": new_id("ftevent-"), "job_id": job_id, "created_at": at} for event in events]
        connection.execute(insert(EVENTS), rows)
