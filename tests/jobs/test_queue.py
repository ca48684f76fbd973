"""The queue: one transaction per change, no job leased twice, requests made twice known again."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_cases import new_job
from sqlalchemy import insert, update
from sqlalchemy.dialects import postgresql, sqlite

from tailor.errors import ConflictError, NotFoundError
from tailor.jobs.database import make_tables, open_database
from tailor.jobs.queue import Queue, waiting
from tailor.jobs.tables import EVENTS, JOBS, TABLES, NewEvent


@pytest.fixture
def queue(own_home: Path, database: str | None) -> Iterator[Queue]:
    made = Queue(open_database(database))
    yield made
    made.engine.dispose()


def test_jobs_are_leased_once_each_and_oldest_first(queue: Queue) -> None:
    for number in range(3):
        queue.put(new_job(number))
    leased = [queue.lease("a"), queue.lease("b"), queue.lease("a"), queue.lease("b")]
    assert [job and (job.id, job.worker, job.status) for job in leased] == [
        ("job-0", "a", "running"),
        ("job-1", "b", "running"),
        ("job-2", "a", "running"),
        None,
    ]


def test_a_job_that_is_validated_is_not_leased(queue: Queue) -> None:
    queue.put(new_job(1, status="validating_files", prepared=0))
    assert queue.lease("a") is None
    assert queue.prepared("job-1", {"rows": 3}, 40, ["Files validated"])
    assert not queue.prepared("job-1", {}, 40)
    job = queue.lease("a")
    assert job is not None
    assert (job.facts, job.num_steps) == ({"rows": 3}, 40)


def test_a_refused_job_has_failed_and_says_why(queue: Queue) -> None:
    queue.put(new_job(1, status="validating_files", prepared=0))
    assert queue.refused("job-1", {"code": "invalid_training_file", "message": "line 3", "param": "training_file"})
    job = queue.get("job-1")
    assert (job.status, (job.error or {})["code"]) == ("failed", "invalid_training_file")
    assert queue.events("job-1", 1)[0][0].level == "error"
    with pytest.raises(ConflictError, match="is failed"):
        queue.cancel("job-1")


LEASER = """
import sys
from tailor.jobs.database import open_database
from tailor.jobs.queue import Queue
queue = Queue(open_database(sys.argv[2] or None))
print("ready", flush=True)
sys.stdin.readline()
while (job := queue.lease(sys.argv[1])) is not None:
    print(job.id, flush=True)
    queue.beat(sys.argv[1])
    queue.succeeded(job.id, sys.argv[1], {}, ["done"])
"""


def test_processes_and_threads_that_hammer_one_database_never_share_a_job(queue: Queue, database: str | None) -> None:
    for number in range(60):
        queue.put(new_job(number))
    children = [
        subprocess.Popen([sys.executable, "-c", LEASER, f"p{k}", database or ""], stdin=-1, stdout=-1, text=True)
        for k in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    mine: list[str] = []

    def take(name: str) -> None:
        while (job := queue.lease(name)) is not None:
            mine.append(job.id)
            queue.succeeded(job.id, name, {}, ["done"])

    threads = [threading.Thread(target=take, args=(f"t{k}",)) for k in range(3)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outputs = [child.communicate()[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    everyone = [*mine, *outputs[0], *outputs[1]]
    assert sorted(everyone) == sorted(f"job-{number}" for number in range(60))
    assert {queue.get(f"job-{number}").status for number in range(60)} == {"succeeded"}


def test_the_same_request_makes_one_job(queue: Queue) -> None:
    first = queue.put(new_job(1, idempotency="key", body_hash="body"))
    assert queue.put(new_job(2, idempotency="key", body_hash="body")).id == first.id
    with pytest.raises(ConflictError, match="another request"):
        queue.put(new_job(3, idempotency="key", body_hash="other"))
    assert queue.put(new_job(4, body_hash="body")).id == "job-4"


def test_a_repetition_without_a_key_finds_the_job_of_the_same_body_for_a_while(queue: Queue) -> None:
    queue.put(new_job(1, body_hash="body"))
    assert queue.put(new_job(2, body_hash="body"), retried=True).id == "job-1"
    assert queue.put(new_job(3, body_hash="other"), retried=True).id == "job-3"
    with queue.engine.begin() as connection:
        connection.execute(update(JOBS).values(created_at=JOBS.c.created_at - 3600))
    assert queue.put(new_job(4, body_hash="body"), retried=True).id == "job-4"


def test_puts_of_one_key_at_the_same_moment_make_one_job(queue: Queue) -> None:
    made: list[str] = []

    def put(number: int) -> None:
        made.append(queue.put(new_job(number, idempotency="key", body_hash="body")).id)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1


def test_what_people_ask_of_a_waiting_job(queue: Queue) -> None:
    queue.put(new_job(1))
    assert queue.pause("job-1").status == "paused"
    assert queue.pause("job-1").status == "paused"
    assert queue.lease("a") is None
    assert queue.resume("job-1").status == "queued"
    assert queue.resume("job-1").status == "queued"
    assert queue.cancel("job-1").status == "cancelled"
    assert queue.cancel("job-1").status == "cancelled"
    for ask in (queue.pause, queue.resume):
        with pytest.raises(ConflictError, match="is cancelled"):
            ask("job-1")
    with pytest.raises(NotFoundError):
        queue.cancel("job-2")


def test_a_running_job_that_is_cancelled_keeps_its_worker_until_the_process_is_gone(queue: Queue) -> None:
    queue.put(new_job(1))
    queue.lease("a")
    assert queue.cancel("job-1").worker == "a"
    assert not queue.succeeded("job-1", "a", {}, [])
    job = queue.get("job-1")
    assert (job.status, job.worker, job.result) == ("cancelled", None, None)


def test_a_paused_and_resumed_job_waits_for_its_process_to_end(queue: Queue) -> None:
    queue.put(new_job(1))
    queue.lease("a")
    queue.pause("job-1")
    assert queue.resume("job-1").status == "queued"
    assert queue.lease("b") is None
    queue.release("job-1", "a", crashed=False, max_crashes=3)
    leased = queue.lease("b")
    assert leased is not None
    assert leased.worker == "b"


def test_crashes_are_counted_only_without_progress(queue: Queue) -> None:
    queue.put(new_job(1))
    for step in (0, 0, 5, 5, 9, 9):  # never three times at the same step
        queue.lease("a")
        if step:
            queue.log("job-1", "a", step, [])
        queue.release("job-1", "a", crashed=True, max_crashes=3)
        assert queue.get("job-1").status == "queued"
    queue.lease("a")
    queue.release("job-1", "a", crashed=True, max_crashes=3)
    job = queue.get("job-1")
    assert (job.status, (job.error or {})["code"]) == ("failed", "crashed")


def test_a_worker_that_lost_its_job_changes_nothing(queue: Queue) -> None:
    queue.put(new_job(1))
    seen = queue.lease("a")
    assert seen is not None
    assert queue.take_over(seen, "b")
    assert not queue.take_over(seen, "c")
    assert not queue.succeeded("job-1", "a", {}, [])
    queue.release("job-1", "a", crashed=True, max_crashes=1)
    queue.log("job-1", "a", 5, [NewEvent("step")])
    job = queue.get("job-1")
    assert (job.status, job.worker, job.logged) == ("running", "b", 0)


def test_a_beat_in_between_keeps_the_lease(queue: Queue) -> None:
    queue.put(new_job(1))
    seen = queue.lease("a")
    assert seen is not None
    queue.beat("a")
    assert not queue.take_over(seen, "b")


def test_pages_walk_over_all_jobs_and_all_events(queue: Queue) -> None:
    for number in range(7):
        queue.put(new_job(number))
    walked, after, more = [], None, True
    while more:
        jobs, more = queue.page(3, after, lambda job: job.facts["number"] != 2)
        walked += [job.facts["number"] for job in jobs]
        after = jobs[-1].id
    assert walked == [6, 5, 4, 3, 1, 0]
    for number in range(5):
        queue.add_event("job-0", NewEvent(f"event {number}"))
    first, more = queue.events("job-0", 4)
    rest, none_left = queue.events("job-0", 4, first[-1].id)
    assert [event.message for event in [*first, *rest]] == [f"event {n}" for n in (4, 3, 2, 1, 0)] + [
        "Created fine-tuning job: job-0"
    ]
    assert (more, none_left) == (True, False)
    assert [event.message for event in queue.events_since("job-0", first[1].seq)] == ["event 4"]
    with pytest.raises(NotFoundError):
        queue.events("job-1", 4, first[0].id)


def test_each_step_is_told_once(queue: Queue) -> None:
    queue.put(new_job(1))
    queue.lease("a")
    queue.log("job-1", "a", 2, [NewEvent("step 1"), NewEvent("step 2")])
    queue.log("job-1", "a", 2, [NewEvent("step 1"), NewEvent("step 2")])
    assert [event.message for event in queue.events("job-1", 9)[0]][:2] == ["step 2", "step 1"]
    assert len(queue.events("job-1", 9)[0]) == 4


def test_events_need_their_job(queue: Queue) -> None:
    from sqlalchemy.exc import IntegrityError

    values = {"id": "x", "job_id": "nobody", "created_at": 1, "level": "info", "type": "message", "message": ""}
    with pytest.raises(IntegrityError), queue.engine.begin() as connection:
        connection.execute(insert(EVENTS).values(**values))


def test_the_tables_of_a_newer_program_are_refused(queue: Queue) -> None:
    with pytest.raises(ConflictError, match="of version 1, this program knows version 0"):
        make_tables(queue.engine, "jobs", 0, TABLES)
    Queue(queue.engine)


def test_postgresql_skips_the_jobs_that_another_worker_looks_at() -> None:
    query = waiting([JOBS.c.status == "queued"], 1)
    assert str(query.compile(dialect=postgresql.dialect())).endswith("FOR UPDATE SKIP LOCKED")
    assert "FOR UPDATE" not in str(query.compile(dialect=sqlite.dialect()))
