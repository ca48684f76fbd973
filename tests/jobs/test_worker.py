"""The worker: one process per job, whatever is killed, whenever; nothing runs twice and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from job_cases import SETTINGS, SLEEPS_UNTIL_TERMINATED, fake, new_job, notes, step_until, worker

from tailor.jobs.database import open_database
from tailor.jobs.process import is_locked
from tailor.jobs.queue import Queue
from tailor.jobs.tables import Job
from tailor.jobs.worker import Worker, WorkerSettings, folder_of, tailor_command
from tailor.runs import Run


@pytest.fixture
def queue(own_home: Path, database: str | None) -> Iterator[Queue]:
    made = Queue(open_database(database))
    yield made
    for job in made.leased():  # a test that failed leaves no process behind
        pid = folder_of(job.process or job.id) / "pid"
        if is_locked(pid.with_name("lock")) and pid.exists():
            os.killpg(int(pid.read_text().split()[0]), signal.SIGKILL)
    made.engine.dispose()


def reap(gone: Worker) -> None:
    """Wait for the process of a worker that only plays dead: it is the parent still."""
    child = gone._running[0].process._child
    assert child is not None
    child.wait()


def status(queue: Queue, number: int = 1) -> str:
    return queue.get(f"job-{number}").status


def test_a_job_that_finishes(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    seen: list[Mapping[str, Any]] = []

    def finished(job: Job, result: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.append(result)
        return {"kept": result["artifact"]}

    script = "note(os.environ['OMP_NUM_THREADS'] + ' ' + str(os.nice(0))); finish()"
    one = Worker(
        queue, WorkerSettings(**SETTINGS | {"num_threads": 3, "niceness": 7}), finished=finished, command=fake(script)
    )
    step_until(one, lambda: status(queue) == "succeeded")
    job = queue.get("job-1")
    assert (job.result, job.worker) == ({"kept": "name-1"}, None)
    assert notes(own_home) == [f"3 {os.nice(0) + 7}"]
    assert [result["artifact"] for result in seen] == ["name-1"]
    one.stop()


def test_a_job_that_fails_says_why(queue: Queue) -> None:
    queue.put(new_job(1))
    one = worker(queue, "fail('data'); sys.exit(4)")
    step_until(one, lambda: status(queue) == "failed")
    assert queue.get("job-1").error == {"code": "data", "message": "it said data", "hint": None}
    one.stop()


def test_a_result_that_does_not_answer_as_in_training_is_a_failure(queue: Queue) -> None:
    queue.put(new_job(1))
    script = "print(json.dumps({'artifact': names[0], 'parity': {'passed': False}})); fail('quality'); sys.exit(9)"
    one = worker(queue, script)
    step_until(one, lambda: status(queue) == "failed")
    assert (queue.get("job-1").error or {})["code"] == "quality"
    one.stop()


def test_a_job_that_only_crashes_fails_after_some_attempts(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    one = worker(queue, "note('began'); os.kill(os.getpid(), signal.SIGKILL)", max_crashes=2)
    step_until(one, lambda: status(queue) == "failed")
    assert notes(own_home) == ["began", "began"]
    assert (queue.get("job-1").error or {})["code"] == "crashed"
    one.stop()


def test_only_so_many_processes_at_a_time(queue: Queue, own_home: Path) -> None:
    for number in (1, 2, 3):
        queue.put(new_job(number))
    one = worker(queue, SLEEPS_UNTIL_TERMINATED, concurrency=2)
    step_until(one, lambda: len(notes(own_home)) == 2)
    one.step()
    assert [status(queue, n) for n in (1, 2, 3)] == ["running", "running", "queued"]
    one.stop()
    assert [status(queue, n) for n in (1, 2, 3)] == ["queued", "queued", "queued"]


def test_pause_and_resume(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    one = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(one, lambda: notes(own_home) == ["began job-1"])
    queue.pause("job-1")
    step_until(one, lambda: queue.get("job-1").worker is None)
    assert notes(own_home) == ["began job-1", "stopped job-1"]
    assert status(queue) == "paused"
    (own_home / "go").touch()
    queue.resume("job-1")
    step_until(one, lambda: status(queue) == "succeeded")
    assert notes(own_home)[2:] == ["began job-1", "ended job-1"]
    assert queue.get("job-1").crashes == 0
    one.stop()


def test_paused_and_resumed_before_the_worker_looks(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    one = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(one, lambda: notes(own_home) == ["began job-1"])
    queue.pause("job-1")
    queue.resume("job-1")
    one.step()
    assert status(queue) == "running"
    one.stop()


def test_cancelling_ends_the_process_even_one_that_does_not_listen(
    queue: Queue, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailor.jobs.worker._CANCEL_SECONDS", 0.05)
    queue.put(new_job(1))
    script = "signal.signal(signal.SIGTERM, signal.SIG_IGN); note('began')\nwhile True: time.sleep(0.01)"
    one = worker(queue, script)
    step_until(one, lambda: notes(own_home) == ["began"])
    queue.cancel("job-1")
    step_until(one, lambda: queue.get("job-1").worker is None)
    assert status(queue) == "cancelled"
    assert not is_locked(folder_of("job-1") / "lock")
    one.stop()


def test_an_artifact_finished_while_it_was_cancelled_is_removed(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    script = """
folder = os.environ["TAILOR_HOME"] + "/artifacts/" + names[0]
os.makedirs(folder)
json.dump({"name": names[0]}, open(folder + "/tailor.json", "w"))
note("saved")
signal.signal(signal.SIGTERM, lambda number, frame: (finish(), sys.exit(0)))
while True: time.sleep(0.01)
"""
    one = worker(queue, script)
    step_until(one, lambda: notes(own_home) == ["saved"])
    queue.cancel("job-1")
    step_until(one, lambda: queue.get("job-1").worker is None)
    assert status(queue) == "cancelled"
    assert not (own_home / "artifacts" / "name-1").exists()
    one.stop()


def test_what_a_process_left_behind_ends_with_it(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    script = "if os.fork() == 0:\n    time.sleep(600)\nnote('began'); finish()"
    one = worker(queue, script)
    step_until(one, lambda: status(queue) == "succeeded")
    assert not is_locked(folder_of("job-1") / "lock")
    one.stop()


def test_a_killed_workers_process_is_taken_over_and_not_doubled(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    first = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(first, lambda: notes(own_home) == ["began job-1"])
    second = worker(queue, SLEEPS_UNTIL_TERMINATED)
    for _ in range(5):
        second.step()
    assert queue.get("job-1").worker == first.id  # it lives
    first.close()  # what the system does when it is killed
    step_until(second, lambda: queue.get("job-1").worker == second.id)
    for _ in range(5):
        second.step()
    assert notes(own_home) == ["began job-1"]
    queue.cancel("job-1")
    step_until(second, lambda: queue.get("job-1").worker is None)
    reap(first)
    second.stop()


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from job_cases import SLEEPS_UNTIL_TERMINATED, worker
from tailor.jobs.database import open_database
from tailor.jobs.queue import Queue
from tailor.jobs.worker import Worker
one = worker(Queue(open_database(sys.argv[2] or None)), SLEEPS_UNTIL_TERMINATED)
one.start()
one._threads[0].join()
"""


def test_a_server_killed_at_any_moment_loses_and_doubles_nothing(
    queue: Queue, own_home: Path, database: str | None
) -> None:
    for number in range(4):
        queue.put(new_job(number))
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), database or ""]
    for delay in (0.0, 0.003, 0.02):  # before, while and after the first process starts
        server = subprocess.Popen(command)
        end = time.monotonic() + 60
        while not queue.leased() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(delay)
        server.kill()
        server.wait()
        assert len([line for line in notes(own_home) if line.startswith("began")]) <= 1
    assert [status(queue, number) for number in range(4)] == ["running", "queued", "queued", "queued"]
    last = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(last, lambda: queue.get("job-0").worker == last.id and "began job-0" in notes(own_home))
    assert notes(own_home).count("began job-0") == 1
    (own_home / "go").touch()
    last.stop()
    final = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(final, lambda: all(status(queue, number) == "succeeded" for number in range(4)))
    assert {line for line in notes(own_home) if line.startswith("ended")} == {f"ended job-{n}" for n in range(4)}
    final.stop()


def test_a_process_that_finished_while_no_worker_looked_is_not_run_again(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    first = worker(queue, "note('began'); time.sleep(0.3); finish()")
    step_until(first, lambda: notes(own_home) == ["began"])
    first.close()
    reap(first)
    second = worker(queue, "note('began again')")
    step_until(second, lambda: status(queue) == "succeeded")
    assert notes(own_home) == ["began"]
    second.stop()


def test_a_process_killed_with_its_worker_runs_again_without_blame(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    first = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(first, lambda: notes(own_home) == ["began job-1"])
    first.close()
    first._running[0].process.signal(signal.SIGKILL)
    reap(first)
    (own_home / "go").touch()
    second = worker(queue, SLEEPS_UNTIL_TERMINATED, max_crashes=1)
    step_until(second, lambda: status(queue) == "succeeded")
    assert queue.get("job-1").crashes == 0
    second.stop()


def test_a_worker_of_another_machine_is_lost_when_its_beat_stands_still(
    queue: Queue, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put(new_job(1))
    assert queue.lease("worker-elsewhere") is not None
    (own_home / "go").parent.mkdir(exist_ok=True)
    (own_home / "go").touch()
    one = worker(queue, SLEEPS_UNTIL_TERMINATED, lease_seconds=1000)
    now = [0.0]
    monkeypatch.setattr("tailor.jobs.worker.time.monotonic", lambda: now[0])
    for _ in range(5):
        now[0] += 900
        queue.beat("worker-elsewhere")
        one.step()
        assert queue.get("job-1").worker == "worker-elsewhere"
    monkeypatch.setattr("time.time", lambda: 4e9)  # a clock that jumps by decades decides nothing
    one.step()
    assert queue.get("job-1").worker == "worker-elsewhere"
    now[0] += 1001
    one.step()
    assert queue.get("job-1").worker == one.id
    monkeypatch.undo()
    monkeypatch.setenv("TAILOR_HOME", str(own_home))
    step_until(one, lambda: status(queue) == "succeeded")
    one.stop()


def test_jobs_of_one_pool_share_a_process(queue: Queue, own_home: Path) -> None:
    for number, pool in enumerate(("a", "b", "a", None, "a")):
        queue.put(new_job(number, pool=pool))
    script = """
note("began " + " ".join(ids))
runs = [{"name": name, "status": "finished", "artifact": name} for name in names]
if len(names) > 1: runs[-1] = {"name": names[-1], "status": "failed", "error": {"code": "x", "message": "diverged"}}
print(json.dumps({"runs": runs}))
"""
    one = worker(queue, script, together=2)
    step_until(one, lambda: not [n for n in range(5) if status(queue, n) in ("queued", "running")])
    assert notes(own_home) == ["began job-0 job-2", "began job-1", "began job-3", "began job-4"]
    assert [status(queue, number) for number in range(5)] == ["succeeded", "succeeded", "failed", *["succeeded"] * 2]
    one.stop()


def test_cancelling_one_of_several_lets_the_others_go_on(queue: Queue, own_home: Path) -> None:
    for number in (1, 2):
        queue.put(new_job(number, pool="a"))
    script = SLEEPS_UNTIL_TERMINATED.replace("ids[0]", "' '.join(ids)")
    one = worker(queue, script, together=2)
    step_until(one, lambda: notes(own_home) == ["began job-1 job-2"])
    queue.cancel("job-1")
    step_until(one, lambda: notes(own_home)[1:] == ["stopped job-1 job-2", "began job-2"])
    assert (status(queue, 1), status(queue, 2)) == ("cancelled", "running")
    assert queue.get("job-2").crashes == 0
    one.stop()


def test_steps_become_events_once(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1, num_steps=3))
    run = Run.create("name-1", "", {})
    run.log(1, loss=2.5)
    first = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(first, lambda: queue.get("job-1").logged == 1)
    run.log(2, loss=float("nan"), validation_loss=1.5)
    step_until(first, lambda: queue.get("job-1").logged == 2)
    first.close()
    second = worker(queue, SLEEPS_UNTIL_TERMINATED)
    step_until(second, lambda: queue.get("job-1").worker == second.id)
    run.truncate(1)  # it went on from a checkpoint
    run.log(2, loss=2.0)
    run.log(3, loss=1.0)
    step_until(second, lambda: queue.get("job-1").logged == 3)
    told = [event for event in queue.events("job-1", 20)[0] if event.type == "metrics"]
    assert [event.message for event in reversed(told)] == [
        "Step 1/3: training loss=2.5",
        "Step 2/3: training loss=nan, validation loss=1.5",
        "Step 3/3: training loss=1",
    ]
    assert told[1].data == {"step": 2, "loss": None, "validation_loss": 1.5, "num_steps": 3}
    second.stop()
    reap(first)


def test_the_command_begins_a_job_or_goes_on_with_its_run(queue: Queue, own_home: Path) -> None:
    job = queue.put(new_job(1))
    assert tailor_command([job])[-3:] == ["tune", str(own_home / "jobs" / "job-1" / "recipe.yaml"), "--json"]
    run = Run.create("name-1", "", {})
    assert tailor_command([job])[-3:] == ["resume", run.name, "--json"]


def test_a_process_that_cannot_be_started_is_a_failure_in_the_end(queue: Queue, own_home: Path) -> None:
    queue.put(new_job(1))
    one = Worker(queue, WorkerSettings(**SETTINGS), command=lambda jobs: [str(own_home / "nothing")])
    step_until(one, lambda: status(queue) == "failed")
    queue.put(new_job(2))
    (own_home / "jobs" / "job-2").write_text("in the way of its folder")
    step_until(one, lambda: status(queue, 2) == "failed")
    assert (queue.get("job-2").error or {})["code"] == "crashed"
    one.stop()
