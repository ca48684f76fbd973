"""The tables of the queue, and their rows as frozen objects."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Integer, MetaData, Row, String, Table, Text

from tailor.jobs.database import Serial

VERSION = 1
TABLES = MetaData()

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Level = Literal["info", "warn", "error"]

JOBS = Table(
    "jobs",
    TABLES,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("status", String(20), nullable=False, index=True),
    Column("prepared", Integer, nullable=False, default=0),
    Column("name", String(128), nullable=False, unique=True),
    Column("model", String(400), nullable=False, unique=True),
    Column("pool", String(64), index=True),
    Column("facts", JSON, nullable=False),
    Column("result", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("idempotency", String(64), unique=True),
    Column("body_hash", String(64), nullable=False, index=True),
    Column("worker", String(64), index=True),
    Column("process", String(64)),
    Column("beat", BigInteger, nullable=False, default=0),
    Column("crashes", Integer, nullable=False, default=0),
    Column("crashed_at", BigInteger, nullable=False, default=0),
    Column("logged", BigInteger, nullable=False, default=0),
    Column("num_steps", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    sqlite_autoincrement=True,
)

EVENTS = Table(
    "job_events",
    TABLES,
    Column("seq", Serial, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    Column("level", String(10), nullable=False),
    Column("type", String(20), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON(none_as_null=True)),
    sqlite_autoincrement=True,
)

_LETTERS = string.digits + string.ascii_letters


def new_id(prefix: str, length: int = 24) -> str:
    """A name that nobody has or guesses: `prefix` and letters of base 62."""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length))


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be put. `name` is that of its run and artifact, and nobody else's; jobs of one `pool` may share a
    process; `facts` are whatever its owner wants to remember."""

    id: str
    name: str
    model: str
    facts: Mapping[str, Any]
    body_hash: str
    status: Status = "validating_files"
    prepared: int = 0
    pool: str | None = None
    idempotency: str | None = None
    num_steps: int | None = None

    def columns(self) -> dict[str, Any]:
        """The values of its row."""
        return {**asdict(self), "facts": dict(self.facts)}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as it was when it was read.

    `prepared`: its files are good and its recipe is written; `process` names the job in whose folder the process
    writes; `logged` is the last step that has an event; times are seconds since 1970.
    """

    seq: int
    id: str
    status: Status
    prepared: int
    name: str
    model: str
    pool: str | None
    facts: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    worker: str | None
    process: str | None
    beat: int
    crashes: int
    crashed_at: int
    logged: int
    num_steps: int | None
    created_at: int
    started_at: int | None
    finished_at: int | None

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """The job of a row."""
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class NewEvent:
    """An event to be added."""

    message: str
    type: Literal["message", "metrics"] = "message"
    level: Level = "info"
    data: Mapping[str, Any] | None = None

    def columns(self) -> dict[str, Any]:
        """The values of its row. What no database takes in a text (NUL, half of a surrogate pair) is shown as `?`."""
        told = self.message.replace("\0", "?").encode("utf-8", "replace").decode("utf-8")
        return {**asdict(self), "message": told}


@dataclass(frozen=True, kw_only=True)
class Event:
    """An event of a job."""

    seq: int
    id: str
    job_id: str
    created_at: int
    level: Level
    type: Literal["message", "metrics"]
    message: str
    data: Mapping[str, Any] | None

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """The event of a row."""
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})
