"""`tailor serve` as a process: killed while a job trains, its base removed, on a disk without room."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
from live_command import Command, running, until

from tailor.jobs.database import open_database
from tailor.jobs.outcome import run_of
from tailor.jobs.process import Process
from tailor.jobs.queue import Queue
from tailor.jobs.worker import folder_of
from tailor.models.files import resolve

MODEL = "tailor-nano"
ROWS = b"".join(
    b'{"messages": [{"role": "user", "content": "Is %d even?"}, {"role": "assistant", "content": "%s"}]}\n'
    % (n, b"no" if n % 2 else b"yes")
    for n in range(12)
)


def say(command: Command, model: str) -> str:
    said: Any = [{"role": "user", "content": "Is 4 even?"}]
    answer = command.client.chat.completions.create(model=model, messages=said, temperature=0, max_tokens=6)
    return answer.choices[0].message.content or ""


def create(command: Command, model: str, **train: Any) -> str:
    uploaded = command.client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    extra = {"tailor": {"recipe": {"train": {"batch_size": 4, **train}}}}
    asked: Any = {"model": model, "suffix": "even", "seed": 1, "extra_body": extra}
    return command.client.fine_tuning.jobs.create(training_file=uploaded.id, **asked).id


def wait(command: Command, job_id: str, status: str) -> Any:
    def seen() -> str:
        return command.client.fine_tuning.jobs.retrieve(job_id).status

    until(lambda: seen() in (status, "failed", "succeeded"), command.log.read_text)
    job = command.client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == status, (job.error, command.log.read_text())
    return job


@pytest.mark.slow
@pytest.mark.parametrize("its_job_too", [False, True])
def test_a_server_killed_while_a_job_runs_finishes_it_once(own_home: Path, its_job_too: bool) -> None:
    options = ("--base", MODEL, "--dtype", "float32", "--job-threads", "1")
    with running(own_home, *options) as command:
        alone = say(command, MODEL)
        job_id = create(command, MODEL, num_steps=60, checkpoint_every=5, patience=None, eval_every=30)
        done = create(command, MODEL, num_steps=1)
        events = command.client.fine_tuning.jobs.list_events
        until(lambda: sum(event.type == "metrics" for event in events(job_id, limit=100)) >= 8, command.log.read_text)
        command.kill()
        if its_job_too:
            Process(folder_of(job_id)).signal(signal.SIGKILL)
    with running(own_home, *options) as command:
        job = wait(command, job_id, "succeeded")
        other = wait(command, done, "succeeded")
        listed = {model.id: model.root for model in command.client.models.list()}  # type: ignore[attr-defined]
        assert {MODEL, job.fine_tuned_model, other.fine_tuned_model} <= set(listed)
        assert len(listed) == len(set(listed.values()))  # every model once, whatever names it has
        kept = [one.fine_tuned_model_checkpoint for one in command.client.fine_tuning.jobs.checkpoints.list(job_id)]
        assert job.fine_tuned_model in kept
        assert set(kept) <= set(listed)
        assert all(say(command, model) for model in kept)
        say(command, job.fine_tuned_model)
        assert say(command, MODEL) == alone
        told = list(command.client.fine_tuning.jobs.list_events(job_id, limit=100))
        steps = [event.data["step"] for event in told if event.type == "metrics"]  # type: ignore[index]
        assert steps == list(range(60, 0, -1))
        assert sum("successfully completed" in event.message for event in told) == 1
        assert "Traceback" not in command.log.read_text()
    queue = Queue(open_database())
    name = queue.get(job_id).name
    assert len(list((own_home / "runs").glob(f"{name}-*"))) == 1
    assert run_of(name).manifest["status"] == "finished"  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_base_that_is_removed_goes_on_answering_and_fails_jobs_by_name(own_home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my-base"
    shutil.copytree(resolve(MODEL), folder)
    with running(own_home, "--base", str(folder), "--dtype", "float32", "--job-threads", "1") as command:
        model = command.client.models.list().data[0].id
        before = say(command, model)
        shutil.rmtree(folder)
        with contextlib.suppress(openai.BadRequestError):  # refused at once is as good
            job_id = create(command, model, num_steps=2)
            job = wait(command, job_id, "failed")
            assert "my-base" in job.error.message
            assert str(tmp_path) not in job.error.message
        assert say(command, model) == before
        assert [one.id for one in command.client.models.list()] == [model]
        assert "Traceback" not in command.log.read_text()


def may_mount() -> bool:
    program = shutil.which("unshare")
    if program is None:
        return False
    there = [program, "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(there, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_a_full_disk_fails_a_job_by_name_and_loses_nothing(own_home: Path) -> None:
    """Two megabytes are too few for a checkpoint; when there is room, the run goes on from where it can."""
    if not may_mount() or shutil.which("nsenter") is None:
        pytest.skip("needs the right to mount a tmpfs")
    own_home.mkdir()
    mounting = f"mount -t tmpfs -o size=2m tmpfs '{own_home}' && exec \"$@\""
    options = ("--base", MODEL, "--dtype", "float32", "--job-threads", "1")
    with running(own_home, *options, inside=("unshare", "-rm", "sh", "-c", mounting, "sh")) as command:
        before = say(command, MODEL)
        job_id = create(command, MODEL, num_steps=3, checkpoint_every=1)
        job = wait(command, job_id, "failed")
        assert (job.error.code, job.error.param) == ("storage_full", None)
        assert "No space left on device" in job.error.message
        assert str(own_home) not in job.error.message
        assert say(command, MODEL) == before
        assert command.client.files.content(job.training_file).read() == ROWS
        roomier = ("mount", "-o", "remount,size=64m", str(own_home))
        there = ("nsenter", "--preserve-credentials", "-U", "-m", "-t", str(command.process.pid))
        subprocess.run([*there, *roomier], check=True)
        again = wait(command, create(command, MODEL, num_steps=3, checkpoint_every=1), "succeeded")
        assert say(command, again.fine_tuned_model)
        assert command.client.fine_tuning.jobs.retrieve(job_id).status == "failed"
        assert "Traceback" not in command.log.read_text()


@pytest.mark.slow
def test_a_full_disk_refuses_uploads_and_nothing_else(own_home: Path) -> None:
    """TAILOR_HOME on a real file system of two megabytes, in a namespace of the server's own."""
    if not may_mount():
        pytest.skip("needs the right to mount a tmpfs")
    own_home.mkdir()
    mounting = f"mount -t tmpfs -o size=2m tmpfs '{own_home}' && exec \"$@\""
    options = ("--base", MODEL, "--dtype", "float32", "--jobs", "0")
    with running(own_home, *options, inside=("unshare", "-rm", "sh", "-c", mounting, "sh")) as command:
        before = say(command, MODEL)
        kept: list[tuple[str, bytes]] = []
        refused: openai.APIStatusError | None = None
        while refused is None and len(kept) < 20:
            content = bytes([65 + len(kept)]) * 300_000
            try:
                kept.append((command.client.files.create(file=content, purpose="batch").id, content))
            except openai.APIStatusError as error:
                refused = error
        assert refused is not None
        assert (refused.status_code, refused.code) == (507, "storage_full")
        assert refused.response.headers["x-should-retry"] == "false"
        assert kept
        for file_id, content in kept:
            assert command.client.files.content(file_id).read() == content
        inside = Path(f"/proc/{command.process.pid}/root{own_home}/files")
        assert sorted(path.name for path in inside.iterdir()) == sorted(file_id for file_id, _ in kept)
        assert say(command, MODEL) == before
        command.client.files.delete(kept.pop()[0])
        kept.append((command.client.files.create(file=b"x" * 100_000, purpose="batch").id, b""))
        assert {file.id for file in command.client.files.list()} == {file_id for file_id, _ in kept}
