"""Records of a large file come from disk equal to those a small file has in memory, bad rows and all."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_readers import CASES

from tailor.data.formats import FORMATS
from tailor.data.prepare import duplicates, leakage, split
from tailor.data.prompts import read_prompts
from tailor.data.readers import Reading, read_records
from tailor.data.record_store import StoredRecords, select
from tailor.data.records import PromptCompletion, Record
from tailor.data.rows import BadRowsError
from tailor.errors import DataError

PAIRS: list[dict[str, Any]] = [
    {"prompt": f"question {k} \u00e9\u4f60\u2028 {'x' * k}", "completion": f'a "quoted",\nanswer {k % 7}'}
    for k in range(40)
]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read_both(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Reading, Reading]:
    """The file as one with few rows, and as one with many."""
    with monkeypatch.context() as patch:
        patch.setattr("tailor.data.readers.MANY_ROWS", 10**9)
        patch.setenv("TAILOR_HOME", str(path.parent / "empty"))
        few = read_records(path, **options)
    many = read_records(path, **options)
    assert isinstance(few.records, list)
    assert isinstance(many.records, StoredRecords)
    return few, many


def check_equal(few: Reading, many: Reading) -> None:
    assert list(many.records) == few.records
    assert [type(record) for record in many.records] == [type(record) for record in few.records]
    assert [(r.source, r.meta) for r in many.records] == [(r.source, r.meta) for r in few.records]
    for name in ("detection", "bad_rows", "num_rows", "content_hash", "path"):
        assert getattr(many, name) == getattr(few, name), name


@pytest.mark.parametrize("name", FORMATS)
def test_records_of_every_format(name: str, few_are_many: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for case, row, _ in CASES if case == name]
    extra = {"id": 7, "nested": {"a": [1, 2.5, None, True], "": {}}, "big": 2**70, "e": 1e-300}
    path = write(tmp_path / "rows.jsonl", [{**row, **extra} for row in rows * few_are_many])
    for _ in range(2):  # made, then found in the cache
        check_equal(*read_both(path, monkeypatch, format=name))


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_every_container(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    if name.endswith((".csv", ".tsv")):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter="," if name.endswith("csv") else "\t")
            writer.writeheader()
            writer.writerows(PAIRS)
    elif name.endswith(".json"):
        path.write_text(json.dumps({"data": PAIRS}, indent=1))
    elif name.endswith(".parquet"):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist([{**row, "n": {"m": [k]}} for k, row in enumerate(PAIRS)]), path)
    else:
        write(path, PAIRS)
    few, many = read_both(path, monkeypatch)
    check_equal(few, many)
    assert [record.prompt for record in many.records if isinstance(record, PromptCompletion)] == [
        row["prompt"] for row in PAIRS
    ]


def broken(k: int) -> bytes:
    return [
        b'{"prompt": "cut',
        b'{"prompt": "a", "completion": 3}',
        b'{"prompt": "bad \xff", "completion": "a"}',
        b'{"prompt": "\\u0000", "completion": "a"}',
        b'{"prompt": "a", "prompt": "b", "completion": "c"}',
        b"[1]",
        b'{"prompt": NaN, "completion": "c"}',
    ][k]


@pytest.mark.usefixtures("few_are_many")
def test_bad_rows_are_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps(row).encode() for row in PAIRS * 15]
    for k in range(7):
        lines.insert(3 + 80 * k, broken(k))
    lines.insert(100, b'{"prompt": "' + b"x" * 3000 + b'", "completion": "y"}')
    monkeypatch.setattr("tailor.data.containers.ROW_LIMIT", 2000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    few, many = read_both(path, monkeypatch, skip_bad_rows=True)
    check_equal(few, many)
    assert len(many.bad_rows) == 8
    messages = []
    for many_rows in (10**9, 8):
        monkeypatch.setattr("tailor.data.readers.MANY_ROWS", many_rows)
        with pytest.raises(BadRowsError) as caught:
            read_records(path)
        messages.append((str(caught.value), caught.value.hint, caught.value.bad_rows))
    assert messages[0] == messages[1]


@pytest.mark.usefixtures("few_are_many")
def test_bad_cells_of_a_table_are_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = b"".join(b"question %d,answer\n" % k for k in range(60))
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\nwrong \xe9,byte\none cell\n,empty\n" + rows + b'"open,quote\n')
    few, many = read_both(path, monkeypatch, skip_bad_rows=True)
    check_equal(few, many)
    assert [row.line for row in many.bad_rows] == [2, 3, 4, 65]


@pytest.mark.usefixtures("few_are_many")
def test_a_table_with_values_that_json_does_not_know_stays_in_memory(tmp_path: Path, own_home: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist([{**row, "day": date(2024, 7, 26)} for row in PAIRS]), path)
    records = read_records(path).records
    assert isinstance(records, list)
    assert records[3].meta == {"day": date(2024, 7, 26)}
    assert not any((own_home / "cache" / "records").iterdir())


@pytest.mark.usefixtures("few_are_many")
def test_a_home_that_cannot_be_written_to(tmp_path: Path, own_home: Path) -> None:
    own_home.write_text("a file, where a folder should be")
    path = write(tmp_path / "rows.jsonl", PAIRS)
    records = read_records(path).records
    assert isinstance(records, list)
    assert len(records) == len(PAIRS)


@pytest.mark.usefixtures("few_are_many")
def test_a_moved_file_is_known_again_and_named_by_its_new_path(tmp_path: Path, own_home: Path) -> None:
    first = write(tmp_path / "rows.jsonl", PAIRS)
    records = read_records(first).records
    moved = first.rename(tmp_path / "moved.jsonl")
    again = read_records(moved).records
    assert len(list((own_home / "cache" / "records").iterdir())) == 1
    assert [str(record.source) for record in again[:2]] == [f"{moved}:1", f"{moved}:2"]
    # what was read before stays readable when file and cache are gone
    assert isinstance(records, StoredRecords)
    assert isinstance(again, StoredRecords)
    assert records.key == again.key
    for entry in (own_home / "cache" / "records").glob("*/*"):
        entry.unlink()
    moved.unlink()
    assert [record.prompt for record in records if isinstance(record, PromptCompletion)] == [
        row["prompt"] for row in PAIRS
    ]


@pytest.mark.usefixtures("few_are_many")
def test_other_content_other_settings_and_other_formats_are_kept_apart(tmp_path: Path, own_home: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PAIRS)
    read_records(path)
    swapped = read_records(path, columns={"prompt": "completion", "completion": "prompt"}).records[5]
    assert isinstance(swapped, PromptCompletion)
    assert swapped.completion == PAIRS[5]["prompt"]
    questions = write(
        tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": f"{k}?"}]} for k in range(9)]
    )
    assert len(read_prompts(questions).records) == 9
    with pytest.raises(DataError, match="9 of 9 rows cannot be read as openai_chat"):
        read_records(questions)
    write(path, [*PAIRS, {"prompt": "one", "completion": "more"}])
    assert len(read_records(path).records) == len(PAIRS) + 1
    assert len(list((own_home / "cache" / "records").iterdir())) == 5


@pytest.mark.usefixtures("few_are_many")
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.jsonl", PAIRS)
    monkeypatch.setattr("tailor.data.readers.file_hash", lambda path: "0" * 64)
    with pytest.raises(DataError, match="was changed while it was read"):
        read_records(path)
    assert list((own_home / "cache" / "records").iterdir()) == []


@pytest.mark.usefixtures("few_are_many")
def test_selections(tmp_path: Path) -> None:
    records = read_records(write(tmp_path / "rows.jsonl", PAIRS)).records
    whole = list(records)
    assert isinstance(records, StoredRecords)
    assert (records[-1], records[np.int64(3)]) == (whole[-1], whole[3])
    for part in (slice(None, 7), slice(30, None), slice(5, 30, 4), slice(50, 60), slice(None, None, -1)):
        assert list(records[part]) == whole[part]
    assert list(records[2:20][3:5]) == whole[5:7]
    places = np.array([9, 3, 3, 0])
    chosen = select(records, places)
    assert isinstance(chosen, StoredRecords)
    assert list(chosen) == select(whole, places) == [whole[k] for k in places]
    for place in (40, -41):
        with pytest.raises(IndexError):
            records[place]
    assert records[:9].key == records[0:9].key != records[:8].key
    assert whole[3] in records


@pytest.mark.usefixtures("few_are_many")
def test_split_leakage_and_duplicates_are_those_of_records_in_memory(
    tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = read_both(write(tmp_path / "rows.jsonl", [*PAIRS, *PAIRS[5:15]]), monkeypatch)
    for seed in (0, 0, 1):
        expected, found = split(few.records, seed=seed), split(many.records, seed=seed)
        assert isinstance(found.train, StoredRecords)
        assert isinstance(found.validation, StoredRecords)
        assert (list(found.train), list(found.validation)) == (expected.train, expected.validation)
    assert len(list((own_home / "cache" / "splits").iterdir())) == 2
    assert duplicates(many.records) == duplicates(few.records)
    assert len(duplicates(many.records).exact) == 10
    assert leakage(many.records, many.records[3:9]) == leakage(few.records, few.records[3:9])
    with pytest.raises(DataError, match="1 different prompts cannot be split"):
        split(select(many.records, np.array([5, 40])))


def test_reading_many_rows_keeps_none_of_them(tmp_path: Path, few_are_many: int) -> None:
    """The file descriptors are closed with the records, and progress is told."""
    path = write(tmp_path / "rows.jsonl", PAIRS)
    opened = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    told: list[tuple[str, int, int]] = []
    records: Sequence[Record] | None = read_records(path, progress=lambda *args: told.append(args)).records
    assert told[-1] == ("read rows", 40, 40)
    assert isinstance(records, StoredRecords)
    del records
    assert not opened or len(os.listdir("/proc/self/fd")) == opened
