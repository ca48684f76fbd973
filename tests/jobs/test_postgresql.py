"""Jobs in PostgreSQL: what only several machines, a server of its own and a password bring with them."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_cases import SLEEPS_UNTIL_TERMINATED, new_job, notes, step_until, worker
from sqlalchemy import Engine, make_url, text, update

import postgres_server
from postgres_server import PASSWORD, QUOTED, PostgresServer
from tailor.cli.main import run
from tailor.errors import ConfigError, ConflictError, TailorError, UnavailableError
from tailor.jobs import process
from tailor.jobs.database import DATABASE_VARIABLE, claim_home, open_database
from tailor.jobs.process import is_locked
from tailor.jobs.queue import Queue
from tailor.jobs.tables import JOBS, NewEvent
from tailor.jobs.worker import Worker, folder_of


@pytest.fixture
def engine(own_home: Path, postgresql_database: str) -> Iterator[Engine]:
    made = open_database(postgresql_database)
    yield made
    made.dispose()


@pytest.fixture
def queue(engine: Engine) -> Iterator[Queue]:
    made = Queue(engine)
    yield made
    for job in made.leased():
        process.Process(folder_of(job.process or job.id)).signal(signal.SIGKILL)


# --- changes at the same moment --------------------------------------------------------------------------------------


def meanwhile(queue: Queue, change: dict[str, Any], act: Callable[[], Any]) -> list[Any]:
    """What `act` comes to when another server's change of job-1 is under way, and done before `act` may go on."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(act())
        except TailorError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    with queue.engine.begin() as other:
        other.execute(update(JOBS).where(JOBS.c.id == "job-1").values(**change))
        thread.start()
        waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
        end = time.monotonic() + 60
        while not other.execute(waiting).scalar():
            assert time.monotonic() < end, "it did not wait"
            time.sleep(0.01)
    thread.join()
    return found


def test_a_job_that_is_cancelled_while_its_process_is_seen_to_be_gone_stays_cancelled(queue: Queue) -> None:
    queue.put(new_job(1))
    queue.lease("a")
    meanwhile(queue, {"status": "cancelled"}, lambda: queue.release("job-1", "a", crashed=True, max_crashes=3))
    job = queue.get("job-1")
    assert (job.status, job.worker) == ("cancelled", None)


def test_a_job_that_is_paused_twice_at_once_is_paused(queue: Queue) -> None:
    queue.put(new_job(1))
    (job,) = meanwhile(queue, {"status": "paused"}, lambda: queue.pause("job-1"))
    assert job.status == "paused"


def test_a_job_that_ends_while_it_is_cancelled_says_that_it_has_ended(queue: Queue) -> None:
    queue.put(new_job(1))
    (error,) = meanwhile(queue, {"status": "succeeded"}, lambda: queue.cancel("job-1"))
    assert isinstance(error, ConflictError)
    assert "is succeeded" in str(error)


def test_events_become_visible_in_the_order_of_their_numbers(queue: Queue) -> None:
    """Whoever follows a job asks for what is beyond the last number that it saw."""
    queue.put(new_job(1))
    meanwhile(queue, {"logged": 1}, lambda: queue.add_event("job-1", NewEvent("later")))
    assert [event.message for event in queue.events("job-1", 1)[0]] == ["later"]


def test_a_job_that_another_looks_at_is_skipped(queue: Queue) -> None:
    for number in (1, 2):
        queue.put(new_job(number))
    with queue.engine.begin() as other:
        other.execute(update(JOBS).where(JOBS.c.id == "job-1").values(beat=7))
        job = queue.lease("a")
        assert job is not None
        assert job.id == "job-2"
        assert queue.lease("a") is None
    assert queue.lease("a") is not None


def test_messages_may_hold_what_no_database_takes(queue: Queue) -> None:
    queue.put(new_job(1))
    queue.lease("a")
    assert queue.failed("job-1", "a", {"code": "data", "message": "line 3: 'a\0\ud800'", "hint": None})
    assert queue.events("job-1", 1)[0][0].message == "line 3: 'a??'"
    assert (queue.get("job-1").error or {})["message"] == "line 3: 'a\0\ud800'"


# --- machines --------------------------------------------------------------------------------------------------------


class Machines:
    """Which machine this is; workers of several are stepped in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._patch = monkeypatch
        monkeypatch.setattr("tailor.jobs.worker.time.monotonic", lambda: self.now)

    def be(self, name: str) -> None:
        for module in ("worker", "process"):
            self._patch.setattr(f"tailor.jobs.{module}.this_system", lambda: name)

    def until(self, name: str, one: Worker, happened: Callable[[], bool]) -> None:
        """Let a machine's worker work."""
        self.be(name)
        for _ in range(3000):
            if happened():
                return
            one.step()
            threading.Event().wait(0.01)
        raise AssertionError("it did not happen")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Machines:
    return Machines(monkeypatch)


def test_locks_say_nothing_about_another_machine_and_silence_does(
    queue: Queue, own_home: Path, machines: Machines
) -> None:
    queue.put(new_job(1))
    machines.be("here")
    first = worker(queue, SLEEPS_UNTIL_TERMINATED, lease_seconds=100)
    machines.be("there")
    second = worker(queue, SLEEPS_UNTIL_TERMINATED, lease_seconds=100)
    machines.until("here", first, lambda: notes(own_home) == ["began job-1"])
    first.close()  # its lock is not seen; it beats
    for _ in range(5):
        machines.now += 90
        machines.be("here")
        first.step()
        machines.be("there")
        second.step()
        assert queue.get("job-1").worker == first.id
    machines.now += 101
    second.step()
    assert queue.get("job-1").worker == second.id

    second.step()
    queue.cancel("job-1")
    second.step()
    second.step()
    assert is_locked(folder_of("job-1") / "lock")  # a number of the other machine's is signalled to nobody here
    machines.until("here", first, lambda: not is_locked(folder_of("job-1") / "lock"))  # which gives way by itself
    machines.until("there", second, lambda: queue.get("job-1").worker is None)
    assert notes(own_home) == ["began job-1"]
    machines.until("here", first, lambda: not first._running)


@pytest.mark.parametrize("late", [False, True])
def test_a_job_goes_on_where_its_process_cannot_be_seen_any_more(
    queue: Queue, own_home: Path, machines: Machines, late: bool
) -> None:
    """Its lock may be seen for a while after the machine is gone, as disks in a network have it."""
    queue.put(new_job(1))
    machines.be("here")
    first = worker(queue, SLEEPS_UNTIL_TERMINATED, lease_seconds=100)
    machines.until("here", first, lambda: notes(own_home) == ["began job-1"])
    machines.be("there")
    second = worker(queue, SLEEPS_UNTIL_TERMINATED, lease_seconds=100, max_crashes=1)
    second.step()
    machines.now += 101
    if late:
        second.step()
        assert queue.get("job-1").worker == second.id
    machines.be("here")
    first._running[0].process.signal(signal.SIGKILL)  # the machine is off
    (own_home / "go").touch()
    machines.until("there", second, lambda: queue.get("job-1").status == "succeeded")
    assert notes(own_home) == ["began job-1", "began job-1", "ended job-1"]
    assert queue.get("job-1").crashes == 0
    second.stop()
    machines.until("here", first, lambda: not first._running)


def test_a_worker_cut_off_from_its_database_ends_its_processes_before_the_lease(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with postgres_server.server() as server:
        engine = open_database(server.url)
        queue = Queue(engine)
        queue.put(new_job(1))
        one = worker(queue, SLEEPS_UNTIL_TERMINATED, lease_seconds=2, max_crashes=1)
        step_until(one, lambda: notes(own_home) == ["began job-1"])
        one.start()
        server.stop()
        end = time.monotonic() + 60
        while is_locked(folder_of("job-1") / "lock"):
            assert time.monotonic() < end, "it did not end"
            time.sleep(0.01)
        assert "jobs job-1 stop for now" in caplog.text
        (own_home / "go").touch()
        server.start()
        while queue.get("job-1").status != "succeeded":
            assert time.monotonic() < end, queue.get("job-1")
            time.sleep(0.01)
        assert notes(own_home) == ["began job-1", "began job-1", "ended job-1"]
        assert queue.get("job-1").crashes == 0
        assert "Traceback" not in caplog.text
        one.stop()
        engine.dispose()


def test_a_worker_stops_without_its_database(own_home: Path) -> None:
    with postgres_server.server() as server:
        engine = open_database(server.url)
        queue = Queue(engine)
        queue.put(new_job(1))
        one = worker(queue, SLEEPS_UNTIL_TERMINATED)
        step_until(one, lambda: notes(own_home) == ["began job-1"])
        server.stop()
        one.stop()
        assert notes(own_home) == ["began job-1", "stopped job-1"]
        (own_home / "go").touch()
        server.start()
        two = worker(queue, SLEEPS_UNTIL_TERMINATED, max_crashes=1)
        step_until(two, lambda: queue.get("job-1").status == "succeeded")
        two.stop()
        engine.dispose()


# --- the server and its URL ------------------------------------------------------------------------------------------


def test_a_server_that_goes_away_and_comes_back(own_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with postgres_server.server() as server:
        engine = open_database(server.url)
        queue = Queue(engine)
        queue.put(new_job(1))
        for round in (1, 2):
            server.stop()
            for ask in (lambda: queue.get("job-1"), lambda: queue.beat("a"), lambda: queue.put(new_job(2))):
                with pytest.raises(UnavailableError, match="does not answer") as error:
                    ask()
                assert PASSWORD not in str(error.value)
            assert caplog.text.count("does not answer") == round
            server.start()
            assert queue.get("job-1").id == "job-1"
            assert caplog.text.count("answers again") == round
        server.stop()
        server.start()
        assert queue.get("job-1").id == "job-1"  # nobody noticed
        assert f"postgresql://{postgres_server.USER}@127.0.0.1:{server.port}/postgres" in caplog.text
        assert PASSWORD not in caplog.text
        assert QUOTED not in caplog.text
        engine.dispose()


def test_nobody_waits_for_ever(engine: Engine) -> None:
    for _ in range(3):
        with engine.connect() as connection:
            asked = ("lock_timeout", "idle_in_transaction_session_timeout", "transaction_isolation")
            found = [connection.execute(text(f"SHOW {setting}")).scalar() for setting in asked]
        assert found == ["30s", "1min", "read committed"]


def test_a_connection_that_dies_within_a_transaction_changes_nothing(queue: Queue, engine: Engine) -> None:
    queue.put(new_job(1))

    def cut_off() -> None:
        with engine.begin() as connection:
            connection.execute(update(JOBS).values(status="failed"))
            number = connection.execute(text("SELECT pg_backend_pid()")).scalar()
            with engine.connect() as other:
                other.execute(text("SELECT pg_terminate_backend(:number)"), {"number": number})
            connection.execute(text("SELECT 1"))

    with pytest.raises(UnavailableError):
        cut_off()
    assert queue.get("job-1").status == "queued"


URL = "postgresql+psycopg://ann:s3cret@127.0.0.1:1/db"
REFUSED = {
    "nobody there": (URL, UnavailableError, "ann@127.0.0.1:1/db does not answer: .*refused"),
    "no URL": ("s3cret", ConfigError, "cannot be read"),
    "a port that is none": (URL.replace(":1/", ":s3cret/"), ConfigError, "cannot be read"),
    "another database": (URL.replace("postgresql+psycopg", "mysql"), ConfigError, "'mysql'.*postgresql"),
    "another driver": (URL.replace("psycopg", "asyncpg"), ConfigError, "did you mean 'postgresql"),
    "@ unquoted": ("postgresql://ann:s3@s3cret@127.0.0.1:1/db", ConfigError, "'@' too many"),
    "/ unquoted": ("postgresql://ann:7/s3cret@127.0.0.1:1/db", UnavailableError, "refused"),
    "in the parameters": ("postgres://ann@127.0.0.1:1/db?password=s3cret", UnavailableError, "ann@127.0.0.1:1/db does"),
    "an unknown parameter": (f"{URL}?colour=s3cret", ConfigError, "cannot be used: .*colour"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_database_that_cannot_be_used_is_a_clear_error_without_the_password(own_home: Path, case: str) -> None:
    pytest.importorskip("psycopg")
    url, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as error:
        Queue(open_database(url))
    told = f"{error.value} {error.value.hint}"
    assert "s3cret" not in told
    assert "s3" not in told


def test_what_the_server_refuses_is_said(own_home: Path) -> None:
    with postgres_server.server() as server:
        for what in ("password", "username", "database"):
            wrong: dict[str, Any] = {what: "wr0ng"}
            with pytest.raises(UnavailableError, match=r"wr0ng|authentication failed") as error:
                Queue(open_database(make_url(server.url).set(**wrong).render_as_string(hide_password=False)))
            assert ("wr0ng" in str(error.value)) == (what != "password")
            assert PASSWORD not in str(error.value)


def test_a_user_who_may_not_make_tables_is_told(own_home: Path, postgresql_database: str) -> None:
    admin = open_database(postgresql_database)
    with admin.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS bob"))
        connection.execute(text("CREATE ROLE bob LOGIN PASSWORD 'x'"))
        connection.execute(text("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
    url = make_url(postgresql_database).set(username="bob", password="x").render_as_string(hide_password=False)
    engine = open_database(url)
    with pytest.raises(ConfigError, match="permission denied for schema public") as error:
        Queue(engine)
    assert "allowed to make tables" in (error.value.hint or "")
    engine.dispose()
    with admin.begin() as connection:
        connection.execute(text("DROP ROLE bob"))
    admin.dispose()


def test_the_command_says_it_and_keeps_the_password_to_itself(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("psycopg")
    monkeypatch.setenv(DATABASE_VARIABLE, URL)
    assert run(["serve", "--base", "tailor-nano", "--port", "0"]) == UnavailableError.exit_code
    told = capfd.readouterr()
    assert "does not answer" in told.err
    assert "hint: see that it runs" in told.err
    assert run(["serve", "--help"]) == 0
    shown = told.err + told.out + "".join(capfd.readouterr())
    assert DATABASE_VARIABLE in shown
    assert "s3cret" not in shown


def test_jobs_are_not_given_the_password(own_home: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATABASE_VARIABLE, URL)
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    queue.put(new_job(1))
    one = worker(queue, "note(str('s3cret' in str(os.environ))); finish()")
    step_until(one, lambda: queue.get("job-1").status == "succeeded")
    assert notes(own_home) == ["False"]
    one.stop()


def test_letters_survive_a_database_that_knows_none(own_home: Path, postgresql: str) -> None:
    with postgres_server.empty_database(postgresql, "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'") as url:
        engine = open_database(url)
        queue = Queue(engine)
        queue.put(new_job(1, facts={"ä": "→"}, model="ft:ü"))
        queue.add_event("job-1", NewEvent("größer → 字"))
        assert queue.events("job-1", 1)[0][0].message == "größer → 字"
        assert (queue.get("job-1").model, queue.get("job-1").facts) == ("ft:ü", {"ä": "→"})
        engine.dispose()


# --- one home --------------------------------------------------------------------------------------------------------


def test_a_database_belongs_to_one_home(engine: Engine, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [threading.Thread(target=claim_home, args=(engine,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    claim_home(engine)
    own_home.rename(own_home.with_name("moved"))
    monkeypatch.setenv("TAILOR_HOME", str(own_home.with_name("moved")))
    claim_home(engine)
    monkeypatch.setenv("TAILOR_HOME", str(own_home.with_name("another")))
    with pytest.raises(ConflictError, match="belongs to another TAILOR_HOME") as error:
        claim_home(engine)
    assert "mount the same folder" in (error.value.hint or "")
    assert PASSWORD not in str(error.value)


def test_a_home_may_be_given_another_database(
    own_home: Path, engine: Engine, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_home(engine)
    mine = (own_home / "home.id").read_text()
    with postgres_server.empty_database(postgresql) as url:
        other = open_database(url)
        claim_home(other)
        other.dispose()
    assert (own_home / "home.id").read_text() == mine


def test_a_server_of_the_tests_runs_and_is_gone_after_it() -> None:
    with postgres_server.server() as server:
        folder = server.folder
        assert isinstance(server, PostgresServer)
    assert not folder.exists()
