"""A wrong clock: times are for people; nothing that decides what becomes of a job or a file asks it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from job_cases import SLEEPS_UNTIL_TERMINATED, new_job, notes, step_until, worker

from tailor.jobs.database import open_database
from tailor.jobs.queue import Queue
from tailor.server.file_store import FileStore


def test_a_clock_that_jumps_loses_no_job_and_no_file(
    own_home: Path, database: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A year ahead, back to 1971, and on: while jobs wait, run, and are taken over."""
    engine = open_database(database)
    queue, store = Queue(engine), FileStore(engine)
    file = store.add(b"kept", filename="k", purpose="batch", id="file-" + "k" * 24)
    now, clock = time.time(), time.time
    jumps = itertools.cycle([now + 3e7, 3e7, now - 1e6, now + 1e9, 1.0])
    for number in range(3):
        monkeypatch.setattr(time, "time", lambda at=next(jumps): at)
        queue.put(new_job(number))
    first = worker(queue, SLEEPS_UNTIL_TERMINATED, concurrency=2)

    def jumping(happened: Callable[[], bool]) -> Callable[[], bool]:
        def check() -> bool:
            monkeypatch.setattr(time, "time", lambda at=next(jumps): at)
            return happened()

        return check

    step_until(first, jumping(lambda: len(notes(own_home)) == 2))
    first.close()  # as if it had been killed: its processes go on
    second = worker(queue, SLEEPS_UNTIL_TERMINATED, concurrency=2)
    for _ in range(20):
        jumping(lambda: True)()
        second.step()
    assert sorted(notes(own_home)) == ["began job-0", "began job-1"]
    (own_home / "go").touch()  # whatever begins from now on ends by itself
    queue.pause("job-0")
    step_until(second, jumping(lambda: queue.get("job-0").worker is None))
    queue.pause("job-1")
    step_until(second, jumping(lambda: queue.get("job-1").worker is None))
    for job_id in ("job-0", "job-1"):
        queue.resume(job_id)
    step_until(second, jumping(lambda: all(queue.get(f"job-{n}").status == "succeeded" for n in range(3))))
    assert sorted(note for note in notes(own_home) if note.startswith("ended")) == [f"ended job-{n}" for n in range(3)]
    assert store.get(file.id) == file
    assert store.path(file).read_bytes() == b"kept"
    assert [job.id for job in queue.page(10)[0]] == ["job-2", "job-1", "job-0"]
    monkeypatch.setattr(time, "time", clock)
    for running in first._running:  # it only played dead: it is the processes' parent still
        assert running.process._child is not None
        running.process._child.wait()
    second.stop()
    engine.dispose()
