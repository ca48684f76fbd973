"""Several `tailor serve` with one database (PostgreSQL) and one TAILOR_HOME: whoever asks sees one server."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_command import Command, running, until

import postgres_server
from postgres_server import PASSWORD, QUOTED
from tailor.jobs.database import DATABASE_VARIABLE
from tailor.jobs.process import this_system
from tailor.jobs.worker import folder_of
from tailor.runs import home
from tailor.server.auth import KeyRing, keys_path

MODEL = "tailor-nano"
OPTIONS = ("--base", MODEL, "--dtype", "float32", "--job-threads", "1", "--job-niceness", "0")
ROWS = b"".join(
    b'{"messages": [{"role": "user", "content": "Is %d even?"}, {"role": "assistant", "content": "%s"}]}\n'
    % (n, b"no" if n % 2 else b"yes")
    for n in range(12)
)
ELSEWHERE = ("unshare", "-rpf", "--mount-proc", "--kill-child")
"""A machine of its own, as far as processes go: killing it leaves none of them."""

pytestmark = pytest.mark.slow


@pytest.fixture
def shared(own_home: Path, postgresql_database: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of servers that share a database; the URL is in the environment."""
    monkeypatch.setenv(DATABASE_VARIABLE, postgresql_database)
    return own_home


@contextlib.contextmanager
def at(command: Command, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=command.url, api_key=key, max_retries=0, timeout=60) as client:
        yield client


def say(client: openai.OpenAI, model: str) -> str:
    said: Any = [{"role": "user", "content": "Is 4 even?"}]
    answer = client.chat.completions.create(model=model, messages=said, temperature=0, max_tokens=6)
    return answer.choices[0].message.content or ""


def create(client: openai.OpenAI, file_id: str, **train: Any) -> str:
    extra = {"tailor": {"recipe": {"train": {"batch_size": 4, **train}}}}
    asked: Any = {"model": MODEL, "suffix": "even", "seed": 1, "extra_body": extra}
    return client.fine_tuning.jobs.create(training_file=file_id, **asked).id


def upload(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def statuses(client: openai.OpenAI, jobs: list[str]) -> dict[str, str]:
    return {job: client.fine_tuning.jobs.retrieve(job).status for job in jobs}


def quiet(*commands: Command) -> None:
    """Nothing went wrong in them, and nobody told the password."""
    for command in commands:
        told = command.log.read_text()
        assert "Traceback" not in told
        assert QUOTED not in told
        assert PASSWORD not in told


def starts(job: str) -> int:
    """How often a process was started for a job."""
    return len(list(folder_of(job).glob("stderr*.txt")))


def is_elsewhere(job: str) -> bool:
    """Whether its process was started in another space of processes."""
    with contextlib.suppress(FileNotFoundError):
        return (folder_of(job) / "pid").read_text().split()[1:] not in ([], [this_system()])
    return False


def listed(client: openai.OpenAI) -> set[str]:
    return {model.id for model in client.models.list()}


def step(client: openai.OpenAI, job: str) -> int:
    return int(client.fine_tuning.jobs.retrieve(job).to_dict()["tailor"]["step"])  # type: ignore[index, call-overload]


def test_two_servers_answer_as_one(shared: Path) -> None:
    key, _ = KeyRing(keys_path()).create("somebody", ["admin"])
    options = (*OPTIONS, "--record")
    with running(shared, *options, "--jobs", "0") as one, running(shared, *options) as other:
        with pytest.raises(openai.AuthenticationError):
            say(other.client, MODEL)
        with at(one, key) as a, at(other, key) as b:
            file_id = upload(a)
            assert b.files.retrieve(file_id) == a.files.retrieve(file_id)
            assert b.files.content(file_id).read() == ROWS
            job_id = create(b, file_id, num_steps=3, eval_every=1)
            events_of = a.fine_tuning.jobs.with_streaming_response.list_events
            with events_of(job_id, extra_query={"stream": "true"}) as stream:
                told = [line for line in stream.iter_lines() if line.startswith("data: ")]
            assert told[-1] == "data: [DONE]"
            assert sum("successfully completed" in line for line in told) == 1
            job = a.fine_tuning.jobs.retrieve(job_id)
            assert (job.status, job) == ("succeeded", b.fine_tuning.jobs.retrieve(job_id))
            assert a.files.list().data == b.files.list().data != []
            assert a.fine_tuning.jobs.list().data == b.fine_tuning.jobs.list().data == [job]
            events = [c.fine_tuning.jobs.list_events(job_id).data for c in (a, b)]
            assert events[0] == events[1]
            assert len(events[0]) == len(told) - 1

            model = job.fine_tuned_model or ""
            assert say(a, model) == say(b, model)
            assert {MODEL, model} <= listed(a) == listed(b)
            assert starts(job_id) == 1
            a.models.delete(model)
            assert model not in listed(a) == listed(b)
            for client in (a, b):
                with pytest.raises(openai.NotFoundError):
                    say(client, model)
            chat: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Is 4 even?"}], "max_tokens": 4}
            answer = a.chat.completions.create(**chat, store=True)
            vote = {"completion_id": answer.id, "kind": "vote", "vote": "up", "author": "Ann"}
            assert b.post("/feedback", body=vote, cast_to=object)
            b.files.delete(file_id)
            with pytest.raises(openai.NotFoundError):
                a.files.retrieve(file_id)
        KeyRing(keys_path()).revoke(KeyRing(keys_path()).keys()[0].key_id)
        assert say(one.client, MODEL) == say(other.client, MODEL)
        quiet(one, other)


def test_a_server_that_dies_leaves_its_jobs_to_the_others(shared: Path) -> None:
    """As a machine does that is switched off: its job's process is gone, and nothing says so but its silence."""
    if shutil.which("unshare") is None or subprocess.run([*ELSEWHERE, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a space of processes (unshare)")
    options = (*OPTIONS, "--job-lease", "6")
    with running(shared, *options) as one, running(shared, *options, inside=ELSEWHERE) as other:
        file_id = upload(one.client)
        train: dict[str, Any] = {"num_steps": 16, "checkpoint_every": 4, "patience": None, "eval_every": 16}
        jobs = [create((one, other)[n % 2].client, file_id, **train) for n in range(4)]
        until(lambda: any(is_elsewhere(job) for job in jobs), other.log.read_text)
        lost = next(job for job in jobs if is_elsewhere(job))
        until(lambda: step(one.client, lost) >= 5, other.log.read_text)
        other.kill()
        until(lambda: set(statuses(one.client, jobs).values()) == {"succeeded"}, one.log.read_text)
        assert {job: starts(job) for job in jobs} == {job: 2 if job == lost else 1 for job in jobs}
        for job in jobs:
            told = one.client.fine_tuning.jobs.list_events(job, limit=100).data
            assert [e.data["step"] for e in told if e.type == "metrics"] == list(range(16, 0, -1))  # type: ignore[index]
            assert sum("successfully completed" in event.message for event in told) == 1
            assert say(one.client, one.client.fine_tuning.jobs.retrieve(job).fine_tuned_model or "") is not None
        assert len(list((home() / "runs").iterdir())) == len(jobs)
        quiet(one, other)


def test_a_database_that_goes_and_comes_back(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres_server.server() as server, postgres_server.empty_database(server.url) as url:
        monkeypatch.setenv(DATABASE_VARIABLE, url)
        with running(own_home, *OPTIONS) as command:
            client = command.client
            file_id = upload(client)
            before = say(client, MODEL)
            job_id = create(client, file_id, num_steps=20, patience=None)
            until(lambda: statuses(client, [job_id])[job_id] == "running", command.log.read_text)
            server.stop()
            for ask in (lambda: client.files.list(), lambda: upload(client), lambda: statuses(client, [job_id])):
                with pytest.raises(openai.InternalServerError) as caught:
                    ask()
                assert (caught.value.status_code, caught.value.code) == (503, "database_unavailable")
                assert caught.value.response.headers["retry-after"] == "2"
                assert str(server.port) not in caught.value.response.text
            assert say(client, MODEL) == before
            server.start()
            until(lambda: statuses(client, [job_id])[job_id] == "succeeded", command.log.read_text)
            assert [file.id for file in client.files.list(purpose="fine-tune")] == [file_id]
            assert starts(job_id) == 1
            told = command.log.read_text()
            assert told.count("does not answer") == told.count("answers again") == 1
            quiet(command)
