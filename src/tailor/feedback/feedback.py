"""What people say about answers: votes, corrected texts and ratings, each a line that stays.

Later feedback of the same person about the same thing supersedes the earlier; `current` says which counts.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tailor.data.formats import ATTRIBUTES
from tailor.errors import DataError, nearest
from tailor.feedback.journal import Damage, Journal, Line, encode, head_of
from tailor.feedback.redact import Redact
from tailor.feedback.traffic import Exchange
from tailor.runs import home

SCHEMA_VERSION = 1

Kind = Literal["vote", "edit", "rating"]
Vote = Literal["up", "down", "none"]

SAYS: Mapping[str, tuple[str, ...]] = {
    "vote": ("vote", "preferred"),
    "edit": ("content",),
    "rating": ("rating", "attributes"),
}
"""Of each kind exactly one of these is given."""

VOTES = ("up", "down", "none")
STARS = (1, 5)
SCALE = (0, 4)
"""Of attributes, as HelpSteer's."""

MAX_TEXT = 1 << 20


class FeedbackError(DataError):
    """Feedback that makes no sense; `field` names the part that is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Feedback:
    """One statement about a chat's answer, the `choice`-th.

    vote: `vote` up, down, or none (which takes an earlier one back), or `preferred`: the choice liked best of all.
    edit: `content`, what the answer should have been. rating: `attributes`, each a whole number from 0 to 4
    (https://arxiv.org/abs/2311.09528), or `rating`, one from 1 to 5. `author` is a person's name, as the caller gives
    it, or the API key's id; it is written as it is.
    """

    completion_id: str
    kind: Kind
    author: str
    principal: str
    choice: int = 0
    vote: Vote | None = None
    preferred: int | None = None
    content: str | None = None
    rating: int | None = None
    attributes: Mapping[str, int] | None = None
    id: str = ""
    time: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What is set, the chat's id first."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def about(self) -> tuple[Any, ...]:
        """Whose feedback on what this is: the latest with the same is what counts."""
        what = "preferred" if self.preferred is not None else self.choice
        return self.completion_id, self.principal, self.author, self.kind, what


class FeedbackLog:
    """The feedback of a folder (TAILOR_HOME/feedback); each line is forced to the disk before `add` returns."""

    def __init__(self, folder: Path | None = None, *, redact: Redact | None = None) -> None:
        self.journal = Journal(folder or home() / "feedback")
        self.redact = redact

    def add(self, said: Feedback, exchange: Exchange | None = None) -> Feedback:
        """Check and keep it; returns it with its id and time. `exchange` is the chat, where it is recorded.

        Raises FeedbackError for what makes no sense, ResourceError when it cannot be written.
        """
        check(said, exchange)
        entry = said.to_dict() | {"id": f"fb-{secrets.token_hex(12)}", "time": int(time.time())}
        if self.redact is not None and said.content is not None:
            redacted = self.redact({"content": said.content})
            if redacted is None:
                raise FeedbackError("content", "this text may not be kept here")
            entry |= redacted
        self.journal.append(encode({**entry, "schema_version": SCHEMA_VERSION}))
        return Feedback(**entry)

    def of(self, completion_id: str) -> list[Feedback]:
        """All that was ever said about a chat, oldest first."""
        entries = self.journal.starting_with(head_of("completion_id", completion_id))
        read = [_feedback(Line("", entry)) for entry in entries]
        return [each for each in reversed(read) if isinstance(each, Feedback)]

    def everything(self) -> Iterator[Feedback | Damage]:
        """All feedback, oldest first, and in their places the lines that are none."""
        for line in self.journal.lines():
            yield line if isinstance(line, Damage) else _feedback(line)


def current(feedback: Iterable[Feedback]) -> list[Feedback]:
    """What still counts: without what its author superseded. Oldest first, as given."""
    latest: dict[tuple[Any, ...], Feedback] = {}
    for each in feedback:
        latest.pop(each.about, None)
        latest[each.about] = each
    return list(latest.values())


def check(said: Feedback, exchange: Exchange | None = None) -> None:
    """Raise FeedbackError unless exactly what its kind wants is said, about a choice that there is."""
    wanted = SAYS[said.kind]
    given = [name for names in SAYS.values() for name in names if getattr(said, name) is not None]
    for name in given:
        if name not in wanted:
            raise FeedbackError(name, f"feedback of kind {said.kind!r} has no {name!r}; it has {' or '.join(wanted)}")
    if len(given) != 1:
        raise FeedbackError(wanted[0], f"feedback of kind {said.kind!r} needs {' or '.join(map(repr, wanted))}, one")
    _check_content(said)
    _check_scores(said)
    if exchange is not None:
        _check_choices(said, exchange)


def _check_content(said: Feedback) -> None:
    if said.vote is not None and said.vote not in VOTES:
        raise FeedbackError("vote", f"a vote is not {said.vote!r}; {nearest(said.vote, VOTES)}")
    if said.content is not None and not said.content.strip():
        raise FeedbackError("content", "the corrected answer is empty")
    if said.content is not None and len(said.content) > MAX_TEXT:
        raise FeedbackError("content", f"the corrected answer is longer than {MAX_TEXT} characters")


def _check_scores(said: Feedback) -> None:
    if said.rating is not None and not STARS[0] <= said.rating <= STARS[1]:
        raise FeedbackError("rating", f"a rating is a whole number from {STARS[0]} to {STARS[1]}, not {said.rating}")
    if said.attributes is not None and not said.attributes:
        raise FeedbackError("attributes", f"no attribute is rated; choices: {', '.join(ATTRIBUTES)}")
    for name, score in (said.attributes or {}).items():
        if name not in ATTRIBUTES:
            raise FeedbackError("attributes", f"there is no attribute {name[:80]!r}; {nearest(name, ATTRIBUTES)}")
        if not SCALE[0] <= score <= SCALE[1]:
            raise FeedbackError("attributes", f"{name} is {score}; the scale is whole numbers from 0 to 4")


def _check_choices(said: Feedback, exchange: Exchange) -> None:
    for field, index in (("choice", said.choice), ("preferred", said.preferred)):
        if index is not None and not 0 <= index < exchange.num_choices:
            raise FeedbackError(field, f"{said.completion_id} has {exchange.num_choices} choices, none is {index}")
    if said.preferred is not None and exchange.num_choices < 2:
        raise FeedbackError("preferred", f"{said.completion_id} has one choice, so there is nothing to prefer it to")


def _feedback(line: Line) -> Feedback | Damage:
    entry = dict(line.entry)
    version = entry.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        return Damage(line.place, f"its schema_version is {version!r}, this version reads {SCHEMA_VERSION}")
    try:
        said = Feedback(**entry)
        check(said)
    except FeedbackError as error:
        return Damage(line.place, error.message)
    except (TypeError, KeyError, AttributeError) as error:
        return Damage(line.place, f"not a line of feedback: {error}")
    return said
