"""`tailor recommend` on the command line: what a person reads, and the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailor.cli.main import run


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path / "home"))
    path = tmp_path / "tickets.jsonl"
    lines = ({"prompt": f"ticket {k}", "completion": ("card", "cash")[k % 2]} for k in range(40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_in_words(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", str(rows), "--customizations", "3", "--changes", "daily"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert lines[0].startswith(f"{rows}: 40 rows with a completion, labels (2 different)")
    assert "knowledge changes daily; 3 customizations side by side" in lines[1]
    numbered = [line for line in lines if line[:2] in ("1.", "2.", "3.")]
    assert numbered == [
        "1. retrieval-augmented generation  (not in this tailor yet)",
        "2. lora (parameter-efficient fine-tuning)",
        "3. ia3 (parameter-efficient fine-tuning)",
    ]
    assert "   40 rows: too few, it takes 50 at least" in lines
    assert lines[-1] == f"  tailor tune {rows} --technique lora"


def test_as_json(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["facts"]["rows"], found["facts"]["kind"], found["facts"]["labels"]) == (40, "labels", 2)
    assert (found["decided_by"], found["first_technique"]) == ("rule", "lora")
    assert found["choices"][0]["standing"] == "too_few"
    assert found["choices"][0]["available"] is True
    assert found["commands"][0].startswith(f"tailor compare {rows} --techniques lora,ia3,adapter")


def test_wrong_flags(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", str(rows), "--changes", "hourly"]) == 2
    assert "never" in capsys.readouterr().err
    assert run(["recommend", str(rows), "--customizations", "0"]) == 2
    assert run(["recommend", str(rows.with_name("absent.jsonl"))]) == 6


def test_what_the_data_says_never_reaches_the_terminal(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rows.with_name("rows \x1b[2J.jsonl")
    path.write_text(rows.read_text())
    assert run(["recommend", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2J" in out
