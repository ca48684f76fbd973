"""Hosted bases on the command line: asking, evaluating, prompting, tuning, bringing home; keys are never shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosted_stub import Stub, stub_endpoint
from mood_rows import write_moods
from tailor.cli.main import run


@pytest.fixture
def stub(own_home: Path) -> Iterator[Stub]:
    with stub_endpoint() as running:
        running.answer = lambda asked: "glad"
        yield running


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_moods(tmp_path))


def test_generate(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", f"openai:m@{stub.url}", "hi", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["completions"][0]["text"] == "glad"
    assert found["completions"][0]["num_tokens"] == 2
    assert (found["usage"]["requests"], found["usage"]["cost"]) == (1, None)
    assert "1 requests, 10 prompt tokens" in err


def test_chat_streams(stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["hi", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(["chat", f"openai:m@{stub.url}"]) == 0
    assert capsys.readouterr().out == "glad\n"
    assert stub.bodies("/v1/chat/completions")[0]["stream"] is True


def test_eval_with_a_gate(stub: Stub, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", f"openai:m@{stub.url}", rows, "--json", "-q", "--min", "accuracy=0.9"]) == 9
    found = json.loads(capsys.readouterr().out)
    assert found["metrics"]["accuracy"]["mean"] == 0.5


def test_prompting_around_a_hosted_base(stub: Stub, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"openai:m@{stub.url}"
    assert run(["tune", rows, "-t", "prompting", "--base", base, "-n", "shown", "-q", "technique.shots=2"]) == 0
    assert run(["generate", "shown", "I feel fine"]) == 0
    assert len(stub.bodies("/v1/chat/completions")[0]["messages"]) == 5
    assert run(["artifacts", "list"]) == 0
    capsys.readouterr()


def test_weights_are_refused_by_name(stub: Stub, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", rows, "-t", "lora", "--base", f"openai:m@{stub.url}", "-q"]) == 3
    told = capsys.readouterr().err
    assert "lora needs the base's weights" in told
    assert "tailor hosted tune" in told


def test_recommend(stub: Stub, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", rows, "--base", f"openai:m@{stub.url}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [choice["name"] for choice in found["choices"]] == ["prompting"]
    assert found["commands"][-1].startswith("tailor hosted tune")
    assert run(["recommend", rows, "--base", f"openai:m@{stub.url}"]) == 0
    assert ", hosted" in capsys.readouterr().out


def test_hosted_tune_and_import(stub: Stub, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = ["hosted", "tune", rows, "--base", f"openai:m@{stub.url}", "--n-epochs", "2", "--poll", "0.01"]
    assert run([*tune, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == "ft:m:org:moods-hosted:1a2b3c4d"
    assert "ftjob-1: succeeded" in err
    assert run(["hosted", "tune", "--follow", "ftjob-1"]) == 0
    home = str(tmp_path / "rows")
    assert run(["import-openai", "ftjob-1", "--url", stub.url, "--to", home]) == 0
    assert "22 train rows, 2 validation rows as prompt and completion" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    assert run(["import-openai", "ftjob-1", "--url", stub.url, "--to", str(tmp_path / "mine"), "--force"]) == 8


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["tune"], 2, "give a data file and --base"),
        (["tune", "x.jsonl", "--follow", "j"], 2, "--follow takes no data"),
        (["tune", "--follow", "j"], 6, "was not begun here"),
        (["tune", "x.jsonl", "--base", "openai:m", "--beta", "0.1"], 3, "beta is a setting of dpo"),
        (["cancel", "j"], 6, "was not begun here"),
    ],
)
def test_mistakes(
    arguments: list[str], code: int, told: str, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["hosted", *arguments]) == code
    assert told in capsys.readouterr().err


def test_a_key_that_is_missing(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert run(["generate", "openai:m@https://host.invalid/v1", "hi"]) == 7
