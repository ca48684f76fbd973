"""The traffic log: chats that a server was told to keep, as they were asked and answered, with what is private removed.

{"id", "schema_version", "time", "model", "artifact", "fingerprint", "principal", "messages", "tools", "params",
 "choices": [{"index", "message", "finish_reason"}], "usage"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from tailor.config import Strict
from tailor.feedback.journal import FILE_BYTES, Damage, Journal, Line, encode, head_of
from tailor.feedback.redact import Redact, redactor
from tailor.runs import home

SCHEMA_VERSION = 1

_TOLD = ("messages", "model", "tools", "functions", "store", "stream", "stream_options")
"""Parts of a request that have a place of their own in an entry, or say nothing about the answer."""


class TrafficSettings(Strict):
    """Where traffic is kept, what is removed from it, and how large it may grow."""

    folder: Path | None = Field(None, description="where the files are; None: TAILOR_HOME/traffic")
    redact: tuple[str, ...] = Field((), description="names (email, phone, …, all) or regular expressions to remove")
    max_record_bytes: int = Field(1 << 20, ge=1024, description="larger chats are noted without their texts")
    max_file_bytes: int = Field(FILE_BYTES, ge=1 << 20, description="a day's further traffic goes to a next file")


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a chat, its message as the protocol has it."""

    index: int
    message: Mapping[str, Any]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """One recorded chat. `num_bytes` is set, and the texts are missing, when it was too large to keep."""

    id: str
    time: int
    model: str
    artifact: str | None
    principal: str
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    params: Mapping[str, Any]
    choices: tuple[Choice, ...]
    num_choices: int
    usage: Mapping[str, Any]
    num_bytes: int | None = None
    place: str = ""


class Traffic:
    """The log of a folder. Any number of processes may write to it.

    Lines are forced to the disk once a second while there are new ones: a kill loses nothing that was recorded, a power
    cut what came since.
    """

    def __init__(
        self,
        settings: TrafficSettings,
        *,
        redact: Redact | None = None,
        artifact_of: Callable[[str], str | None] = lambda model: None,
    ) -> None:
        folder = settings.folder or home() / "traffic"
        self.journal = Journal(folder, max_file_bytes=settings.max_file_bytes, sync_every=1.0)
        self.redact = redact
        self._max_record_bytes = settings.max_record_bytes
        self._artifact_of = artifact_of

    def record(self, told: Mapping[str, Any]) -> None:
        """Keep one chat: {"request", "response", "principal"} as the server knows them.

        Its line is with the system when this returns. Raises ResourceError when it cannot be written.
        """
        entry = self._bounded(_entry(told, self._artifact_of(told["request"]["model"])))
        kept = entry if self.redact is None else self.redact(entry)
        if kept is not None:
            first = {"id": entry["id"]}  # where `find` looks for it
            self.journal.append(encode(self._bounded({**first, **kept})))

    def _bounded(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry, without its texts when it is too large; also before redaction, whose work grows with them."""
        size = len(encode(entry))
        return entry if size <= self._max_record_bytes else _without_texts(entry, size)

    def find(self, completion_id: str) -> Exchange | None:
        """The chat of this id; the newest files are looked at first."""
        for entry in self.journal.starting_with(head_of("id", completion_id)):
            found = _exchange(Line("", entry))
            if isinstance(found, Exchange):
                return found
        return None

    def exchanges(self) -> Iterator[Exchange | Damage]:
        """All chats, oldest first, and in their places the lines that are none."""
        for line in self.journal.lines():
            yield line if isinstance(line, Damage) else _exchange(line)


def open_traffic(
    settings: TrafficSettings | None = None, *, artifact_of: Callable[[str], str | None] = lambda model: None
) -> Traffic:
    """The log of these settings, with their redaction; `artifact_of` tells which artifact a model's name means.

    Raises ConfigError for an unknown name to redact.
    """
    settings = settings or TrafficSettings()
    return Traffic(settings, redact=redactor(settings.redact), artifact_of=artifact_of)


def _entry(told: Mapping[str, Any], artifact: str | None) -> dict[str, Any]:
    """What is written; the id comes first, where `find` looks for it."""
    request, response = told["request"], told["response"]
    functions = [{"type": "function", "function": function} for function in request.get("functions") or ()]
    return {
        "id": response["id"],
        "schema_version": SCHEMA_VERSION,
        "time": int(response["created"]),
        "model": request["model"],
        "artifact": artifact,
        "fingerprint": response.get("system_fingerprint"),
        "principal": told["principal"],
        "messages": request["messages"],
        "tools": [*(request.get("tools") or ()), *functions],
        "params": {name: value for name, value in request.items() if name not in _TOLD and value is not None},
        "choices": [
            {"index": choice["index"], "message": choice["message"], "finish_reason": choice["finish_reason"]}
            for choice in response["choices"]
        ],
        "usage": response.get("usage") or {},
    }


def _without_texts(entry: Mapping[str, Any], num_bytes: int) -> dict[str, Any]:
    kept = ("id", "schema_version", "time", "model", "artifact", "fingerprint", "principal", "usage")
    return {
        **{name: entry[name] for name in kept if name in entry},
        "num_choices": len(entry["choices"]),
        "num_bytes": num_bytes,
    }


def _exchange(line: Line) -> Exchange | Damage:
    entry = line.entry
    version = entry.get("schema_version")
    if version != SCHEMA_VERSION:
        return Damage(line.place, f"its schema_version is {version!r}, this version reads {SCHEMA_VERSION}")
    try:
        choices = tuple(Choice(c["index"], c["message"], c["finish_reason"]) for c in entry.get("choices", ()))
        return Exchange(
            id=str(entry["id"]),
            time=int(entry["time"]),
            model=str(entry["model"]),
            artifact=entry.get("artifact"),
            principal=str(entry["principal"]),
            messages=tuple(entry.get("messages", ())),
            tools=tuple(entry.get("tools", ())),
            params=entry.get("params", {}),
            choices=choices,
            num_choices=entry.get("num_choices", len(choices)),
            usage=entry.get("usage", {}),
            num_bytes=entry.get("num_bytes"),
            place=line.place,
        )
    except (KeyError, TypeError, ValueError) as error:
        return Damage(line.place, f"not a recorded chat: {type(error).__name__} {error}")
