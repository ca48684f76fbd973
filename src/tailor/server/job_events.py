"""How a job went, in OpenAI's words: events as pages and as a stream, checkpoints, and the results file."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from tailor.errors import NotFoundError
from tailor.jobs.queue import TERMINAL, Queue
from tailor.jobs.tables import Event, Job
from tailor.server.errors import ApiError, without_paths
from tailor.server.protocol_jobs import Checkpoint, CheckpointMetrics, FineTuningEvent
from tailor.server.stream import DONE, PING, Stopping

RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
RETRY = b"retry: 3000\n\n"
POLL_SECONDS = 0.5
STEP = ":ckpt-step-"
"""What stands between a model's id and the step of one of its checkpoints."""


def event_object(event: Event) -> FineTuningEvent:
    """An event; a step's numbers have OpenAI's names."""
    data = event.data
    if event.type == "metrics" and data is not None:
        data = step_metrics(data) | {"total_steps": data.get("num_steps"), "learning_rate": data.get("learning_rate")}
    return FineTuningEvent(
        id=event.id,
        created_at=event.created_at,
        level=event.level,
        message=without_paths(event.message),
        type=event.type,
        data=dict(data) if data is not None else None,
    )


def step_metrics(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a run's metrics in OpenAI's names."""
    return {"step": line["step"], "train_loss": line.get("loss"), "valid_loss": line.get("validation_loss")}


def results_csv(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The results file of a job. tailor measures losses; the columns of accuracies stay empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RESULT_COLUMNS)
    for line in lines:
        found = step_metrics(line)
        writer.writerow(["" if found.get(column) is None else found[column] for column in RESULT_COLUMNS])
    return text.getvalue().encode()


def kept(best: int, steps: Mapping[int, str], artifact: str, lines: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What a job is to remember of its states: of each its artifact and its step's numbers, oldest first.

    `best` is the step whose state is the job's `artifact`; `steps` are the other artifacts.
    """
    logged = {line["step"]: line for line in lines}
    found = {**steps, best: artifact}
    return [{"artifact": found[n], **step_metrics(logged.get(n, {"step": n}))} for n in sorted(found)]


def checkpoints_of(job: Job, is_there: Callable[[str], bool]) -> list[Checkpoint]:
    """The states of a job that can be used, newest first: that which is its model, and the ends of its last epochs."""
    return [
        Checkpoint(
            id=f"ftckpt_{job.id.removeprefix('ftjob-')}{facts['step']}",
            created_at=job.finished_at or job.created_at,
            fine_tuned_model_checkpoint=model_of_checkpoint(job, facts),
            fine_tuning_job_id=job.id,
            metrics=CheckpointMetrics(**{key: value for key, value in facts.items() if key != "artifact"}),
            step_number=facts["step"],
        )
        for facts in reversed(kept_states(job))
        if is_there(facts["artifact"])
    ]


def kept_states(job: Job) -> Sequence[Mapping[str, Any]]:
    """The facts of the states that a job has kept; earlier versions kept one."""
    result = job.result or {}
    if "checkpoints" not in result and result.get("checkpoint"):
        return [{"artifact": job.name, **result["checkpoint"]}]
    return result.get("checkpoints", ())  # type: ignore[no-any-return]


def model_of_checkpoint(job: Job, facts: Mapping[str, Any]) -> str:
    """What a checkpoint is asked for by: the job's model itself, or a step of it."""
    return job.model if facts["artifact"] == job.name else f"{job.model}{STEP}{facts['step']}"


def since(queue: Queue, job_id: str, last_event: str | None) -> int:
    """The row number of the event that a client saw last; 0 for none. Raises ApiError for what is no event."""
    if last_event is None:
        return 0
    try:
        return queue.event(job_id, last_event).seq
    except NotFoundError:
        message = "Last-Event-ID is no event of this job."
        raise ApiError(400, message, code="invalid_value", param="Last-Event-ID") from None


async def event_stream(
    queue: Queue, job_id: str, seq: int, heartbeat: float, stopping: Stopping | None = None
) -> AsyncIterator[bytes]:
    """The events after row `seq` as they come, oldest first, until the job has ended; a comment while none comes.

    A server that is `stopping` just ends it: the client comes back with the id of the last event.
    """
    yield RETRY
    sent = time.monotonic()
    while stopping is None or not stopping.is_set:
        job = await run_in_threadpool(queue.get, job_id)  # before its events: a job that has ended gets no more
        events = await run_in_threadpool(queue.events_since, job_id, seq)
        for event in events:
            seq = event.seq
            text = json.dumps(event_object(event).model_dump())
            yield f"id: {event.id}\ndata: {text}\n\n".encode()
        if not events and job.status in TERMINAL:
            yield DONE
            return
        if events:
            sent = time.monotonic()
            continue
        if time.monotonic() - sent > heartbeat:
            sent = time.monotonic()
            yield PING
        await asyncio.sleep(POLL_SECONDS)
