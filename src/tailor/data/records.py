"""Records: text only, what people see. Every reader yields these and nothing else travels from files to examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tailor.text.messages import Message, assistant
from tailor.text.template import TASK


@dataclass(frozen=True, slots=True)
class Source:
    """Where a record came from: file and 1-based line (row number for JSON arrays and Parquet)."""

    path: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What all records share: their origin, and the row's other columns."""

    source: Source = Source()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptCompletion(Record):
    """The home format: `{"prompt": …, "completion": …}`. `fields`: what the prompt was put together from, by name."""

    prompt: str
    completion: str
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation(Record):
    """A chat of one or more assistant turns; `tools` are JSON schemas handed to the chat template."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison(Record):
    """A preference: after `prompt`, people liked `chosen` better than `rejected`."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float = 1.0


@dataclass(frozen=True, slots=True)
class Judged(Record):
    """A completion with a yes/no label (unpaired preference, KTO)."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool


@dataclass(frozen=True, slots=True)
class Rated(Record):
    """A completion with attribute scores, e.g. HelpSteer's helpfulness 0-4."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    attributes: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Document(Record):
    """Plain text: for continued pretraining and retrieval."""

    text: str


@dataclass(frozen=True, slots=True)
class Retrieval(Record):
    """A query with a passage that answers it and passages that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()


def conversation(record: Record) -> tuple[Message, ...]:
    """The turns of a record that has a completion, prompt first, the wanted answer last.

    Raises TypeError for records without one (documents, comparisons): an objective that consumes those says so.
    """
    if isinstance(record, PromptCompletion):
        return (Message("user", record.prompt, fields=record.fields or _task(record)), assistant(record.completion))
    if isinstance(record, Conversation):
        return _for_task(record.messages, _task(record))
    raise TypeError(f"{type(record).__name__} has no single completion")


def _task(record: Record) -> tuple[tuple[str, str], ...]:
    """The task that the row names in its column, as a field of its question."""
    task = record.meta.get(TASK)
    return ((TASK, task),) if isinstance(task, str) else ()


def _for_task(said: tuple[Message, ...], task: tuple[tuple[str, str], ...]) -> tuple[Message, ...]:
    return tuple(replace(m, fields=task) if m.role == "user" and not m.fields else m for m in said) if task else said


def prompt_of(record: Record) -> tuple[Message, ...]:
    """The turns before the last assistant turn: what a model is shown when it is asked for this record's answer."""
    messages = conversation(record)
    return messages[: last_assistant(messages)]


def tools_of(record: Record) -> tuple[Mapping[str, Any], ...]:
    """The record's tools; most have none."""
    return record.tools if isinstance(record, Conversation) else ()


def completion_of(record: Record) -> str:
    """The text of the last assistant turn."""
    messages = conversation(record)
    return messages[last_assistant(messages)].content


def last_assistant(messages: Sequence[Message]) -> int:
    """Index of the last assistant turn. Raises ValueError when there is none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].role == "assistant":
            return index
    raise ValueError("no assistant turn")
