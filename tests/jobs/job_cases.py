"""Jobs and workers of the tests: commands that behave like `tailor tune` without training."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tailor.jobs.queue import Queue
from tailor.jobs.tables import Job, NewJob
from tailor.jobs.worker import Worker, WorkerSettings

SETTINGS: dict[str, Any] = {"niceness": 0, "poll_seconds": 0.01, "grace_seconds": 20}


def new_job(number: int, **facts: Any) -> NewJob:
    """A job that may be leased at once."""
    own = {"body_hash": f"hash-{number}", "status": "queued", "prepared": 1, "facts": {"number": number}}
    return NewJob(**{"id": f"job-{number}", "name": f"name-{number}", "model": f"ft:{number}", **own, **facts})


def fake(script: str) -> Callable[[Sequence[Job]], list[str]]:
    """A command that runs a script; in it `names` are the names of the jobs, `ids` their ids, and `count()` counts."""
    head = """
import json, os, signal, sys, time
names, ids = json.loads(sys.argv[1])
def note(text):
    with open(os.environ["TAILOR_HOME"] + "/notes.txt", "a") as file:
        file.write(text + "\\n")
def finish():
    print(json.dumps({"name": names[0], "artifact": names[0]}), flush=True)
def fail(code):
    print("a remark", file=sys.stderr)
    error = {"code": code, "message": "it said " + code, "hint": None}
    print(json.dumps({"error": error}), file=sys.stderr, flush=True)
"""

    def command(jobs: Sequence[Job]) -> list[str]:
        told = json.dumps([[job.name for job in jobs], [job.id for job in jobs]])
        return [sys.executable, "-I", "-S", "-c", head + script, told]

    return command


SLEEPS_UNTIL_TERMINATED = """
def stop(number, frame):
    fail("terminated"); note("stopped " + ids[0]); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
note("began " + ids[0])
if os.path.exists(os.environ["TAILOR_HOME"] + "/go"):
    note("ended " + ids[0]); finish(); sys.exit(0)
while True: time.sleep(0.01)
"""


def notes(home: Path) -> list[str]:
    """What the processes have noted."""
    path = home / "notes.txt"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def worker(queue: Queue, script: str, **settings: Any) -> Worker:
    """A worker whose processes run a script."""
    return Worker(queue, WorkerSettings(**{**SETTINGS, **settings}), command=fake(script))


def step_until(workers: Worker | Sequence[Worker], happened: Callable[[], bool]) -> None:
    """Let workers work until something has happened; fails after a minute."""
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        for one in [workers] if isinstance(workers, Worker) else workers:
            one.step()
        time.sleep(0.01)
