"""What people pipe into files comes out as it is: answers, YAML and sentences longer than any console."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ruamel.yaml import YAML

import tailor.inference.load
from tailor.artifacts import artifact as artifacts
from tailor.artifacts.artifact import Artifact
from tailor.cli.main import run
from tailor.inference.backend import Completion

LONG = "word " * 60 + "[bold]no markup[/bold] :smile:\ta tab\n" + "x" * 300
SENTENCE = "a note of " + "many " * 60 + "words"


def test_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def complete(prompts: list[Any], **settings: Any) -> list[Completion]:
        return [Completion(LONG, (1,), (0.0,), "stop", 3, LONG) for _ in prompts]

    monkeypatch.setattr(tailor.inference.load, "load", lambda *a, **k: SimpleNamespace(complete=complete))
    monkeypatch.setattr(tailor.inference.load, "find_or_none", lambda *a: None)
    assert run(["generate", "anything", "hello"]) == 0
    assert capsys.readouterr().out == LONG + "\n"


def test_the_manifest_is_yaml_that_reads_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / ("deep" * 40)
    manifest = {"name": "mine", "techniques": [{"type": "prompting", "system": SENTENCE}], "note": LONG}
    monkeypatch.setattr(artifacts, "find", lambda name: Artifact("mine", folder, manifest))
    assert run(["artifacts", "show", "mine"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"# {folder}"
    assert YAML(typ="safe", pure=True).load(out) == manifest


def test_notes_of_an_evaluation_and_the_rows_it_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / ("rows" * 40)
    folder.mkdir()
    rows = folder / "rows.jsonl"
    good = [json.dumps({"prompt": f"say {k}", "completion": f"so {k}"}) for k in range(6)]
    rows.write_text("\n".join([*good[:2], '{"prompt": "no completion"}', *good[2:], "not JSON"]) + "\n")
    command = ["eval", "tailor-nano", str(rows), "-m", "exact_match", "--max-new-tokens", "2", "--quiet"]
    assert run(command) == 4
    capsys.readouterr()
    assert run([*command, "--skip-bad-rows"]) == 0
    note = f"{rows}: 2 bad rows were skipped (lines 3, 8)"
    assert note in capsys.readouterr().out.splitlines()
    assert run([*command, "--skip-bad-rows", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["notes"][0] == note
    assert out["num_rows"] == 6
