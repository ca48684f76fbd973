"""What is written is read back as the same records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tailor.data.readers import read_records
from tailor.data.records import Conversation, Judged, PromptCompletion, Record, Source
from tailor.data.writers import write_records
from tailor.errors import DataError
from tailor.text.messages import Message, assistant, system, user

CALL = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    "records",
    [
        [
            PromptCompletion(prompt="Wo ist\nmein Päckchen? 📦", completion='"da"\t\\'),
        ],
        [
            Conversation(
                messages=(system("be brief"), user("hi"), assistant("hello"), user("bye"), assistant("so long"))
            ),
            Conversation(
                messages=(
                    user("weather?"),
                    Message("assistant", "", tool_calls=(CALL,), weight=0),
                    Message("tool", "12 degrees", tool_call_id="c1"),
                    assistant("twelve"),
                ),
                tools=(TOOL,),
            ),
        ],
    ],
)
def test_written_rows_are_read_back(records: list[Record], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_records(path, records)
    found = [replace(record, source=Source(), meta={}) for record in read_records(path).records]
    assert found == records


def test_other_records_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    judged = Judged(prompt=(user("a"),), completion=(assistant("b"),), label=True)
    with pytest.raises(DataError, match="Judged"):
        write_records(tmp_path / "rows.jsonl", [judged])
    assert list(tmp_path.iterdir()) == []
