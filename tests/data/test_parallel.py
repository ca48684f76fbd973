"""Forked work gives what one process gives: the results in order, the first row's exception, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable

import pytest

from tailor.data import parallel
from tailor.data.parallel import in_ranges
from tailor.errors import DataError, ResourceError

pytestmark = pytest.mark.usefixtures("few_are_many")


@pytest.fixture(params=[1, 2, 5])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(request.param)), raising=False)
    return int(request.param)


@pytest.mark.usefixtures("processors")
@pytest.mark.parametrize("num_rows", [0, 1, 8, 9, 10, 100])
def test_results_come_in_order_and_cover_all_rows(num_rows: int) -> None:
    told: list[tuple[str, int, int]] = []
    parts = list(in_ranges(lambda rows: [k * k for k in rows], num_rows, "square", lambda *args: told.append(args)))
    assert [number for part in parts for number in part] == [k * k for k in range(num_rows)]
    assert told == (
        [("square", done, num_rows) for done in [*range(3, num_rows, 3), num_rows]] if num_rows >= 8 else []
    )


def test_many_rows_are_shared_and_few_are_not() -> None:
    pids = set(in_ranges(lambda rows: os.getpid(), 100, "who"))
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 2
    assert set(in_ranges(lambda rows: os.getpid(), 7, "who")) == {os.getpid()}


@pytest.mark.usefixtures("processors")
def test_the_first_rows_exception_is_raised_with_its_hint() -> None:
    def fail(rows: range) -> int:
        if rows.start >= 6:
            raise DataError(f"rows.jsonl:{rows.start}: broken", hint="mend it")
        return rows.start

    with pytest.raises(DataError, match=r"^rows.jsonl:6: broken") as caught:
        list(in_ranges(fail, 100, "work"))
    assert caught.value.hint == "mend it"
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_an_error_and_not_a_wait_without_end() -> None:
    def die(rows: range) -> None:
        if rows.start == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ResourceError, match="was killed"):
        list(in_ranges(die, 100, "work"))


def test_one_that_stops_listening_ends_the_workers() -> None:
    results = in_ranges(lambda rows: rows.start, 100, "work")
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert multiprocessing.active_children() == []


def test_the_environment_and_the_filters_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "true"):
        monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
        if value is not None:
            monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        filters = list(warnings.filters)
        seen = set(in_ranges(lambda rows: os.environ.get("TOKENIZERS_PARALLELISM"), 100, "work"))
        assert seen == {"false"}
        assert os.environ.get("TOKENIZERS_PARALLELISM") == value
        assert list(warnings.filters) == filters


def test_a_daemon_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    processors: Callable[[], int] = parallel._processors
    assert processors() == 2
    monkeypatch.setattr("sys.platform", "darwin")
    assert processors() == 1
