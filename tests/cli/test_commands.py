"""The commands as a person types them: results on stdout, remarks on stderr, exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mood_rows import write_moods
from tailor.cli.main import run
from tailor.data.readers import read_records
from tailor.data.records import PromptCompletion
from tailor.data.writers import write_records
from tailor.recipes import demo as demo_recipe

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_moods(tmp_path)


@pytest.fixture
def tuned(rows: Path, capsys: pytest.CaptureFixture[str]) -> str:
    arguments = ["tune", str(rows), "-n", "moods", "train.num_steps=4", "technique.rank=2", "--quiet", "--json"]
    assert run(arguments) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["artifact"] == "moods"
    assert out["parity"]["passed"]
    assert out["recipe"]["technique"][0]["rank"] == 2
    return "moods"


def test_generate_one_and_many(tuned: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", tuned, "I feel glad", "--max-new-tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert run(["generate", tuned, "--file", str(rows), "--max-new-tokens", "5", "--json"]) == 0
    completions = json.loads(capsys.readouterr().out)["completions"]
    assert len(completions) == 24
    assert run(["generate", tuned, "I feel glad", "--max-new-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completions"][0]["text"] == text.rstrip("\n")
    assert run(["generate", tuned]) == 2
    assert run(["generate", "no-such-thing", "hello"]) == 6


def test_eval_scores_gates_and_rows(tuned: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    assert run(["eval", tuned, str(rows), "--rows", str(results), "--json", "--quiet"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert {"accuracy", "macro_f1", "label_accuracy", "perplexity"} <= set(out["metrics"])
    assert any("tuned on this very file" in note for note in out["notes"])
    others = tmp_path / "others.jsonl"
    others.write_text(rows.read_text().replace("I feel", "He feels"))
    assert run(["eval", tuned, str(others), "-m", "accuracy", "--json", "--quiet"]) == 0
    assert not any("this very file" in note for note in json.loads(capsys.readouterr().out)["notes"])
    assert len(results.read_text().splitlines()) == 24
    assert run(["eval", tuned, str(rows), "-m", "accuracy", "--min", "accuracy=1.01", "--quiet"]) == 9
    assert "below the gate" in capsys.readouterr().err
    assert run(["eval", tuned, str(rows), "-m", "acuracy", "--quiet"]) == 3
    assert "did you mean 'accuracy'" in capsys.readouterr().err


def test_chat_keeps_the_conversation(
    tuned: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("I feel glad\n\n/new\nI feel sad\n/quit\nnever read\n"))
    assert run(["chat", tuned, "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_verify_prints_every_hop(tuned: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", tuned, "--num-rows", "2"]) == 0
    out = capsys.readouterr().out
    for hop in ("cached generation", "reloaded artifact", "merged weights", "noise floor"):
        assert hop in out


def test_mistakes_are_told_all_at_once_with_places(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data:\n  train: x.jsonl\ntechnique: {type: lora, rnak: 8}\ntrain: {num_epochs: -1}\noutput: {name: a}\n"
    )
    assert run(["tune", str(recipe)]) == 3
    error = capsys.readouterr().err
    assert f"{recipe}:3" in error
    assert "did you mean 'rank'" in error
    assert f"{recipe}:4" in error
    assert run(["tune", str(recipe), "--json", "technique.rnak=4"]) == 3
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "config"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["tnue"], 2, "did you mean 'tune'"),
        (["tune", "no-such-file.jsonl"], 6, "no-such-file.jsonl"),
        (["resume", "nothing"], 6, "nothing"),
        (["tune", "{rows}", "-t", "lroa"], 3, "did you mean 'lora'"),
        (["tune", "{rows}", "-b", "tailor-nan"], 6, "did you mean 'tailor-nano'"),
        (["tune", "{rows}", "-b", "nobody/nothing"], 6, "tailor-nano"),
        (["tune", "{rows}", "technique.target_modules=[q_prj]"], 3, "did you mean 'q_proj'"),
        (["tune", "{rows}", "data.max_seq_len=8"], 4, "moods.jsonl:"),
        (["tune", "{rows}", "train.num_epochs=1", "train.num_steps=2"], 3, "no effect"),
        (["tune", "{rows}", "-n", "../evil"], 3, "../evil"),
        (["tune", "{rows}", "--device", "tpu"], 3, "tpu"),
    ],
)
def test_what_goes_wrong_is_said_with_the_nearest_choice(
    arguments: list[str], code: int, told: str, rows: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([a.replace("{rows}", str(rows)) for a in arguments]) == code
    assert told in capsys.readouterr().err
    assert not list(own_home.glob("artifacts/*"))  # nothing half-written


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    script = (
        "import sys; from tailor.cli.main import run; code = run(['--help']); "
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules); "
        "assert code == 0 and not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert "tune" in done.stdout


def test_the_demo_compares_and_says_what_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_records(demo_recipe.SAMPLE).records
    assert len(rows) > 300
    assert all(isinstance(r, PromptCompletion) for r in rows)
    write_records(tmp_path / "few.jsonl", rows[:32])
    monkeypatch.setattr(demo_recipe, "SAMPLE", tmp_path / "few.jsonl")
    monkeypatch.setattr(demo_recipe, "TECHNIQUES", {"prompting": {}, "lora": {"num_steps": 2}})
    assert run(["demo", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "prompting" in out
    assert "report.html" in out
    assert out.count("ticket  ") == 3
    assert "tailor compare YOUR.jsonl" in out
