"""A job's process: its own process group, and a lock that it holds as long as it lives.

The lock is a file that the worker locks before the process starts and that the process inherits. The system lets go of
it when the last process of the job is gone, so "does it still run?" has one answer, whoever asks: no process id that
was given away again, no clock, and no moment in which a worker killed between starting a process and writing that down
would leave one that nobody knows of.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from tailor.errors import ConflictError

IDLE = 20
"""The niceness beyond nice's 19: only the time that nothing else wants, where the system knows that (Linux)."""

_BEGIN = 'echo "$$ $1" > "$0" && shift && exec "$@"'
"""Write down the process's number and the system it is of, then become the command: number and group stay the same."""


@cache
def this_system() -> str:
    """Where numbers of processes mean what they mean here, and locks are seen at once: this boot, this container.

    Elsewhere a number is another process's, and whether a shared disk tells of locks depends on the disk.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{platform.node()}/{uuid.getnode()}"


def take_lock(path: Path, seconds: float = 1.0) -> int | None:
    """A descriptor that holds the file locked until it is closed here and in all processes that inherited it.

    None when somebody else holds it for longer than it takes to ask whether it is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(descriptor)
                return None
            time.sleep(0.01)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the file. Asking does not disturb others who ask."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


class Process:
    """The process of a job's folder: one that was started here, or by a worker that is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def stdout(self) -> Path:
        """What the last process wrote."""
        return self.folder / "stdout.txt"

    @property
    def stderr(self) -> Path:
        """What the last process said; those before it in `stderr-1.txt`, …"""
        return self.folder / "stderr.txt"

    def start(self, command: Sequence[str], environment: Mapping[str, str], niceness: int) -> None:
        """Start the command in a group of its own, so much nicer. Raises ConflictError while the one before it lives.

        Not in a session of its own: Linux shares the cores out among sessions first (sched(7), autogroups), and
        niceness would then mean nothing to the server.
        """
        lock = take_lock(self.folder / "lock")
        if lock is None:
            raise ConflictError(f"the process of job {self.folder.name} still runs")
        try:
            self._number.unlink(missing_ok=True)
            self._keep_stderr()
            nice = ["nice", "-n", str(min(niceness, IDLE - 1))] if niceness else []
            with open(self.stdout, "wb") as out, open(self.stderr, "wb") as err:
                self._child = subprocess.Popen(
                    ["/bin/sh", "-c", _BEGIN, str(self._number), this_system(), *nice, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=self.folder,
                    env=dict(environment),
                    process_group=0,
                    pass_fds=(lock,),
                )
            if niceness == IDLE and sys.platform == "linux":
                os.sched_setscheduler(self._child.pid, os.SCHED_IDLE, os.sched_param(0))
        finally:
            os.close(lock)

    def alive(self) -> bool:
        """Whether a process of the job lives. Ends what one that was started here has left behind."""
        if self._child is not None and self._child.poll() is None:
            return True
        if self._child is not None:
            self.signal(signal.SIGKILL)
        return is_locked(self.folder / "lock")

    def signal(self, number: int) -> None:
        """Send a signal to all of the job's processes, if there are any on this system."""
        if not is_locked(self.folder / "lock"):
            return
        group = self._child.pid if self._child is not None else self._written()
        if group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    @property
    def is_here(self) -> bool:
        """Whether it was started on this system."""
        return self._child is not None or self._written() is not None

    @property
    def _number(self) -> Path:
        return self.folder / "pid"

    def _written(self) -> int | None:
        try:
            number, _, system = self._number.read_text("ascii").strip().partition(" ")
            return int(number) if system == this_system() else None
        except (FileNotFoundError, ValueError):  # it is just beginning
            return None

    def _keep_stderr(self) -> None:
        if self.stderr.exists():
            number = len(list(self.folder.glob("stderr-*.txt"))) + 1
            self.stderr.rename(self.folder / f"stderr-{number}.txt")
