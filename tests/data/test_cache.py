"""The cache: whole folders or none, bounded, safe for several writers, and nothing of others is ever removed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailor.data import cache
from tailor.data.cache import cache_key, cached, find, keep
from tailor.data.columns import ColumnWriter, open_columns, span
from tailor.store import DAY


def numbers(count: int = 10) -> Any:
    def build(writer: ColumnWriter) -> Mapping[str, Any]:
        for k in range(count):
            writer.append("squares", np.array([k * k], np.int64))
        writer.append("empty", np.empty(0, np.uint8))
        return {"count": count}

    return build


def read(key: str) -> list[int] | None:
    found = find("tests", key)
    return None if found is None else found["squares"][0 : len(found["squares"])].tolist()


def entries(home: Path) -> set[str]:
    return {path.name for path in (home / "cache" / "tests").iterdir()}


def test_what_is_kept_is_found(own_home: Path) -> None:
    key = cache_key("squares", 10)
    assert find("tests", key) is None
    made = keep("tests", key, numbers())
    assert made is not None
    assert (made.facts, len(made["empty"]), made["empty"][0:0].tolist()) == ({"count": 10}, 0, [])
    assert made["squares"][3:6].tolist() == [9, 16, 25]
    assert read(key) == [k * k for k in range(10)]
    again = cached("tests", key, numbers(3))
    assert again is not None
    assert again.facts == {"count": 10}, "what is there is not built again"
    assert entries(own_home) == {key}


def test_keys_differ_with_every_part() -> None:
    keys = [cache_key(), cache_key("a"), cache_key("a", "b"), cache_key("ab"), cache_key(["a", "b"]), cache_key("a", 1)]
    assert len(set(keys)) == len(keys)
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})


def test_a_build_that_fails_leaves_nothing(own_home: Path) -> None:
    def fail(writer: ColumnWriter) -> Mapping[str, Any]:
        writer.append("squares", np.zeros(3))
        raise KeyError("no")

    with pytest.raises(KeyError):
        keep("tests", cache_key(1), fail)
    assert entries(own_home) == set()


def test_damage_is_noticed_and_mended(own_home: Path) -> None:
    key = cache_key(1)
    keep("tests", key, numbers())
    folder = own_home / "cache" / "tests" / key
    for name, content in [("squares", b""), ("squares", b"\x01" * 80), ("columns.json", b"{"), ("columns.json", b"[]")]:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        assert find("tests", key) is None, (name, content)
        cached("tests", key, numbers())
        assert (folder / name).read_bytes() == before
    assert entries(own_home) == {key}


def test_a_home_that_cannot_be_written_to_keeps_nothing(own_home: Path) -> None:
    own_home.write_text("a file")
    assert keep("tests", cache_key(1), numbers()) is None


def _race(key: str, barrier: Any, seen: Any) -> None:
    def build(writer: ColumnWriter) -> Mapping[str, Any]:
        barrier.wait()
        return dict(numbers()(writer))

    found = keep("tests", key, build)
    seen.put(None if found is None else found["squares"][0:3].tolist())


def test_writers_at_the_same_time(own_home: Path) -> None:
    """All see a whole folder: the first to finish wins, the others take what it made."""
    context, key = multiprocessing.get_context("fork"), cache_key(1)
    barrier, seen = context.Barrier(3), context.Queue()
    writers = [context.Process(target=_race, args=(key, barrier, seen)) for _ in range(3)]
    for writer in writers:
        writer.start()
    assert [seen.get(timeout=60) for _ in writers] == [[0, 1, 4]] * 3
    for writer in writers:
        writer.join()
    seen.close()
    assert entries(own_home) == {key}


def test_the_least_used_is_removed_when_there_is_too_much(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache_key(k) for k in range(4)]
    for age, key in enumerate(keys[:3]):
        keep("tests", key, numbers(1000))
        os.utime(own_home / "cache" / "tests" / key, (time.time() - 100 + age,) * 2)
    assert read(keys[0]) is not None, "which makes it the latest used"
    other = own_home / "cache" / "tests" / "notes of somebody"
    other.mkdir()
    monkeypatch.setattr(cache, "LIMIT", 27_000)
    opened = find("tests", keys[2])
    os.utime(own_home / "cache" / "tests" / keys[2], (time.time() - 50,) * 2)
    keep("tests", keys[3], numbers(1000))
    assert entries(own_home) == {keys[0], keys[2], keys[3], other.name}
    monkeypatch.setattr(cache, "LIMIT", 10)
    keep("tests", cache_key("last"), numbers(1000))
    assert entries(own_home) == {cache_key("last"), other.name}, "the newest stays even when it alone is too much"
    assert opened is not None
    assert opened["squares"][2:4].tolist() == [4, 9], "who has it open goes on reading it"


def test_drafts_that_a_kill_left_are_removed_after_a_day(own_home: Path) -> None:
    folder = own_home / "cache" / "tests"
    drafts = [folder / f".{cache_key(k)}.0123abcd.tmp" for k in range(2)]
    for draft in drafts:
        draft.mkdir(parents=True)
    os.utime(drafts[0], (time.time() - DAY - 60,) * 2)
    keep("tests", cache_key(1), numbers())
    assert entries(own_home) == {drafts[1].name, cache_key(1)}


def test_a_folder_without_its_index_is_not_opened(tmp_path: Path) -> None:
    writer = ColumnWriter(tmp_path)
    writer.append("squares", np.arange(5))
    assert writer.written()["squares"][1:3].tolist() == [1, 2]
    writer.close(None)
    assert open_columns(tmp_path) is None


def test_spans() -> None:
    ends = np.array([3, 3, 7])
    assert [span(ends, k) for k in range(3)] == [(0, 3), (3, 3), (3, 7)]
