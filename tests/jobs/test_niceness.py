"""How far a job gives way: what the system says of its process, and that it is measured against the server."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tailor.errors import ConfigError
from tailor.jobs.process import IDLE, Process
from tailor.jobs.worker import WorkerSettings

TELLS = "import os; print(os.nice(0), os.getsid(0), os.getpgid(0) == os.getpid(), flush=True)"


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    """A process of which nothing is left after the test."""
    one = Process(tmp_path)
    yield one
    one.signal(9)


def ended(process: Process) -> list[str]:
    assert process._child is not None
    assert process._child.wait(60) == 0
    return process.stdout.read_text().split()


@pytest.mark.parametrize(("niceness", "more"), [(0, 0), (7, 7), (IDLE, 19)])
def test_a_job_is_nicer_than_the_server_and_in_its_session(process: Process, niceness: int, more: int) -> None:
    """Where sessions share the cores out (autogroups), niceness counts within one only."""
    process.start([sys.executable, "-S", "-c", TELLS], os.environ, niceness)
    assert ended(process) == [str(min(19, os.nice(0) + more)), str(os.getsid(0)), "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has SCHED_IDLE")
@pytest.mark.parametrize(("niceness", "idle"), [(IDLE, True), (IDLE - 1, False)])
def test_the_nicest_job_and_what_it_starts_get_idle_time_only(process: Process, niceness: int, idle: bool) -> None:
    script = (
        "import os, subprocess, sys, time\n"
        "end = time.monotonic() + 30\n"
        f"while os.sched_getscheduler(0) != os.SCHED_IDLE and {idle} and time.monotonic() < end: time.sleep(0.01)\n"
        "told = 'import os; print(os.sched_getscheduler(0) == os.SCHED_IDLE)'\n"
        "subprocess.run([sys.executable, '-S', '-c', told], check=True)\n"
    )
    process.start([sys.executable, "-S", "-c", script], os.environ, niceness)
    assert ended(process) == [str(idle)]


def test_there_is_no_nicer_job() -> None:
    assert WorkerSettings(niceness=IDLE).niceness == IDLE
    with pytest.raises(ConfigError, match="niceness"):
        WorkerSettings(niceness=IDLE + 1)
