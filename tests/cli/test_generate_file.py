"""`tailor generate --file`: which prompts and tools of a file reach the model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tailor.inference.load
from tailor.cli.main import run
from tailor.inference.backend import Completion

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[tuple[str, str]], list[Any]]]:
    """(turns, tools) of every prompt that the command asks."""
    seen: list[tuple[list[tuple[str, str]], list[Any]]] = []

    def complete(prompts: list[Any], *, tools: list[Any], **settings: Any) -> list[Completion]:
        for turns, schemas in zip(prompts, tools, strict=True):
            seen.append(([(m.role, m.content) for m in turns], list(schemas)))
        return [Completion("fine", (1,), (0.0,), "stop", 3, "fine") for _ in prompts]

    monkeypatch.setattr(tailor.inference.load, "load", lambda *a, **k: SimpleNamespace(complete=complete))
    monkeypatch.setattr(tailor.inference.load, "find_or_none", lambda *a: None)
    return seen


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_prompts_alone(asked: list[Any], tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": "one", "id": 1}, {"prompt": [{"role": "user", "content": "two"}]})
    assert run(["generate", "x", "--file", file, "--system", "S"]) == 0
    assert asked == [([("system", "S"), ("user", "one")], []), ([("system", "S"), ("user", "two")], [])]


def test_conversations_with_tools(asked: list[Any], tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns], "tools": [TOOL]}
    assert run(["generate", "x", "--file", write(tmp_path, row)]) == 0
    assert asked == [(turns, [TOOL])]


def test_columns_and_bad_rows(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, {"question": "one"}, {"question": ""}, {"question": "two"})
    assert run(["generate", "x", "--file", file]) == 4
    command = ["generate", "x", "--file", file, "--columns", "prompt=question"]
    assert run(command) == 4
    assert f"{file}:2: field 'prompt' is empty" in capsys.readouterr().err
    assert asked == []
    assert run([*command, "--skip-bad-rows"]) == 0
    assert [turns[-1][1] for turns, _ in asked] == ["one", "two"]
    assert "1 bad rows were skipped (lines 2)" in capsys.readouterr().err


def test_documents_ask_nothing(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, {"text": "a document"})
    assert run(["generate", "x", "--file", file]) == 4
    assert f"{file}:1: a Document has no prompt to answer" in capsys.readouterr().err
    assert asked == []


def test_the_real_base_answers_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, {"prompt": "one"}, {"prompt": "two"})
    assert run(["generate", "tailor-nano", "--file", file, "--max-new-tokens", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["completions"]) == 2
