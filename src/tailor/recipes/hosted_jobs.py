"""Fine-tuning jobs of an OpenAI-compatible endpoint: rows in its format, states in our words, following a job."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tailor.data.records import Comparison, Conversation, PromptCompletion, Record, conversation, tools_of
from tailor.errors import DataError, InterruptedRunError, NotFoundError, OverloadedError, TailorError
from tailor.inference.hosted_endpoint import Endpoint
from tailor.inference.hosted_protocol import chat_turn
from tailor.runs import home
from tailor.store import write_json
from tailor.text.messages import Message

State = Literal["queued", "running", "paused", "cancelled", "succeeded", "failed"]
Say = Callable[[str], None]

STATES: Mapping[str, State] = {
    "validating_files": "queued",
    "queued": "queued",
    "pending": "queued",
    "created": "queued",
    "STATUS_QUEUED": "queued",
    "running": "running",
    "InProgress": "running",
    "STATUS_FINETUNING": "running",
    "STATUS_DEPLOYING_API": "running",
    "Stopping": "running",
    "cancelling": "running",
    "paused": "paused",
    "STATUS_PAUSED": "paused",
    "cancelled": "cancelled",
    "Stopped": "cancelled",
    "succeeded": "succeeded",
    "Completed": "succeeded",
    "completed": "succeeded",
    "ready": "succeeded",
    "STATUS_READY": "succeeded",
    "failed": "failed",
    "Failed": "failed",
    "error": "failed",
    "STATUS_FAILED": "failed",
}
"""What providers call the states of a job. Any other one counts as running, with a warning."""

ENDS = ("cancelled", "succeeded", "failed")

POLL_SECONDS = 5.0


def chat_rows(records: Sequence[Record]) -> bytes:
    """Rows in OpenAI's chat JSONL; preferences in its format of their own. Raises DataError for other kinds."""
    return "".join(json.dumps(_row(record), ensure_ascii=False) + "\n" for record in records).encode()


def _row(record: Record) -> dict[str, Any]:
    if isinstance(record, Comparison):
        return {
            "input": {"messages": _turns(record.prompt)},
            "preferred_output": _turns(record.chosen),
            "non_preferred_output": _turns(record.rejected),
        }
    if not isinstance(record, PromptCompletion | Conversation):
        raise DataError(f"{record.source}: a {type(record).__name__} is nothing that a hosted model can be tuned on")
    row: dict[str, Any] = {"messages": _turns(conversation(record))}
    return {**row, "tools": [dict(tool) for tool in tools]} if (tools := tools_of(record)) else row


def _turns(said: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**chat_turn(turn), **({} if turn.weight is None else {"weight": int(turn.weight > 0)})} for turn in said]


def record_of(job: str) -> Path:
    """Where it is remembered what a job is for."""
    return home() / "hosted" / f"{re.sub(r'[^A-Za-z0-9._-]', '-', job).lstrip('.')}.json"


def remember(job: str, facts: Mapping[str, Any]) -> None:
    """Keep what is needed to follow a job again and to register its result; no key is among it."""
    write_json(record_of(job), {"job": job, **facts})


def remembered(job: str) -> dict[str, Any]:
    """What was kept of a job. Raises NotFoundError for one that was not begun here."""
    path = record_of(job)
    if not path.is_file():
        raise NotFoundError(
            f"job {job} was not begun here ({path.parent})", hint="name its endpoint with --base and a --name for it"
        )
    facts: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return facts


def follow(endpoint: Endpoint, job: str, say: Say, *, poll: float = POLL_SECONDS) -> Any:
    """Tell a job's events until it has succeeded; returns it.

    Ctrl-C leaves it running and raises InterruptedRunError with the way back to it, and so does every error on the way.
    Raises DataError when the job failed for its rows, TailorError when it failed otherwise or was cancelled.
    """
    again = f"follow it again: tailor hosted tune --follow {job}"
    client = endpoint.client()
    teller = _Teller(client, endpoint, job, say)
    try:
        while True:
            with endpoint.errors():
                found = client.fine_tuning.jobs.retrieve(job)
            state = teller.tell(found)
            if state in ENDS:
                return _ended(found, state, endpoint)
            time.sleep(poll)
    except KeyboardInterrupt:
        raise InterruptedRunError(f"job {job} goes on at {endpoint.url}", hint=again) from None
    except (OverloadedError, NotFoundError) as error:
        if teller.status is None:
            raise  # it was never seen: the job or the place is not there
        raise type(error)(error.message, hint=f"the job may go on; {again}") from error


def _ended(job: Any, state: State, endpoint: Endpoint) -> Any:
    if state == "succeeded":
        if not getattr(job, "fine_tuned_model", None):
            raise TailorError(f"job {job.id} succeeded, but {endpoint.url} does not say which model came of it")
        return job
    if state == "cancelled":
        raise TailorError(f"job {job.id} was cancelled")
    error: Any = getattr(job, "error", None)
    kind = DataError if getattr(error, "param", None) in ("training_file", "validation_file") else TailorError
    told = getattr(error, "message", None) or "it does not say why"
    code = f" ({error.code})" if getattr(error, "code", None) else ""
    raise kind(f"job {job.id} failed: {told}{code}")


class _Teller:
    """Says what is new about a job: its state when it changes, its events once each, oldest first."""

    def __init__(self, client: Any, endpoint: Endpoint, job: str, say: Say) -> None:
        self.client = client
        self.endpoint = endpoint
        self.job = job
        self.say = say
        self.seen: set[str] = set()
        self.status: str | None = None

    def tell(self, job: Any) -> State:
        status = str(getattr(job, "status", None))
        state = STATES.get(status, "running")
        if status != self.status:
            unknown = "" if status in STATES else " (warning: a state unknown to tailor; taken for running)"
            self.say(f"{self.job}: {status}{unknown}")
            self.status = status
        for event in self._new():
            self.say(f"  {event.message}")
        return state

    def _new(self) -> list[Any]:
        found = []
        with self.endpoint.errors():
            for event in self.client.fine_tuning.jobs.list_events(self.job, limit=100):
                if event.id in self.seen:
                    break  # newest first: the rest was told before
                found.append(event)
        self.seen |= {event.id for event in found}
        return found[::-1]
