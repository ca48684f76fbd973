"""Records to a file that `read_records` reads back to the same records: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailor.data.records import Conversation, PromptCompletion, Record
from tailor.errors import DataError
from tailor.store import write_text
from tailor.text.messages import Message


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Write prompts with completions and conversations, atomically. Raises DataError for other kinds of records."""
    write_text(path, "".join(json.dumps(_row(record), ensure_ascii=False) + "\n" for record in records))


def _row(record: Record) -> dict[str, Any]:
    if isinstance(record, PromptCompletion):
        return {"prompt": record.prompt, "completion": record.completion}
    if isinstance(record, Conversation):
        row: dict[str, Any] = {"messages": [_turn(message) for message in record.messages]}
        return {**row, "tools": [dict(tool) for tool in record.tools]} if record.tools else row
    raise DataError(f"{record.source}: a {type(record).__name__} cannot be written as a row with a completion")


def _turn(message: Message) -> dict[str, Any]:
    weight = {} if message.weight is None else {"weight": message.weight}
    return {**message.to_dict(), **weight}
