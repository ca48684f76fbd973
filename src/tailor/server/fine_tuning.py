"""/v1/fine_tuning/jobs: create, list, retrieve, cancel, pause, resume, events (also as a stream), checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tailor.errors import ConflictError, NotFoundError
from tailor.jobs.tables import Job
from tailor.server.errors import NO_RETRY, ApiError, invalid
from tailor.server.fine_tuning_jobs import FineTuning, is_there
from tailor.server.job_events import checkpoints_of, event_object, event_stream, since
from tailor.server.protocol_jobs import (
    CheckpointList,
    CreateJob,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
)
from tailor.server.stream import Stopping

_JOB = re.compile(r"ftjob-[0-9A-Za-z]{24}")
_EVENT = re.compile(r"ftevent-[0-9A-Za-z]{24}")
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Limit = Annotated[int, Query(ge=1, le=1000)]


def fine_tuning_router(jobs: FineTuning, heartbeat: float = 12.0) -> APIRouter:
    """The routes of jobs. A stream of events sends a comment after `heartbeat` seconds of silence."""
    router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])
    _add_jobs(router, jobs)
    _add_requests(router, jobs)
    _add_history(router, jobs, heartbeat)
    return router


def _add_jobs(router: APIRouter, jobs: FineTuning) -> None:
    @router.post("", response_model=FineTuningJob)
    def create_job(
        body: CreateJob,
        request: Request,
        idempotency_key: Annotated[str | None, Header()] = None,
        x_stainless_retry_count: Annotated[str | None, Header()] = None,
    ) -> FineTuningJob:
        """Create a job. A request that the client repeats makes no second one."""
        caller = getattr(getattr(request.state, "principal", None), "key_id", "")
        retried = (x_stainless_retry_count or "0") != "0"
        return jobs.show(jobs.create(body, key=idempotency_key, caller=str(caller), retried=retried))

    @router.get("", response_model=FineTuningJobList)
    def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> FineTuningJobList:
        """A page of jobs, newest first; `metadata[key]=value` filters, `metadata=null` finds those without any."""
        wanted = _filter(request)
        if after is not None:
            _job(jobs, after, "after")
        found, more = jobs.queue.page(limit, after, wanted)
        return FineTuningJobList(data=[jobs.show(job) for job in found], has_more=more)

    @router.get("/{job_id}", response_model=FineTuningJob)
    def retrieve_job(job_id: str) -> FineTuningJob:
        """A job as it stands."""
        return jobs.show(_job(jobs, job_id))


def _add_requests(router: APIRouter, jobs: FineTuning) -> None:
    @router.post("/{job_id}/cancel", response_model=FineTuningJob)
    def cancel_job(job_id: str) -> FineTuningJob:
        """Cancel a job for good."""
        return jobs.show(_asked(jobs, job_id, jobs.queue.cancel, "job_not_cancellable"))

    @router.post("/{job_id}/pause", response_model=FineTuningJob)
    def pause_job(job_id: str) -> FineTuningJob:
        """Pause a job; one that runs saves its checkpoint."""
        return jobs.show(_asked(jobs, job_id, jobs.queue.pause, "job_not_pausable"))

    @router.post("/{job_id}/resume", response_model=FineTuningJob)
    def resume_job(job_id: str) -> FineTuningJob:
        """Let a paused job go on, to the result that it would have had."""
        return jobs.show(_asked(jobs, job_id, jobs.queue.resume, "job_not_resumable"))


def _add_history(router: APIRouter, jobs: FineTuning, heartbeat: float) -> None:
    @router.get("/{job_id}/events", response_model=FineTuningEventList, responses=_EVENTS)
    def list_events(
        request: Request,
        job_id: str,
        after: str | None = None,
        limit: Limit = 20,
        stream: bool = False,
        accept: Annotated[str, Header()] = "",
        last_event_id: Annotated[str | None, Header()] = None,
    ) -> Any:
        """A page of events, newest first; with `stream=true` or `Accept: text/event-stream` all, as they happen."""
        job = _job(jobs, job_id)
        if stream or "text/event-stream" in accept:
            stopping = getattr(request.app.state, "stopping", None)  # the whole server has one
            return _stream(jobs, job, last_event_id, heartbeat, stopping)
        if after is not None and not _EVENT.fullmatch(after):
            raise _no_event()
        try:
            events, more = jobs.queue.events(job.id, limit, after)
        except NotFoundError:
            raise _no_event() from None
        return FineTuningEventList(data=[event_object(event) for event in events], has_more=more)

    @router.get("/{job_id}/checkpoints", response_model=CheckpointList)
    def list_checkpoints(job_id: str, after: str | None = None, limit: Limit = 10) -> CheckpointList:
        """A page of the states of a job that can be used, newest first: its model, and the ends of its last epochs."""
        found = checkpoints_of(_job(jobs, job_id), is_there)
        if after is not None:
            ids = [checkpoint.id for checkpoint in found]
            if after not in ids:
                raise ApiError(404, "No such checkpoint of this job.", code="checkpoint_not_found", param="after")
            found = found[ids.index(after) + 1 :]
        page = found[:limit]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return CheckpointList(data=page, first_id=first, last_id=last, has_more=len(found) > limit)


_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def _stream(
    jobs: FineTuning, job: Job, last_event: str | None, heartbeat: float, stopping: Stopping | None
) -> Response:
    seq = since(jobs.queue, job.id, last_event if last_event and _EVENT.fullmatch(last_event) else None)
    events = event_stream(jobs.queue, job.id, seq, heartbeat, stopping)
    return StreamingResponse(events, media_type="text/event-stream", headers=_STREAM_HEADERS)


def _job(jobs: FineTuning, job_id: str, param: str = "fine_tuning_job_id") -> Job:
    """Raises ApiError 404."""
    try:
        if not _JOB.fullmatch(job_id):
            raise NotFoundError("not an id of ours")
        return jobs.queue.get(job_id)
    except NotFoundError:
        message = f"Could not find fine tune: {job_id[:80]}"
        raise ApiError(404, message, code="job_not_found", param=param) from None


def _asked(jobs: FineTuning, job_id: str, ask: Callable[[str], Job], code: str) -> Job:
    job = _job(jobs, job_id)
    try:
        return ask(job.id)
    except ConflictError as error:
        raise ApiError(409, error.message, code=code, headers=NO_RETRY) from error


def _no_event() -> ApiError:
    return ApiError(404, "No such event of this job.", code="event_not_found", param="after")


def _filter(request: Request) -> Callable[[Job], bool]:
    """Which jobs the query wants, by their metadata."""
    pairs = {}
    for key, value in request.query_params.multi_items():
        if (found := _METADATA.fullmatch(key)) is not None:
            pairs[found[1]] = value
        elif key == "metadata":
            if value != "null":
                raise invalid("metadata", "metadata is filtered as metadata[key]=value; 'null' finds jobs without any.")
            return lambda job: not job.facts["request"].get("metadata")
    return lambda job: pairs.items() <= (job.facts["request"].get("metadata") or {}).items()
