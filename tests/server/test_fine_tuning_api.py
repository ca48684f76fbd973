"""Fine-tuning jobs through the official client: what is refused, and how, before anything is trained."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import openai
import pytest
from live_jobs import app_of, client_of, served
from openai.types.fine_tuning import FineTuningJob

from tailor.config import load_recipe
from tailor.jobs.database import open_database
from tailor.jobs.queue import Queue
from tailor.jobs.tables import NewEvent
from tailor.jobs.worker import folder_of
from tailor.recipes.tune_settings import BaseSettings, TuneRecipe
from tailor.server.file_store import FileStore
from tailor.server.files import files_router
from tailor.server.fine_tuning import fine_tuning_router
from tailor.server.fine_tuning_jobs import FineTuning

BASES = {"tailor-nano": BaseSettings(), "org/Other base": BaseSettings(dtype="float32")}


class Live(NamedTuple):
    client: openai.OpenAI
    jobs: FineTuning
    url: str
    rows: str
    home: Path


def rows(number: int) -> bytes:
    return b"".join(b'{"prompt": "question %d", "completion": "answer %d"}\n' % (n, n) for n in range(number))


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, module_database: str | None) -> Iterator[Live]:
    home = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(home))
        engine = open_database(module_database)
        files = FileStore(engine)
        jobs = FineTuning(Queue(engine), files, lambda: BASES)
        app = app_of([files_router(files), fine_tuning_router(jobs, heartbeat=0.0)])
        with served(app) as url, client_of(url) as client:
            uploaded = client.files.create(file=("rows.jsonl", rows(12)), purpose="fine-tune")
            yield Live(client, jobs, url, uploaded.id, home)
        engine.dispose()


def create(live: Live, **settings: Any) -> FineTuningJob:
    return live.client.fine_tuning.jobs.create(**{"model": "tailor-nano", "training_file": live.rows, **settings})


def recipe(job: FineTuningJob) -> TuneRecipe:
    return load_recipe(folder_of(job.id) / "recipe.yaml", TuneRecipe).recipe


def checked(live: Live, job: FineTuningJob) -> FineTuningJob:
    live.jobs.check_waiting()
    return live.client.fine_tuning.jobs.retrieve(job.id)


def raw(live: Live, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
    """(status, parsed body) of a plain request."""
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=30)
    try:
        connection.request(method, path, json.dumps(body), {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_a_plain_job_becomes_a_recipe(live: Live) -> None:
    job = create(live, suffix="my sum!", seed=7, metadata={"team": "a"})
    assert job.status == "validating_files"
    assert (job.object, job.model, job.training_file, job.seed) == ("fine_tuning.job", "tailor-nano", live.rows, 7)
    assert job.hyperparameters.to_dict() == dict.fromkeys(
        ("n_epochs", "batch_size", "learning_rate_multiplier"), "auto"
    )
    assert (job.fine_tuned_model, job.finished_at, job.error, job.result_files) == (None, None, None, [])
    assert (job.organization_id, job.metadata, job.integrations) == ("local", {"team": "a"}, [])
    job = checked(live, job)
    assert job.status == "queued"
    made = recipe(job)
    assert ([one.type for one in made.technique], made.objective) == (["lora"], "sft")
    assert (made.train.seed, made.train.num_epochs, made.base.name) == (7, None, "tailor-nano")
    assert made.output.name.startswith("ft-tailor-nano-my-sum-")
    stored = live.jobs.queue.get(job.id)
    assert stored.model == f"ft:tailor-nano:local:my-sum:{made.output.name[-8:]}"
    assert Path(made.data.train).read_bytes() == rows(12)
    assert job.hyperparameters.batch_size == 8
    assert isinstance(job.hyperparameters.n_epochs, int)
    assert job.hyperparameters.learning_rate_multiplier == 1.0
    assert job.method is not None
    assert job.method.supervised is not None
    live.client.files.delete(live.client.files.create(file=rows(12), purpose="fine-tune").id)


ODD: dict[str, dict[str, Any]] = {
    "NUL": {"metadata": {"a\0": "b\0"}},
    "half a pair": {"metadata": {"a\ud800": "\udfff"}},
    "NaN": {"tailor": {"recipe": {"train": {"learning_rate": float("nan")}}}},
    "infinity": {"tailor": {"recipe": {"train": {"grad_clip": float("inf")}}}},
    "NaN anywhere": {"metadata": {"a": float("nan")}},
    "many steps": {"tailor": {"recipe": {"train": {"num_steps": 1 << 40}}}},
    "more steps than numbers": {"tailor": {"recipe": {"train": {"num_steps": 10**30}}}},
    "many epochs": {"hyperparameters": {"n_epochs": 1 << 33}},
    "a large seed": {"seed": 1 << 62},
    "a larger seed": {"seed": 10**25},
    "notes": {"tailor": {"recipe": {"notes": ["\0\ud800"]}}},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_values_are_refused_or_kept_as_they_are(live: Live, case: str) -> None:
    status, told = raw(
        live, "POST", "/v1/fine_tuning/jobs", {"model": "tailor-nano", "training_file": live.rows, **ODD[case]}
    )
    assert status in (200, 400), told
    if status == 400:
        assert told["error"]["message"]
        return
    live.jobs.check_waiting()
    status, job = raw(live, "GET", f"/v1/fine_tuning/jobs/{told['id']}")
    if job["status"] == "failed":
        assert re.search(r"would take \d{10,31} steps", job["error"]["message"])
        return
    assert (status, job["status"], job["error"]) == (200, "queued", None)
    assert job["metadata"] == ODD[case].get("metadata")
    assert raw(live, "POST", f"/v1/fine_tuning/jobs/{told['id']}/cancel")[0] == 200


def test_numbers_of_a_job(live: Live) -> None:
    numbers = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 0.5}
    job = checked(live, create(live, method={"type": "supervised", "supervised": {"hyperparameters": numbers}}))
    train = recipe(job).train
    assert (train.num_epochs, train.batch_size, train.learning_rate_multiplier, train.learning_rate) == (
        3,
        2,
        0.5,
        None,
    )
    assert job.hyperparameters.to_dict() == numbers
    # 12 rows, one of them set aside: 3 passes over 11 rows, two at a time
    assert live.jobs.queue.get(job.id).num_steps == 16


def test_the_hyperparameters_of_old_clients(live: Live) -> None:
    job = checked(live, create(live, hyperparameters={"n_epochs": 2, "batch_size": "auto"}))
    assert (recipe(job).train.num_epochs, job.hyperparameters.n_epochs) == (2, 2)


def test_a_technique_and_parts_of_a_recipe(live: Live) -> None:
    ours = {
        "technique": {"type": "prompt_tuning", "num_virtual_tokens": 5},
        "recipe": {"train": {"num_steps": 3, "patience": None}, "data": {"validation_fraction": 0.25}, "notes": ["hi"]},
    }
    job = checked(live, create(live, model="org/Other base", extra_body={"tailor": ours}))
    made = recipe(job)
    assert made.technique[0].model_dump()["num_virtual_tokens"] == 5
    assert (made.train.num_steps, made.train.patience, made.data.validation_fraction) == (3, None, 0.25)
    assert (made.notes, made.base.dtype) == (("hi",), "float32")
    assert live.jobs.queue.get(job.id).model.startswith("ft:Other-base:local::")
    combined = checked(live, create(live, extra_body={"tailor": {"technique": "adapter+p_tuning"}}))
    assert [one.type for one in recipe(combined).technique] == ["adapter", "p_tuning"]
    assert combined.to_dict()["tailor"]["technique"] == "adapter+p_tuning"  # type: ignore[index]


def test_a_validation_file(live: Live) -> None:
    other = live.client.files.create(file=rows(3), purpose="fine-tune")
    job = checked(live, create(live, validation_file=other.id))
    live.client.files.delete(other.id)
    assert (job.status, job.validation_file) == ("queued", other.id)
    assert Path(recipe(job).data.validation or "").read_bytes() == rows(3)


@pytest.mark.parametrize(
    ("settings", "param", "code"),
    [
        ({"method": {"type": "reinforcement"}}, "method.type", "unsupported_value"),
        ({"method": {"type": "supervised"}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters", "invalid_value"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "invalid_value"),
        ({"method": {"type": "magic"}}, "method.type", None),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"batch_size": True}}, "hyperparameters.batch_size", "invalid_value"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "hyperparameters.learning_rate_multiplier", None),
        ({"suffix": "x" * 65}, "suffix", None),
        ({"seed": -1}, "seed", None),
        ({"metadata": {"k" * 65: "v"}}, None, None),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", None),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "unsupported_parameter"),
        ({"extra_body": {"tailor": {"technique": "lroa"}}}, "tailor.technique", None),
        ({"extra_body": {"tailor": {"technique": {"type": "lora", "rnak": 8}}}}, "tailor.technique.rnak", None),
        ({"extra_body": {"tailor": {"technique": {"type": "lora", "rank": 0}}}}, "tailor.technique.rank", None),
        ({"extra_body": {"tailor": {"recipe": {"output": {"name": "x"}}}}}, "tailor.recipe.output", None),
        ({"extra_body": {"tailor": {"recipe": {"base": "/etc"}}}}, "tailor.recipe.base", None),
        ({"extra_body": {"tailor": {"recipe": {"extends": "/etc/passwd"}}}}, "tailor.recipe.extends", None),
        ({"extra_body": {"tailor": {"recipe": {"data": {"train": "/etc/passwd"}}}}}, "tailor.recipe.data.train", None),
        ({"extra_body": {"tailor": {"recipe": {"train": {"seeed": 1}}}}}, "tailor.recipe.train.seeed", None),
        ({"extra_body": {"tailor": {"recipe": {"train": "fast"}}}}, "tailor.recipe.train", None),
        ({"extra_body": {"tailor": {"recipe": {"objective": "ppo"}}}}, "tailor.recipe.objective", None),
        ({"extra_body": {"tailor": {"recipe": {"notes": ["${env:HOME}"]}}}}, "tailor", None),
        ({"extra_body": {"tailor": {"visibility": "private"}}}, "tailor.visibility", None),
        ({"extra_body": {"tialor": {}}}, "tialor", None),
        (
            {
                "hyperparameters": {"n_epochs": 2},
                "extra_body": {"tailor": {"recipe": {"train": {"num_steps": 3}}}},
            },
            "tailor.recipe.train.num_epochs",
            None,
        ),
    ],
)
def test_what_is_refused_at_once(live: Live, settings: dict[str, Any], param: str | None, code: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        create(live, **settings)
    assert error.value.type == "invalid_request_error"
    assert error.value.param == param or param is None
    assert error.value.code == code or (code is None and error.value.code)
    assert error.value.request_id
    assert str(live.home) not in error.value.message


def test_dpo_is_refused_by_name_until_there_is_such_an_objective(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailor.objectives import OBJECTIVES

    monkeypatch.delitem(OBJECTIVES, "dpo", raising=False)
    method: Any = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "beta": "auto"}}}
    with pytest.raises(
        openai.BadRequestError, match="'dpo' is not supported by this server; supported: supervised"
    ) as e:
        create(live, method=method)
    assert (e.value.param, e.value.code) == ("method.type", "unsupported_value")
    monkeypatch.setitem(OBJECTIVES, "dpo", OBJECTIVES["sft"])
    job = checked(live, create(live, method=method))
    assert (recipe(job).objective, recipe(job).train.num_epochs) == ("dpo", 1)
    assert job.method is not None
    assert job.method.type == "dpo"


def test_models_and_files_that_are_not_there(live: Live) -> None:
    batch = live.client.files.create(file=b"x", purpose="batch").id
    for settings, param, code, status in (
        ({"model": "tailor-nan"}, "model", "model_not_found", 404),
        ({"model": "../../etc"}, "model", "model_not_found", 404),
        ({"model": "ft:tailor-nano:local::abcdefgh"}, "model", "model_not_found", 404),
        ({"training_file": "file-nothing"}, "training_file", "file_not_found", 404),
        ({"validation_file": "file-nothing"}, "validation_file", "file_not_found", 404),
        ({"training_file": batch}, "training_file", "invalid_value", 400),
    ):
        with pytest.raises(openai.APIStatusError) as error:
            create(live, **settings)
        assert (error.value.param, error.value.code, error.value.status_code) == (param, code, status)


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (rows(9), "invalid_n_examples", "9 examples; a job takes at least 10"),
        (rows(12) + b'{"prompt": "x"}\n{"prompt": 3, "completion": ""}\n', "invalid_training_file", "Line 14: "),
        (b'{"a": 1}\n' * 12, "unsupported_format", "no known format (columns: a)"),
        (b'{"prompt": "same", "completion": "b"}\n' * 12, "invalid_training_file", "1 different prompts"),
        (b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n' * 12, "unsupported_format", "Comparison"),
    ],
)
def test_rows_that_cannot_be_used_fail_the_job(live: Live, content: bytes, code: str, told: str) -> None:
    uploaded = live.client.files.create(file=content, purpose="fine-tune")
    job = checked(live, create(live, training_file=uploaded.id))
    assert job.status == "failed"
    assert job.finished_at is not None
    assert job.error is not None
    assert (job.error.code, job.error.param) == (code, "training_file")
    assert told in job.error.message
    assert str(live.home) not in job.error.message
    event = live.client.fine_tuning.jobs.list_events(job.id).data[0]
    assert (event.level, event.message) == ("error", job.error.message)


def test_a_bad_validation_file_is_named(live: Live) -> None:
    bad = live.client.files.create(file=b'{"prompt": "x"}\n', purpose="fine-tune")
    job = checked(live, create(live, validation_file=bad.id))
    assert (job.status, job.error and job.error.param) == ("failed", "validation_file")


def test_the_same_request_makes_one_job(live: Live) -> None:
    key = {"Idempotency-Key": "k1"}
    first = create(live, suffix="once", extra_headers=key)
    assert create(live, suffix="once", extra_headers=key).id == first.id
    with pytest.raises(openai.ConflictError) as error:
        create(live, suffix="twice", extra_headers=key)
    assert error.value.code == "idempotency_key_reused"
    assert error.value.response.headers["x-should-retry"] == "false"
    assert create(live, suffix="once").id != first.id
    again = create(live, suffix="once", extra_headers={"x-stainless-retry-count": "1"})
    assert again.id != first.id  # the newest one of that body
    assert create(live, suffix="once", extra_headers={"x-stainless-retry-count": "2"}).id == again.id


def test_jobs_are_listed_and_filtered(live: Live) -> None:
    made = [create(live, metadata={"round": "r1", "n": str(n)}).id for n in range(3)]
    jobs = live.client.fine_tuning.jobs
    assert [job.id for job in jobs.list(limit=2, metadata={"round": "r1"})] == made[::-1]
    assert [job.id for job in jobs.list(metadata={"round": "r1", "n": "1"})] == [made[1]]
    assert [job.id for job in jobs.list(metadata={"round": "r2"})] == []
    _, body = raw(live, "GET", "/v1/fine_tuning/jobs?metadata=null&limit=1000")
    assert [job for job in body["data"] if job["metadata"] is not None] == []
    assert body["data"]
    page = jobs.list(limit=1, after=made[2])
    assert ([job.id for job in page.data], page.has_more) == ([made[1]], True)
    for query, param in (("limit=0", "limit"), ("metadata=x", "metadata"), ("after=ftjob-x", "after")):
        status, body = raw(live, "GET", f"/v1/fine_tuning/jobs?{query}")
        assert status in (400, 404)
        assert body["error"]["param"] == param


def test_asking_a_job_to_stop_and_go_on(live: Live) -> None:
    jobs = live.client.fine_tuning.jobs
    job = create(live)
    assert jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    live.jobs.check_waiting()
    assert jobs.retrieve(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert jobs.resume(job.id).status == "validating_files"
    live.jobs.check_waiting()
    assert jobs.pause(job.id).status == "paused"  # type: ignore[comparison-overlap]
    assert jobs.resume(job.id).status == "queued"
    cancelled = jobs.cancel(job.id)
    assert (cancelled.status, cancelled.finished_at is not None) == ("cancelled", True)
    for ask, code in ((jobs.pause, "job_not_pausable"), (jobs.resume, "job_not_resumable")):
        with pytest.raises(openai.ConflictError, match="is cancelled") as error:
            ask(job.id)
        assert (error.value.code, error.value.type) == (code, "conflict_error")
        assert error.value.response.headers["x-should-retry"] == "false"
    for unknown in ("ftjob-000000000000000000000000", "..", "ftjob-%00"):
        status, body = raw(live, "POST", f"/v1/fine_tuning/jobs/{unknown}/cancel")
        assert (status, body["error"]["code"]) in ((404, "job_not_found"), (404, "unknown_url"), (405, None))


def test_events_are_walked(live: Live) -> None:
    job = create(live)
    for number in range(5):
        live.jobs.queue.add_event(job.id, NewEvent(f"event {number}"))
    events = list(live.client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.message for event in events] == [f"event {n}" for n in (4, 3, 2, 1, 0)] + [
        f"Created fine-tuning job: {job.id}"
    ]
    assert {(event.object, event.level, event.type) for event in events} == {
        ("fine_tuning.job.event", "info", "message")
    }
    assert list(live.client.fine_tuning.jobs.checkpoints.list(job.id)) == []
    for path in ("events", "checkpoints"):
        status, body = raw(live, "GET", f"/v1/fine_tuning/jobs/{job.id}/{path}?after=nothing")
        assert (status, body["error"]["param"]) == (404, "after")


def test_events_are_streamed_and_the_stream_is_taken_up_again(live: Live) -> None:
    job = create(live)
    live.jobs.queue.add_event(job.id, NewEvent("Step 1", type="metrics", data={"step": 1, "loss": 2.5}))
    live.jobs.queue.cancel(job.id)
    first = stream(live, job.id, "?stream=true", {})
    assert first[0] == "retry: 3000"
    assert first[-1] == "data: [DONE]"
    told = [json.loads(line.split("data: ")[1]) for line in first[1:-1]]
    assert [event["message"] for event in told] == [
        f"Created fine-tuning job: {job.id}",
        "Step 1",
        "The job was cancelled.",
    ]
    assert told[1]["data"] == {
        "step": 1,
        "train_loss": 2.5,
        "valid_loss": None,
        "total_steps": None,
        "learning_rate": None,
    }
    last = first[2].split("\n")[0].removeprefix("id: ")
    assert last == told[1]["id"]
    again = stream(live, job.id, "", {"accept": "text/event-stream", "last-event-id": last})
    assert again[1:] == first[3:]


def stream(live: Live, job_id: str, query: str, headers: dict[str, str]) -> list[str]:
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=30)
    connection.request("GET", f"/v1/fine_tuning/jobs/{job_id}/events{query}", headers=headers)
    answer = connection.getresponse()
    assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
    text = answer.read().decode()
    connection.close()
    return text.strip("\n").split("\n\n")


def test_a_stream_waits_for_what_comes(live: Live) -> None:
    job = create(live)
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=30)
    connection.request("GET", f"/v1/fine_tuning/jobs/{job.id}/events?stream=true")
    answer = connection.getresponse()
    read = b""
    while b": ping" not in read:
        read += answer.readline()
    live.jobs.queue.cancel(job.id)
    assert b"The job was cancelled." in answer.read()
    connection.close()


def test_a_job_whose_file_went_before_it_was_looked_at_has_failed(live: Live) -> None:
    uploaded = live.client.files.create(file=rows(12), purpose="fine-tune")
    job = create(live, training_file=uploaded.id)
    live.client.files.delete(uploaded.id)
    job = checked(live, job)
    assert job.error is not None
    assert (job.status, job.error.code, job.error.param) == ("failed", "file_not_found", "training_file")


def test_new_jobs_are_looked_at_by_themselves(live: Live) -> None:
    jobs = FineTuning(live.jobs.queue, live.jobs.files, lambda: BASES)
    jobs.start()
    try:
        job = create(live)
        end = time.monotonic() + 30
        while live.client.fine_tuning.jobs.retrieve(job.id).status != "queued":
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        jobs.stop()
