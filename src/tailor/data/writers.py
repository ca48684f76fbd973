"""Records to a file that `read_records` reads back to the same records: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailor.data.records import Comparison, Conversation, PromptCompletion, Rated, Record
from tailor.errors import DataError
from tailor.store import write_text
from tailor.text.messages import Message


def write_records(path: str | Path, records: Sequence[Record]) -> None:
    """Write prompts with completions, conversations, comparisons and rated answers, atomically.

    Raises DataError for other kinds of records.
    """
    write_text(path, "".join(json.dumps(_row(record), ensure_ascii=False) + "\n" for record in records))


def _row(record: Record) -> dict[str, Any]:
    if isinstance(record, PromptCompletion):
        return {"prompt": record.prompt, "completion": record.completion}
    if isinstance(record, Conversation):
        row: dict[str, Any] = {"messages": [_turn(message) for message in record.messages]}
        return {**row, "tools": [dict(tool) for tool in record.tools]} if record.tools else row
    if isinstance(record, Comparison):
        sides = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
        margin = {} if record.margin == 1.0 else {"margin": record.margin}
        return {**_turns_of(sides), **margin, **_tools(record)}
    if isinstance(record, Rated):
        scores = {name: int(score) for name, score in record.attributes.items()}
        return {**_turns_of({"prompt": record.prompt, "response": record.completion}), **scores, **_tools(record)}
    raise DataError(f"{record.source}: a {type(record).__name__} cannot be written as a row with a completion")


def _turns_of(sides: Mapping[str, Sequence[Message]]) -> dict[str, Any]:
    return {name: [_turn(message) for message in said] for name, said in sides.items()}


def _tools(record: Record) -> dict[str, Any]:
    """Those of a kind of record that has no field for them, as the readers keep them."""
    tools = record.meta.get("tools")
    return {"tools": list(tools)} if tools else {}


def _turn(message: Message) -> dict[str, Any]:
    weight = {} if message.weight is None else {"weight": message.weight}
    return {**message.to_dict(), **weight}
