"""POST and GET /v1/feedback: what people say about answers; and the traffic log that it refers to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from tailor.feedback.feedback import Feedback, FeedbackError, FeedbackLog, current
from tailor.feedback.traffic import Exchange, Traffic, TrafficSettings, open_traffic
from tailor.server.chat import Record
from tailor.server.errors import ApiError, invalid
from tailor.server.protocol import NonEmpty, Whole
from tailor.server.responses import Answer
from tailor.server.settings import ServerSettings


class FeedbackRequest(Whole):
    """One statement about an answer; its `kind` says which of the other fields it has."""

    completion_id: Annotated[NonEmpty, Field(max_length=256)]
    kind: Literal["vote", "edit", "rating"]
    choice: int = Field(0, ge=0, description="which of the completion's answers")
    vote: Literal["up", "down", "none"] | None = Field(None, description="of a vote; none takes an earlier one back")
    preferred: int | None = Field(None, ge=0, description="of a vote: the choice liked best of all")
    content: str | None = Field(None, description="of an edit: what the answer should have been")
    rating: int | None = Field(None, description="of a rating: 1 to 5")
    attributes: dict[str, int] | None = Field(None, description="of a rating: HelpSteer's names, each 0 to 4")
    author: Annotated[NonEmpty, Field(max_length=256)] | None = Field(
        None, description="the person who says so; the API key when not given"
    )


class FeedbackObject(Answer):
    """A statement as it was kept. `superseded`: its author has said something else since."""

    id: str
    object: Literal["feedback"] = "feedback"
    created_at: int
    completion_id: str
    choice: int
    kind: Literal["vote", "edit", "rating"]
    vote: Literal["up", "down", "none"] | None
    preferred: int | None
    content: str | None
    rating: int | None
    attributes: dict[str, int] | None
    author: str
    superseded: bool


class FeedbackList(Answer):
    """All statements about a completion, oldest first."""

    object: Literal["list"] = "list"
    data: list[FeedbackObject]


def server_traffic(settings: ServerSettings, artifact_of: Callable[[str], str | None]) -> Traffic | None:
    """The log that the settings ask for; None when nothing is to be recorded. Raises ConfigError for `redact`."""
    if not (settings.record or settings.record_all):
        return None
    return open_traffic(TrafficSettings(redact=settings.redact), artifact_of=artifact_of)


def recorder(traffic: Traffic) -> Record:
    """Writes chats to the log. One that cannot be written is said on stderr: its answer is given all the same."""

    def record(told: Mapping[str, Any]) -> None:
        try:
            traffic.record(told)
        except Exception as error:  # a full disk, or a redaction of the caller's own: nobody's answer is lost by it
            print(f"{told['response']['id']} was not recorded: {error}", file=sys.stderr)

    return record


def feedback_router(log: FeedbackLog, traffic: Traffic | None = None) -> APIRouter:
    """The routes of feedback. With `traffic`, it must be about a completion recorded there."""
    router = APIRouter(tags=["feedback"])

    @router.post("/v1/feedback", response_model=FeedbackObject)
    def create_feedback(body: FeedbackRequest, request: Request) -> FeedbackObject:
        """Say something about an answer: a vote, the corrected text, or a rating. Nothing said before is deleted."""
        exchange = _known(traffic, body.completion_id)
        key_id = request.state.principal.key_id
        values = body.model_dump(exclude={"author"})
        said = Feedback(**values, author=body.author or key_id, principal=key_id)
        try:
            kept = log.add(said, exchange)
        except FeedbackError as error:
            raise invalid(error.field, f"Invalid value for {error.field!r}: {error.message}.") from error
        return _shown(kept, superseded=False)

    @router.get("/v1/feedback", response_model=FeedbackList)
    def list_feedback(completion_id: Annotated[str, Query(min_length=1, max_length=256)]) -> FeedbackList:
        """All that was said about a completion, oldest first."""
        _known(traffic, completion_id)
        said = log.of(completion_id)
        counting = {each.id for each in current(said)}
        return FeedbackList(data=[_shown(each, superseded=each.id not in counting) for each in said])

    return router


def _known(traffic: Traffic | None, completion_id: str) -> Exchange | None:
    """The completion, where traffic is recorded. Raises ApiError 404 when it is not there."""
    if traffic is None:
        return None
    exchange = traffic.find(completion_id)
    if exchange is None:
        raise ApiError(
            404,
            f"No completion {completion_id!r} is recorded here: it must have been sent with `store`.",
            code="completion_not_found",
            param="completion_id",
        )
    return exchange


def _shown(said: Feedback, *, superseded: bool) -> FeedbackObject:
    values = {name: getattr(said, name) for name in ("id", "completion_id", "choice", "kind", "vote", "preferred")}
    attributes = None if said.attributes is None else dict(said.attributes)
    return FeedbackObject(
        **values,
        created_at=said.time,
        content=said.content,
        rating=said.rating,
        attributes=attributes,
        author=said.author,
        superseded=superseded,
    )
