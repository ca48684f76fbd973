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
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tailor.errors import ConflictError

_BEGIN = 'echo $$ > "$0" && exec "$@"'
"""Write down the process's number, then become the command: the number and the group stay the same."""


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
        """Start the command in a session of its own. Raises ConflictError while the one before it lives."""
        lock = take_lock(self.folder / "lock")
        if lock is None:
            raise ConflictError(f"the process of job {self.folder.name} still runs")
        try:
            self._number.unlink(missing_ok=True)
            self._keep_stderr()
            nice = ["nice", "-n", str(niceness)] if niceness else []
            with open(self.stdout, "wb") as out, open(self.stderr, "wb") as err:
                self._child = subprocess.Popen(
                    ["/bin/sh", "-c", _BEGIN, str(self._number), *nice, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=self.folder,
                    env=dict(environment),
                    start_new_session=True,
                    pass_fds=(lock,),
                )
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
        """Send a signal to all of the job's processes, if there are any."""
        if not is_locked(self.folder / "lock"):
            return
        group = self._child.pid if self._child is not None else self._written()
        if group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)

    @property
    def _number(self) -> Path:
        return self.folder / "pid"

    def _written(self) -> int | None:
        try:
            return int(self._number.read_text("ascii"))
        except (FileNotFoundError, ValueError):  # it is just beginning
            return None

    def _keep_stderr(self) -> None:
        if self.stderr.exists():
            number = len(list(self.folder.glob("stderr-*.txt"))) + 1
            self.stderr.rename(self.folder / f"stderr-{number}.txt")
