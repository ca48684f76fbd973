"""Files, jobs and what they make, as the official client sees them, called from both of its worlds; a whole server.

Runs with any generation of the client, as test_openai_client.py does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

import openai
import pytest

from tailor.inference.library import Library
from tailor.inference.service import Service
from tailor.jobs.worker import WorkerSettings
from tailor.models.base import load_base
from tailor.recipes.tune_settings import BaseSettings
from tailor.server.app import create_app
from tailor.server.running import Server
from tailor.server.settings import ServerSettings
from tailor.server.workshop import Workshop

MODEL = "tailor-nano"
LARGEST = 1 << 16
ROWS = b"".join(
    b'{"messages": [{"role": "user", "content": "Is %d even?"}, {"role": "assistant", "content": "%s"}]}\n'
    % (n, b"no" if n % 2 else b"yes")
    for n in range(12)
)
Calls = Callable[..., Any]


class Whole(NamedTuple):
    """A server with its workshop: `url` of its API, and the workshop."""

    url: str
    workshop: Workshop


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(tmp_path_factory.mktemp("home")))
        settings = ServerSettings(port=0, grace=0.2, max_upload_bytes=LARGEST)
        worker = WorkerSettings(niceness=0, num_threads=1, poll_seconds=0.05)
        workshop = Workshop({MODEL: BaseSettings(dtype="float32")}, settings, worker)
        names = {"alias": workshop.jobs.artifact_of, "aliases": workshop.aliases}
        service = Service(Library([load_base(MODEL, dtype="float32")], **names))
        app = create_app(service, settings, routers=workshop.routers, lifespans=(workshop.lifespan,))
        server = Server(app, settings)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Whole(f"http://127.0.0.1:{server.bound_port}/v1", workshop)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, whole: Whole) -> Calls:
    """The client's methods by their dotted names; lists come whole, walked page by page."""
    settings: Mapping[str, Any] = {"base_url": whole.url, "api_key": "none", "max_retries": 0}

    def sync(name: str, *args: Any, **given: Any) -> Any:
        with openai.OpenAI(**settings) as client:
            found = attrgetter(name)(client)(*args, **given)
            return list(found) if hasattr(found, "has_next_page") else found

    async def awaited(name: str, args: Any, given: Any) -> Any:
        async with openai.AsyncOpenAI(**settings) as client:
            found = attrgetter(name)(client)(*args, **given)
            if isinstance(found, AsyncIterator) or hasattr(found, "__aiter__"):
                return [item async for item in found]
            return await found

    if request.param == "sync":
        return sync
    return lambda name, *args, **given: asyncio.run(awaited(name, args, given))


def wait(call: Calls, job_id: str, *statuses: str) -> Any:
    end = time.monotonic() + 200
    while (job := call("fine_tuning.jobs.retrieve", job_id)).status not in statuses:
        assert job.status != "failed", job.error
        assert time.monotonic() < end, job
        time.sleep(0.1)
    return job


def create(call: Calls, file_id: str, *, num_steps: int = 2, **more: Any) -> Any:
    extra = {"tailor": {"recipe": {"train": {"num_steps": num_steps, "batch_size": 8}}}}
    return call("fine_tuning.jobs.create", model=MODEL, training_file=file_id, extra_body=extra, **more)


def test_files_go_there_and_back(call: Calls) -> None:
    content = bytes(range(256)) * 100
    kept = call("files.create", file=("bytes.bin", content), purpose="batch")
    assert (kept.object, kept.bytes, kept.filename, kept.purpose) == ("file", len(content), "bytes.bin", "batch")
    assert call("files.content", kept.id).read() == content
    assert call("files.retrieve", kept.id).id == kept.id
    assert kept.id in [file.id for file in call("files.list", limit=1)]
    assert call("files.wait_for_processing", kept.id).status == "processed"
    passing = call(
        "files.create",
        file=b"x",
        purpose="batch",
        extra_body={"expires_after": {"anchor": "created_at", "seconds": 3600}},
    )
    assert passing.expires_at == passing.created_at + 3600
    assert call("files.delete", kept.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        call("files.retrieve", kept.id)
    assert gone.value.code == "file_not_found"
    with pytest.raises(openai.BadRequestError) as purpose:
        call("files.create", file=b"x", purpose="mischief")
    assert purpose.value.param == "purpose"
    with pytest.raises(openai.APIStatusError) as large:
        call("files.create", file=b"x" * (LARGEST + 1), purpose="batch")
    assert (large.value.status_code, large.value.code) == (413, "file_too_large")
    assert large.value.request_id.startswith("req_")


def test_a_job_from_its_rows_to_its_answers(call: Calls) -> None:
    file_id = call("files.create", file=("rows.jsonl", ROWS), purpose="fine-tune").id
    job = create(call, file_id, suffix="even", seed=1)
    assert job.status in ("validating_files", "queued", "running")
    job = wait(call, job.id, "succeeded")
    events = call("fine_tuning.jobs.list_events", job.id, limit=2)  # page by page
    assert len({event.id for event in events}) == len(events) >= 6
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert [event.data["step"] for event in events if event.type == "metrics"] == [2, 1]
    checkpoints = call("fine_tuning.jobs.checkpoints.list", job.id)
    assert job.fine_tuned_model in [checkpoint.fine_tuned_model_checkpoint for checkpoint in checkpoints]
    listed = [model.id for model in call("models.list")]
    said: Any = [{"role": "user", "content": "Is 4 even?"}]
    for checkpoint in checkpoints:
        model = checkpoint.fine_tuned_model_checkpoint
        assert listed.count(model) == 1
        assert call("models.retrieve", model).id == model
        answer = call("chat.completions.create", model=model, messages=said, max_tokens=3, temperature=0)
        assert (answer.model, answer.usage.completion_tokens) == (model, 3)
    artifact = job.to_dict()["tailor"]["artifact"]
    assert artifact not in listed
    own = [
        call("chat.completions.create", model=name, messages=said, max_tokens=3, temperature=0, seed=1)
        for name in (artifact, job.fine_tuned_model)
    ]
    assert own[0].choices[0].message.content == own[1].choices[0].message.content
    assert call("models.delete", job.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        call("chat.completions.create", model=job.fine_tuned_model, messages=said)
    assert gone.value.code == "model_not_found"


def test_jobs_are_paused_resumed_cancelled_and_found(call: Calls) -> None:
    file_id = call("files.create", file=("rows.jsonl", ROWS), purpose="fine-tune").id
    mark = f"m{time.monotonic_ns()}"
    job = create(call, file_id, num_steps=100_000, metadata={"mark": mark})
    assert call("fine_tuning.jobs.pause", job.id).status == "paused"
    assert call("fine_tuning.jobs.resume", job.id).status in ("validating_files", "queued", "running")
    assert [one.id for one in call("fine_tuning.jobs.list", metadata={"mark": mark})] == [job.id]
    assert call("fine_tuning.jobs.list", metadata={"mark": "nobody's"}) == []
    assert call("fine_tuning.jobs.cancel", job.id).status == "cancelled"
    with pytest.raises(openai.ConflictError) as over:
        call("fine_tuning.jobs.pause", job.id)
    assert (over.value.code, over.value.type) == ("job_not_pausable", "conflict_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        call("fine_tuning.jobs.retrieve", "ftjob-000000000000000000000000")
    assert unknown.value.code == "job_not_found"


@pytest.mark.parametrize("world", [openai.OpenAI, openai.AsyncOpenAI])
def test_what_would_be_in_vain_is_not_repeated(whole: Whole, world: Any) -> None:
    """The client repeats 409 by itself, twice; our header keeps it from that."""
    with openai.OpenAI(base_url=whole.url, api_key="none", max_retries=0) as client:
        uploaded = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=uploaded.id)
        client.fine_tuning.jobs.cancel(job.id)
    client = world(base_url=whole.url, api_key="none")
    assert client.max_retries == 2

    async def awaited() -> None:
        async with client:
            await client.fine_tuning.jobs.pause(job.id)

    with pytest.raises(openai.ConflictError) as error:
        asyncio.run(awaited()) if world is openai.AsyncOpenAI else client.fine_tuning.jobs.pause(job.id)
    assert error.value.response.headers["x-should-retry"] == "false"
    assert "x-stainless-retry-count" in error.value.request.headers
    assert error.value.request.headers["x-stainless-retry-count"] == "0"
    if world is openai.OpenAI:
        client.close()
