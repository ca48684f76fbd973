"""`tailor hosted tune`: rows up, a job followed through all its states, and an artifact that answers by the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hosted_journey import hosted_journey
from hosted_stub import Fault, Stub, stub_endpoint
from mood_rows import write_lines, write_moods
from tailor.artifacts.artifact import find
from tailor.data.readers import read_records
from tailor.errors import ConfigError, ConflictError, DataError, InterruptedRunError, NotFoundError, TailorError
from tailor.inference.load import load
from tailor.recipes import hosted_jobs
from tailor.recipes.evaluate import evaluate
from tailor.recipes.hosted_jobs import STATES, chat_rows
from tailor.recipes.hosted_tune import HostedTuneRecipe, cancel, finish, hosted_tune, start


@pytest.fixture
def stub(own_home: Path) -> Iterator[Stub]:
    with stub_endpoint() as running:
        yield running


def recipe(stub: Stub, rows: Path, **more: Any) -> HostedTuneRecipe:
    return HostedTuneRecipe.model_validate(
        {"base": f"openai:m@{stub.url}", "data": {"train": str(rows)}, "name": "moods", **more}
    )


def test_from_rows_to_answers(stub: Stub, tmp_path: Path) -> None:
    said: list[str] = []
    rows = write_moods(tmp_path)
    made = hosted_tune(recipe(stub, rows, n_epochs=3, suffix="mood"), say=said.append, poll=0.0)
    assert (made.kind, made.manifest["model"]) == ("hosted", "ft:m:org:mood:1a2b3c4d")
    (job,) = stub.bodies("/v1/fine_tuning/jobs")
    numbers = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    uploads = {key: content.decode().splitlines() for key, (_, content) in stub.files.items()}
    assert sorted(map(len, uploads.values())) == [2, 22]
    first = json.loads(uploads[job["training_file"]][0])
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]
    assert said.count("  step 1: loss 0.5") == 1
    assert [line.split(": ")[1] for line in said if line.startswith("ftjob-1: ")] == [
        "validating_files",
        "queued",
        "running",
        "succeeded",
    ]
    stub.answer = lambda asked: "glad" if asked["model"].startswith("ft:") else "?"
    assert load("moods").generate("hi") == "glad"
    assert evaluate("moods", rows).metrics["accuracy"].mean == 0.5
    assert find("moods").manifest["labels"] == ["glad", "sad"]


def test_ctrl_c_leaves_the_job_and_says_how_to_go_on(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hosted_jobs.time, "sleep", interrupted)
        with pytest.raises(InterruptedRunError, match="goes on") as raised:
            hosted_tune(recipe(stub, write_moods(tmp_path)), say=lambda text: None)
    assert raised.value.hint == "follow it again: tailor hosted tune --follow ftjob-1"
    assert stub.jobs["ftjob-1"]["status"] != "cancelled"
    made = finish("ftjob-1", say=lambda text: None, poll=0.0)
    assert made.name == "moods"
    looks = stub.jobs["ftjob-1"]["looks"]
    assert finish("ftjob-1", say=lambda text: None).manifest == made.manifest
    assert stub.jobs["ftjob-1"]["looks"] == looks, "it is registered already"


def test_states_of_other_providers(stub: Stub, tmp_path: Path) -> None:
    stub.states = ["STATUS_QUEUED", "Dreaming", "InProgress", "Completed"]
    said: list[str] = []
    hosted_tune(recipe(stub, write_moods(tmp_path)), say=said.append, poll=0.0)
    assert "ftjob-1: Dreaming (warning: a state unknown to tailor; taken for running)" in said
    assert set(STATES.values()) == {"queued", "running", "paused", "cancelled", "succeeded", "failed"}


@pytest.mark.parametrize(
    ("states", "oddity", "kind", "told"),
    [
        (["failed"], "", DataError, r"line 3 has no answer \(invalid_training_file\)"),
        (["cancelled"], "", TailorError, "was cancelled"),
        (["succeeded"], "no_finished_model", TailorError, "does not say which model"),
    ],
)
def test_jobs_that_end_without_a_model(
    states: list[str], oddity: str, kind: type[TailorError], told: str, stub: Stub, tmp_path: Path
) -> None:
    stub.states, stub.oddities = states, {oddity}
    with pytest.raises(kind, match=told):
        hosted_tune(recipe(stub, write_moods(tmp_path)), say=lambda text: None, poll=0.0)
    with pytest.raises(NotFoundError):
        find("moods")


def test_an_endpoint_without_events(stub: Stub, tmp_path: Path) -> None:
    stub.oddities.add("no_events")
    assert hosted_tune(recipe(stub, write_moods(tmp_path)), say=lambda text: None, poll=0.0).kind == "hosted"


def test_preferences(stub: Stub, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{k}", "chosen": f"good {k}", "rejected": f"bad {k}"} for k in range(12)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(DataError, match="supervised takes prompts") as raised:
        start(recipe(stub, path), say=lambda text: None)
    assert "--method dpo" in str(raised.value.hint)
    hosted_tune(recipe(stub, path, method="dpo", beta=0.2), say=lambda text: None, poll=0.0)
    (job,) = stub.bodies("/v1/fine_tuning/jobs")
    assert job["method"]["dpo"]["hyperparameters"]["beta"] == 0.2
    row = json.loads(stub.files[job["training_file"]][1].splitlines()[0])
    assert row["preferred_output"][0]["content"].startswith("good")
    assert set(row) == {"input", "preferred_output", "non_preferred_output"}


def test_what_is_wrong_is_said_before_anything_is_uploaded(stub: Stub, tmp_path: Path) -> None:
    rows = write_moods(tmp_path)
    with pytest.raises(ValueError, match="beta is a setting of dpo"):
        recipe(stub, rows, beta=0.1)
    with pytest.raises(ConfigError, match="names no hosted model"):
        start(recipe(stub, rows, base="tailor-nano"), say=lambda text: None)
    hosted_tune(recipe(stub, rows), say=lambda text: None, poll=0.0)
    uploads = len(stub.files)
    with pytest.raises(ConflictError, match="moods"):
        start(recipe(stub, rows), say=lambda text: None)
    assert len(stub.files) == uploads


def test_jobs_from_elsewhere(stub: Stub, tmp_path: Path) -> None:
    job = start(recipe(stub, write_moods(tmp_path)), say=lambda text: None)
    hosted_jobs.record_of(job).unlink()
    with pytest.raises(NotFoundError, match="was not begun here"):
        finish(job, say=lambda text: None)
    made = finish(job, say=lambda text: None, base=f"openai:m@{stub.url}", name="other", poll=0.0)
    assert made.manifest["model"].startswith("ft:m:org:moods:")
    with pytest.raises(NotFoundError, match="no such thing"):
        finish("ftjob-9", say=lambda text: None, base=f"openai:m@{stub.url}", name="third", poll=0.0)


def test_an_endpoint_that_is_down_for_a_while(stub: Stub, tmp_path: Path) -> None:
    job = start(recipe(stub, write_moods(tmp_path)), say=lambda text: None)
    stub.states = ["running"]
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "running" in text:
            stub.faults.append(Fault(503, "down", headers={"x-should-retry": "false"}))

    with pytest.raises(TailorError, match="down") as raised:
        finish(job, say=say, poll=0.0)
    assert "tailor hosted tune --follow" in str(raised.value.hint)


def test_cancel(stub: Stub, tmp_path: Path) -> None:
    job = start(recipe(stub, write_moods(tmp_path)), say=lambda text: None)
    assert cancel(job) == "cancelled"


def test_rows_come_back_as_they_went(tmp_path: Path) -> None:
    call = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"a": 1}}}
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": chat, "tools": tools}] * 3)
    row = json.loads(chat_rows(read_records(path).records).splitlines()[0])
    assert row["messages"][2] == {"role": "assistant", "content": "no", "weight": 0}
    assert json.loads(row["messages"][4]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert row["tools"] == tools


def test_the_whole_journey(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda asked: "glad" if asked["model"].startswith("ft:") else "?"
    done = hosted_journey(stub.url, "m", write_moods(tmp_path), tmp_path)
    assert (done.before.metrics["accuracy"].mean, done.after.metrics["accuracy"].mean) == (0.0, 0.5)
    assert done.imported.sides == {"train": 22, "validation": 2}
    assert done.artifact.manifest["model"].startswith("ft:m:org:trip:")


def test_no_key_is_written(stub: Stub, tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    hosted_tune(recipe(stub, write_moods(tmp_path)), say=lambda text: None, poll=0.0)
    assert {asked.headers["authorization"] for asked in stub.asked} == {"Bearer sk-secret"}
    kept = b"".join(path.read_bytes() for path in own_home.rglob("*") if path.is_file())
    assert b"sk-secret" not in kept
