"""What DSPy's BootstrapFinetune sends, as version 3.4.1 sent it to a live server, and what it reads in the answers.

It uploads chats with a system text, creates a job with the older `hyperparameters`, looks at the job and at its newest
event, and takes the model's name from the job. A status that OpenAI does not have would end it with a KeyError.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from live_jobs import app_of, served

from tailor.config import load_recipe
from tailor.jobs.database import open_database
from tailor.jobs.queue import Queue
from tailor.jobs.worker import folder_of
from tailor.recipes.tune_settings import BaseSettings, TuneRecipe
from tailor.server.file_store import FileStore
from tailor.server.files import files_router
from tailor.server.fine_tuning import fine_tuning_router
from tailor.server.fine_tuning_jobs import FineTuning

SYSTEM = "Your input fields are:\n1. `ticket` (str):\nYour output fields are:\n1. `queue` (str):\n"
QUESTION = "[[ ## ticket ## ]]\nWhere is parcel {}?\n\nRespond with the corresponding output fields."
ANSWER = "[[ ## queue ## ]]\norders\n\n[[ ## completed ## ]]\n"


class Live(NamedTuple):
    url: str
    jobs: FineTuning


@pytest.fixture
def live(own_home: Path) -> Iterator[Live]:
    engine = open_database()
    files = FileStore(engine)
    jobs = FineTuning(Queue(engine), files, lambda: {"tailor-nano": BaseSettings()})
    with served(app_of([files_router(files), fine_tuning_router(jobs)])) as url:
        yield Live(f"{url}/v1", jobs)
    engine.dispose()


def send(url: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    headers = {"Authorization": "Bearer none", "Content-Type": kind}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as answer:
        return json.load(answer)


def upload(url: str, rows: bytes) -> str:
    boundary = b"8aa21e51aab5a667cac25c67ffe75e1d"
    name = b"3c78c4267bcd46825fcdeb15f3d690be1d33da925a85b99b2fc59ad4843bef92.jsonl"
    parts = (
        b'Content-Disposition: form-data; name="purpose"\r\n\r\nfine-tune',
        b'Content-Disposition: form-data; name="file"; filename="%s"\r\n' % name
        + b"Content-Type: application/octet-stream\r\n\r\n%s" % rows,
    )
    body = b"".join(b"--%s\r\n%s\r\n" % (boundary, part) for part in parts) + b"--%s--\r\n" % boundary
    found = send(f"{url}/files", body, f"multipart/form-data; boundary={boundary.decode()}")
    assert found["bytes"] == len(rows)
    return str(found["id"])


def test_a_program_of_dspy_gets_its_model(live: Live) -> None:
    chats = [
        [("system", SYSTEM), ("user", QUESTION.format(number)), ("assistant", ANSWER)] for number in (1, 9, 8, 5) * 3
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in chats]
    content = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
    asked = {
        "model": "tailor-nano",
        "training_file": upload(live.url, content),
        "hyperparameters": {"n_epochs": 1, "batch_size": 4},
    }
    job_id = send(f"{live.url}/fine_tuning/jobs", json.dumps(asked).encode())["id"]
    place = f"{live.url}/fine_tuning/jobs/{job_id}"

    statuses = [send(place)["status"]]
    assert send(place)["estimated_finish"] is None
    (event,) = send(f"{place}/events?limit=1")["data"]
    assert event["message"] == f"Created fine-tuning job: {job_id}"
    assert isinstance(event["created_at"], int)
    live.jobs.check_waiting()
    statuses.append(send(place)["status"])
    assert send(f"{place}/events?limit=1")["data"][0]["id"] != event["id"]
    recipe = load_recipe(folder_of(job_id) / "recipe.yaml", TuneRecipe).recipe
    assert (recipe.train.num_epochs, recipe.train.batch_size) == (1, 4)
    assert (folder_of(job_id) / "train.jsonl").read_bytes() == content

    queue = live.jobs.queue
    assert queue.lease("worker") is not None
    statuses.append(send(place)["status"])
    assert queue.succeeded(job_id, "worker", {}, [])
    done = send(place)
    assert [*statuses, done["status"]] == ["validating_files", "queued", "running", "succeeded"]
    assert done["fine_tuned_model"].startswith("ft:tailor-nano:local::")
