"""Rows to be answered: which turns each kind asks, and that training rows stay as strict as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tailor.data.prompts import question_of, read_prompts
from tailor.data.readers import read_records
from tailor.data.records import tools_of
from tailor.data.rows import BadRowsError
from tailor.errors import ConfigError, DataError

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*turns: str) -> list[dict[str, str]]:
    """`u:hello` is a user's turn, `a:` an assistant's, `s:` a system's."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


@pytest.mark.parametrize(
    ("row", "format", "asked"),
    [
        ({"prompt": "P"}, "prompt", ["P"]),
        ({"prompt": "P", "completion": None, "id": 3}, "prompt", ["P"]),
        ({"prompt": chat("s:S", "u:P")}, "prompt", ["S", "P"]),
        ({"messages": chat("u:P")}, "openai_chat", ["P"]),
        ({"messages": chat("u:P", "a:A", "u:Q")}, "openai_chat", ["P", "A", "Q"]),
        ({"messages": chat("u:P", "a:A")}, "openai_chat", ["P"]),
        ({"conversations": [{"from": "human", "value": "P"}]}, "sharegpt", ["P"]),
        ({"prompt": "P", "completion": "C"}, "prompt_completion", ["P"]),
        ({"instruction": "P", "output": "C"}, "alpaca", ["P"]),
        ({"prompt": "P", "chosen": "C", "rejected": "R"}, "preference", ["P"]),
        ({"prompt": "P", "completion": "C", "label": True}, "kto", ["P"]),
        ({"prompt": "P", "response": "C", "quality": 1, "humor": 2, "toxicity": 0}, "helpsteer", ["P"]),
    ],
)
def test_what_a_row_asks(row: dict[str, Any], format: str, asked: list[str], tmp_path: Path) -> None:
    reading = read_prompts(write(tmp_path, row, row))
    assert reading.detection.format == format
    assert [[m.content for m in question_of(record)] for record in reading.records] == [asked, asked]
    assert reading.records[1].source.line == 2


def test_tools_come_along(tmp_path: Path) -> None:
    reading = read_prompts(write(tmp_path, {"messages": chat("u:P"), "tools": [TOOL]}))
    assert tools_of(reading.records[0]) == (TOOL,)


def test_a_table_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("id,question\n1,one\n2,two\n")
    reading = read_prompts(path, columns={"prompt": "question"})
    assert [question_of(record)[0].content for record in reading.records] == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"text": "T"}, "Document"), ({"anchor": "Q", "positive": "A"}, "Retrieval")],
)
def test_kinds_without_a_prompt_are_refused_by_place(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, row)
    with pytest.raises(DataError, match=rf"rows.jsonl:1: a {kind} has no prompt to answer"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": chat("u:P", "u: ")}, r"turn 2 \(user\) is empty"),
        ({"messages": chat("s:S")}, "only system turns"),
        ({"messages": chat("a:A", "u:P")}, "comes before any user turn"),
    ],
)
def test_bad_questions_are_named(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": chat("u:P")}, row)
    with pytest.raises(BadRowsError, match=rf"rows.jsonl:2: .*{reason}"):
        read_prompts(path)
    assert len(read_prompts(path, skip_bad_rows=True).records) == 1


def test_a_prompt_that_ends_in_an_answer_asks_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match="the prompt ends in an assistant turn"):
        read_prompts(write(tmp_path, {"prompt": chat("u:P", "a:A")}))


def test_training_rows_still_need_answers(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError, match="there is no assistant turn"):
        read_records(write(tmp_path, {"messages": chat("u:P")}))
    with pytest.raises(DataError, match="in no known format"):
        read_records(write(tmp_path, {"prompt": "P"}))
    with pytest.raises(ConfigError, match="there is no data format 'prompt'"):
        read_records(write(tmp_path, {"prompt": "P"}), format="prompt")
