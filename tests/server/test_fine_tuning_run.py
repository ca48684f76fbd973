"""A job from the upload to its model: trained really, by the worker's own processes, on the embedded base."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from live_jobs import app_of, client_of, served

from tailor.artifacts import artifact as artifacts
from tailor.data.dataset import DataSettings, load_dataset
from tailor.inference.backend import Request
from tailor.inference.local import LocalBackend
from tailor.jobs.database import open_database
from tailor.jobs.outcome import run_of
from tailor.jobs.queue import Queue
from tailor.jobs.worker import Worker, WorkerSettings, folder_of
from tailor.models.base import load_base
from tailor.recipes.tune_settings import BaseSettings
from tailor.server.file_store import FileStore
from tailor.server.files import files_router
from tailor.server.fine_tuning import fine_tuning_router
from tailor.server.fine_tuning_jobs import FineTuning
from tailor.text.messages import user

ROWS = b"".join(
    b'{"messages": [{"role": "user", "content": "Is %d even?"}, {"role": "assistant", "content": "%s"}]}\n'
    % (n, b"no" if n % 2 else b"yes")
    for n in range(12)
)


class Live(NamedTuple):
    client: openai.OpenAI
    jobs: FineTuning
    worker: Worker
    home: Path


@pytest.fixture
def live(own_home: Path) -> Iterator[Live]:
    engine = open_database()
    files, queue = FileStore(engine), Queue(engine)
    jobs = FineTuning(queue, files, lambda: {"tailor-nano": BaseSettings(dtype="float32")})
    settings = WorkerSettings(niceness=0, num_threads=1, poll_seconds=0.05, together=2)
    worker = Worker(queue, settings, finished=jobs.finished)
    jobs.start()
    worker.start()
    with served(app_of([files_router(files), fine_tuning_router(jobs)])) as url, client_of(url) as client:
        yield Live(client, jobs, worker, own_home)
    jobs.stop()
    worker.stop()
    engine.dispose()


def create(live: Live, train: dict[str, Any], **settings: Any) -> str:
    uploaded = live.client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    extra = {"tailor": {"recipe": {"train": {"batch_size": 4, **train}}}}
    asked = {"model": "tailor-nano", "suffix": "even", "seed": 1, "extra_body": extra, **settings}
    return live.client.fine_tuning.jobs.create(training_file=uploaded.id, **asked).id


def wait(live: Live, job_id: str, *statuses: str) -> Any:
    end = time.monotonic() + 200
    while (job := live.client.fine_tuning.jobs.retrieve(job_id)).status not in statuses:
        told = (folder_of(job_id) / "stderr.txt").read_text() if (folder_of(job_id) / "stderr.txt").exists() else ""
        assert job.status != "failed", (job.error, told)
        assert time.monotonic() < end, (job, told)
        time.sleep(0.05)
    return job


def test_an_uploaded_file_becomes_a_model(live: Live) -> None:
    job_id = create(live, {"num_steps": 2, "eval_every": 1}, metadata={"a": "b"})
    job = wait(live, job_id, "succeeded")
    assert job.fine_tuned_model.startswith("ft:tailor-nano:local:even:")
    assert (job.trained_tokens > 0, job.error, job.finished_at >= job.created_at) == (True, None, True)
    assert job.hyperparameters.to_dict() == {"n_epochs": 1, "batch_size": 4, "learning_rate_multiplier": 1.0}

    name = live.jobs.artifact_of(job.fine_tuned_model)
    assert name is not None
    assert artifacts.find(name).kind == "lora"
    assert [(one.id, one.artifact, one.base) for one in live.jobs.fine_tuned()] == [
        (job.fine_tuned_model, name, "tailor-nano")
    ]
    assert live.jobs.artifact_of("tailor-nano") is None

    (results,) = (live.client.files.retrieve(file_id) for file_id in job.result_files)
    assert results.purpose == "fine-tune-results"
    lines = live.client.files.content(results.id).text.splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    logged = run_of(name).metrics()  # type: ignore[union-attr]  # it has run
    assert lines[1:] == [f"{n['step']},{n['loss']},,{n['validation_loss']}," for n in logged]

    (checkpoint,) = live.client.fine_tuning.jobs.checkpoints.list(job_id)
    assert checkpoint.fine_tuned_model_checkpoint == job.fine_tuned_model
    best = artifacts.find(name).manifest["metrics"]
    assert (checkpoint.step_number, checkpoint.metrics.valid_loss) == (best["best_step"], best["validation_loss"])

    events = [event.message for event in live.client.fine_tuning.jobs.list_events(job_id, limit=3)][::-1]
    assert [event.split(":")[0] for event in events] == [
        "Created fine-tuning job",
        "Files validated",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/2",
        "Step 2/2",
        "New fine-tuned model created",
        "The job has successfully completed",
    ]

    again = wait(live, create(live, {"num_steps": 1}, model=job.fine_tuned_model, suffix=None), "succeeded")
    assert again.fine_tuned_model.startswith("ft:tailor-nano:local::")
    second = artifacts.find(live.jobs.artifact_of(again.fine_tuned_model) or "")
    assert (second.manifest["recipe"]["start"], second.kind) == (name, "lora")

    artifacts.remove(artifacts.find(name))
    assert live.jobs.artifact_of(job.fine_tuned_model) is None
    assert [one.id for one in live.jobs.fine_tuned()] == [again.fine_tuned_model]


def test_the_last_epochs_of_a_job_are_models_of_their_own(live: Live) -> None:
    train = {"num_steps": 12, "eval_every": 1, "patience": None, "learning_rate": 0.02}  # an epoch: 11 rows, 4 a step
    job_id = create(live, train)
    job = wait(live, job_id, "succeeded")
    name = live.jobs.artifact_of(job.fine_tuned_model)
    assert name is not None
    best = artifacts.find(name).manifest["metrics"]["best_step"]
    logged = {line["step"]: line for line in run_of(name).metrics()}  # type: ignore[union-attr]
    steps = sorted({6, 8, 11, best}, reverse=True)  # of 3, 6, 8 and 11 the last three
    found = list(live.client.fine_tuning.jobs.checkpoints.list(job_id, limit=1))  # page by page
    assert [checkpoint.step_number for checkpoint in found] == steps
    page = live.client.fine_tuning.jobs.checkpoints.list(job_id, limit=2)
    assert (page.has_more, page.first_id, page.last_id) == (len(steps) > 2, found[0].id, found[1].id)
    assert len({checkpoint.id for checkpoint in found}) == len(steps)
    for checkpoint in found:
        step = checkpoint.step_number
        own = job.fine_tuned_model if step == best else f"{job.fine_tuned_model}:ckpt-step-{step}"
        assert checkpoint.fine_tuned_model_checkpoint == own
        told = (checkpoint.metrics.step, checkpoint.metrics.train_loss, checkpoint.metrics.valid_loss)
        assert told == (step, logged[step]["loss"], logged[step]["validation_loss"])
    others = [c.fine_tuned_model_checkpoint for c in found[::-1] if c.step_number != best]
    assert sorted(one.id for one in live.jobs.fine_tuned()) == sorted([job.fine_tuned_model, *others])

    # each is the state that training had there: its loss on the row that was held out is the one that was logged
    base = load_base("tailor-nano", dtype="float32")
    recipe = artifacts.find(name).manifest["recipe"]
    dataset = load_dataset(DataSettings.model_validate(recipe["data"]), recipe["train"]["seed"])
    turns = [row.messages for row in dataset.validation]  # type: ignore[union-attr]
    asked = [Request((user(question.content),), "it") for question, _ in turns]
    for checkpoint in found:
        own = live.jobs.artifact_of(checkpoint.fine_tuned_model_checkpoint) or ""
        slot = artifacts.attach(base, artifacts.find(own))
        scores = LocalBackend(base, {"it": slot}).logprobs(asked, [answer.content for _, answer in turns])
        loss = -float(sum(score.sum() for score in scores)) / sum(map(len, scores))
        assert loss == pytest.approx(checkpoint.metrics.valid_loss, abs=1e-4)
        base.host.detach(slot)

    gone = next(checkpoint for checkpoint in found if checkpoint.step_number != best)
    artifacts.remove(artifacts.find(live.jobs.artifact_of(gone.fine_tuned_model_checkpoint) or ""))
    assert live.jobs.artifact_of(gone.fine_tuned_model_checkpoint) is None
    left = [checkpoint.id for checkpoint in live.client.fine_tuning.jobs.checkpoints.list(job_id)]
    assert left == [checkpoint.id for checkpoint in found if checkpoint.id != gone.id]
    for tail in ("1", "", "six"):
        assert live.jobs.artifact_of(f"{job.fine_tuned_model}:ckpt-step-{tail}") is None


@pytest.mark.slow
def test_a_job_that_is_killed_and_paused_comes_to_its_result(live: Live) -> None:
    train = {"num_steps": 60, "checkpoint_every": 5, "patience": None, "eval_every": 30}
    first = create(live, train)
    wait(live, first, "running")
    while live.jobs.queue.get(first).logged < 10:
        time.sleep(0.02)
    live.worker._running[0].process.signal(signal.SIGKILL)
    job = live.jobs.queue.get(first)
    while live.jobs.queue.get(first).logged < job.logged + 3:
        time.sleep(0.02)
    live.client.fine_tuning.jobs.pause(first)
    while live.jobs.queue.get(first).worker is not None:
        time.sleep(0.02)
    assert live.client.fine_tuning.jobs.retrieve(first).status == "paused"
    live.client.fine_tuning.jobs.resume(first)
    done = wait(live, first, "succeeded")
    assert len(list((live.home / "runs").glob(f"{job.name}-*"))) == 1
    rows = live.client.files.content(done.result_files[0]).text.splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, 61))
    told = [event.data["step"] for event in live.client.fine_tuning.jobs.list_events(first) if event.type == "metrics"]
    assert told == list(range(60, 0, -1))


@pytest.mark.slow
def test_jobs_of_one_base_are_trained_in_one_process(live: Live) -> None:
    live.worker.stop()
    ids = [create(live, {"num_steps": 2}), create(live, {"num_steps": 3})]
    for job_id in ids:
        wait(live, job_id, "queued")
    settings = WorkerSettings(niceness=0, num_threads=1, poll_seconds=0.05, together=2)
    worker = Worker(live.jobs.queue, settings, finished=live.jobs.finished)
    worker.start()
    try:
        done = [wait(live, job_id, "succeeded") for job_id in ids]
    finally:
        worker.stop()
    assert [folder_of(job_id).joinpath("stdout.txt").exists() for job_id in ids] == [True, False]
    names = [live.jobs.artifact_of(job.fine_tuned_model) or "" for job in done]
    metrics = [artifacts.find(name).manifest["metrics"] for name in names]
    assert [(one["num_steps"], one["shared_with"]) for one in metrics] == [(2, [names[1]]), (3, [names[0]])]
