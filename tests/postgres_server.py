"""A PostgreSQL server of the tests' own, from the programs that are installed; or the one that a variable names.

TAILOR_TEST_POSTGRES=URL names one whose user may make databases; each test gets an empty database of its own.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

VARIABLE = "TAILOR_TEST_POSTGRES"
USER, PASSWORD = "ann", "p@ss/wörd"
QUOTED = "p%40ss%2Fw%C3%B6rd"
PATIENCE = 60


class Unavailable(Exception):
    """There is no server to be had; says why."""


class PostgresServer:
    """`initdb` and `postgres` in a folder of their own; may be stopped and started again."""

    def __init__(self) -> None:
        self._bin = _programs()
        self._account = _account()
        # not under pytest's folder: it is closed to the account that PostgreSQL runs under when the tests run as root
        self.folder = Path(tempfile.mkdtemp(prefix="tailor-postgres-"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        word = self.folder / "password"
        word.write_text(PASSWORD, "utf-8")
        if self._account is not None:
            for path in (self.folder, word):
                shutil.chown(path, self._account)
        options = ("-A", "scram-sha-256", f"--pwfile={word}", "-E", "UTF8", "--locale=C", "--no-sync")
        made = subprocess.run(
            [self._bin / "initdb", "-D", self.folder / "data", "-U", USER, *options],
            capture_output=True,
            text=True,
            user=self._account,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )
        if made.returncode:
            self.remove()
            raise Unavailable(f"initdb failed: {made.stderr.strip()}")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://{USER}:{QUOTED}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [self._bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-k", self.folder]
        for setting in ("listen_addresses=127.0.0.1", "fsync=off", "shared_buffers=16MB", "max_connections=60"):
            command += ["-c", setting]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, user=self._account, cwd=self.folder, env={"LC_ALL": "C"}
            )
        import psycopg

        end = time.monotonic() + PATIENCE
        while True:
            try:
                psycopg.connect(self.url.replace("+psycopg", "")).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    log_text = (self.folder / "log").read_text()
                    self.remove()
                    raise Unavailable(f"postgres does not start: {error}; {log_text[-500:]}") from None
                time.sleep(0.02)

    def stop(self) -> None:
        """At once, as when its machine is switched off: connections end, and nobody is asked."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(PATIENCE)
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _programs() -> Path:
    """The folder of `initdb` and `postgres`: distributions keep them off the PATH."""
    found = [Path(path).parent for path in [shutil.which("initdb")] if path]
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name.zfill(4))
    for folder in (*found, *reversed(versions)):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    raise Unavailable(f"PostgreSQL is not installed (initdb, postgres), and {VARIABLE} names no server")


def _account() -> str | None:
    """PostgreSQL does not run as root: who runs it then."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    account = next((name for name in ("postgres", "nobody") if name in known), None)
    if account is None:
        raise Unavailable("PostgreSQL does not run as root, and there is no other account")
    return account


@contextlib.contextmanager
def server() -> Iterator[PostgresServer]:
    """A running one; skips the test where none can be had."""
    pytest.importorskip("psycopg")
    try:
        made = PostgresServer()
        made.start()
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        yield made
    finally:
        made.remove()


@contextlib.contextmanager
def empty_database(url: str, options: str = "") -> Iterator[str]:
    """The URL of a new database on the server that `url` is of; it is dropped in the end."""
    import psycopg
    from sqlalchemy import make_url

    name = f"tailor_test_{secrets.token_hex(6)}"
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}")  # type: ignore[call-overload]
    try:
        yield make_url(url).set(drivername="postgresql+psycopg", database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[call-overload]
