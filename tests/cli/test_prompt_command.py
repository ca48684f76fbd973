"""`tailor prompt` on the embedded base: searched, shown, compared, resumed, and used like any other artifact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mood_rows import write_moods
from tailor.cli.main import run
from tailor.models.base import load_base
from tailor.text.messages import assistant, system, user

SMALL = ["data.max_selection=8", "data.max_held_out=6", "num_sets=3", "num_instructions=1", "--rounds", "1"]
SEARCH = ["--shots", "2", "--budget", "200", "--metric", "label_accuracy", "--json", "--quiet", *SMALL]


@pytest.fixture
def rows(own_home: Path, tmp_path: Path) -> str:
    return str(write_moods(tmp_path))


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def tune(rows: str, name: str, *settings: str) -> None:
    command = ["tune", rows, "-t", "prompting", "--name", name, "--no-verify", "--quiet", *settings]
    assert run(command) == 0


def test_a_search_on_the_embedded_base(rows: str, own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prompt", "optimize", rows, *SEARCH]
    assert run(command) == 0
    report = told(capsys)
    assert report["name"] == "moods-prompt"
    assert report["rows"]["held_out"] == 6
    assert report["calls"]["search"] + report["calls"]["held_out"] <= 200
    assert report["held_out"]["drawn"]["prompt_tokens"] > report["held_out"]["start"]["prompt_tokens"]
    assert {"search.json", "recipe.yaml", "journal.jsonl", "report.json"} <= {
        path.name for path in (own_home / "prompts" / "moods-prompt").iterdir()
    }
    assert run(["resume", "moods-prompt", "--quiet"]) == 0  # finished: shown again, for people
    text = capsys.readouterr().out
    assert "label_accuracy" in text
    assert "held out" in text
    assert run([*command, "--seed", "1"]) == 8
    assert (own_home / "artifacts" / "moods-prompt").is_dir() == (report["artifact"] is not None)


def test_a_prompt_that_was_found_is_an_artifact_like_others(
    rows: str, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["prompt", "optimize", rows, "--system", "Name the mood.", *SEARCH]) == 0
    report = told(capsys)
    if report["artifact"] is None:  # nothing beat the system text on this machine's numbers
        tune(rows, "moods-prompt")
    assert run(["eval", "moods-prompt", rows, "--metric", "label_accuracy", "--json", "--quiet"]) == 0
    assert told(capsys)["num_rows"] == 24
    assert run(["prompt", "show", "moods-prompt", "I feel odd", "--json"]) == 0
    assert told(capsys)["turns"][-1]["content"] == "I feel odd"
    assert run(["generate", "moods-prompt", "I feel odd", "--max-new-tokens", "3", "--json"]) == 0
    assert len(told(capsys)["completions"]) == 1


def test_show_counts_what_the_base_reads(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    tune(rows, "moods", "technique.system=Name the mood.", "technique.shots=1", "technique.selection=fixed")
    capsys.readouterr()
    assert run(["prompt", "show", "moods", "I feel odd", "--json"]) == 0
    found = told(capsys)
    turns = [turn["content"] for turn in found["turns"]]
    assert [turn["role"] for turn in found["turns"]] == ["system", "user", "assistant", "user"]
    assert (turns[0], turns[3]) == ("Name the mood.", "I feel odd")
    base = load_base("tailor-nano")
    prompt = base.renderer.prompt([system(turns[0]), user(turns[1]), assistant(turns[2]), user(turns[3])])
    assert found["num_tokens"] == len(prompt)
    assert found["template_tokens"] == len(prompt) - sum(turn["num_tokens"] for turn in found["turns"])
    assert run(["prompt", "show", "moods"]) == 0
    text = capsys.readouterr().out
    assert "{prompt}" in text
    assert f"{found['num_tokens']}" not in text.splitlines()[0]


def test_show_with_shots_by_embedding(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    tune(rows, "near", "technique.selection=mmr", "technique.similarity=embedding", "technique.shots=2")
    capsys.readouterr()
    assert run(["prompt", "show", "near", "I feel glad 99", "--json"]) == 0
    assert len(told(capsys)["turns"]) == 5


def test_diff(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    tune(rows, "one", "technique.shots=1", "technique.selection=fixed")
    tune(rows, "other", "technique.shots=2", "technique.selection=fixed", "technique.system=Say it.")
    capsys.readouterr()
    assert run(["prompt", "diff", "one", "other", "--json"]) == 0
    found = told(capsys)
    assert found["settings"]["shots"] == [1, 2]
    assert found["settings"]["system"] == [None, "Say it."]
    assert found["settings"]["examples"] == [2, 3]
    assert {"+[system]", "+Say it."} <= set(found["lines"])
    assert not any(line.startswith("-") for line in found["lines"][1:])
    assert run(["prompt", "diff", "one", "one"]) == 0
    assert "the texts are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["show", "tailor-nano"], 6, "is a base"),
        (["show", "nobody"], 6, "no artifact"),
        (["optimize", "ROWS", "--budget", "10"], 3, "too small"),
        (["optimize", "ROWS", "--metric", "bleu"], 3, "single answers"),
        (["optimize", "ROWS", "--base", "nobody"], 6, "nobody"),
        (["optimize", "ROWS", "--start", "nobody"], 6, "no artifact"),
        (["optimize", "ROWS", "--start", "a", "--system", "b"], 2, "--start or --system"),
        (["optimize", "ROWS", "max_shot=3"], 3, "did you mean 'max_shots'"),
    ],
)
def test_wrong_words(
    rows: str, capsys: pytest.CaptureFixture[str], command: list[str], code: int, message: str
) -> None:
    assert run(["prompt", *(rows if word == "ROWS" else word for word in command)]) == code
    assert message in capsys.readouterr().err
