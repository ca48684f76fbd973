"""Every kind of broken input gets a clear error with file and line, and nothing is dropped silently."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tailor.data.readers import read_records, stream_records
from tailor.data.rows import ROW_LIMIT, BadRow, BadRowsError
from tailor.errors import DataError, NotFoundError

GOOD = b'{"prompt": "q", "completion": "a"}'
CUT = gzip.compress(GOOD * 50, mtime=0)[:-12]
HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}


def file_of(tmp_path: Path, *lines: bytes, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(b"\n".join(lines))
    return path


def bad_rows(path: Path, **options: Any) -> BadRowsError:
    with pytest.raises(BadRowsError) as caught:
        read_records(path, **options)
    return caught.value


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "q", "completion": }', "invalid JSON at character 31: Expecting value"),
        (b'{"prompt": "q", "completion": "a"', "(the row ends too early)"),
        (b"{'prompt': 'q'}", "invalid JSON at character 2"),
        (GOOD + GOOD, "invalid JSON at character 35: Extra data"),
        (b'{"prompt": "q", "completion": "a", "n": NaN}', "NaN is not valid JSON"),
        (b'{"prompt": "q", "completion": "a", "n": -Infinity}', "-Infinity is not valid JSON"),
        (b'{"prompt": "q", "completion": "a", "n": 1e999}', "the number 1e999 is too large"),
        (b'{"prompt": "q", "completion": "a", "n": ' + b"1" * 5000 + b"}", "invalid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "q", "completion": "a", "prompt": "b"}', "field 'prompt' is given twice"),
        (b'{"prompt": "q", "completion": "a", "n": {"x": 1, "x": 2}}', "field 'x' is given twice"),
        (b'{"prompt": "q", "completion": "\\ud800"}', "field 'completion' has half of a surrogate pair (U+D800)"),
        (b'{"prompt": "q", "completion": "a", "n": [{"\\udfff": 1}]}', "half of a surrogate pair (U+DFFF)"),
        (
            b'{"prompt": "a\\u0000b", "completion": "a"}',
            "field 'prompt' has the control character NUL (U+0000) at character 2",
        ),
        (b'{"prompt": "a\x00b", "completion": "a"}', "Invalid control character"),
        (b'{"prompt": "caf\xe9", "completion": "a"}', "byte 0xe9 at position 16 is not UTF-8"),
        (b'["q", "a"]', "the row is a list of 2, it must be an object"),
        (b'"text"', "the row is text ('text'), it must be an object"),
        (b"null", "the row is null"),
        (b'{"prompt": "q"}', "field 'completion' is missing; the row has prompt"),
        (b'{"prompt": "q", "completion": null}', "field 'completion' is null, it must be text"),
        (b'{"prompt": "q", "completion": 3}', "field 'completion' is a number (3), it must be text"),
        (b'{"prompt": true, "completion": "a"}', "field 'prompt' is true/false (true), it must be text"),
        (b'{"prompt": {"a": 1}, "completion": "a"}', "field 'prompt' is an object with 'a', it must be text"),
        (b'{"prompt": "", "completion": "a"}', "field 'prompt' is empty"),
        (b'{"prompt": "q", "completion": " \\n"}', "field 'completion' is empty"),
        (b"{}", "field 'prompt' is missing"),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path: Path, line: bytes, reason: str) -> None:
    path = file_of(tmp_path, GOOD, line, GOOD)
    check_second_row(path, f"{path}:2: ", reason)
    # An array's rows are told apart by brackets, so only rows with whole brackets are the same rows in an array.
    if not line.startswith((b"[[", b"{'")) and line.count(b"{") == line.count(b"}") and line != GOOD + GOOD:
        path = file_of(tmp_path, b"[" + b",\n".join([GOOD, line, GOOD]) + b"]", name="rows.json")
        check_second_row(path, f"{path} row 2: ", reason)


def check_second_row(path: Path, place: str, reason: str) -> None:
    error = bad_rows(path)
    assert [bad.line for bad in error.bad_rows] == [2]
    assert reason in error.bad_rows[0].reason
    assert place in error.message
    assert "1 of 3 rows cannot be read as prompt_completion" in error.message
    assert "--skip-bad-rows" in str(error.hint)
    reading = read_records(path, skip_bad_rows=True)
    assert reading.bad_rows == error.bad_rows
    assert [record.source.line for record in reading.records] == [1, 3]
    assert reading.num_rows == 3


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([HI], "there is no assistant turn"),
        ([YES, HI, YES], "turn 1 (assistant) comes before any user turn"),
        ([HI, YES, YES], "turn 3 (assistant) follows another assistant turn"),
        (
            [HI, YES, {"role": "system", "content": "s"}],
            "turn 3 (system) comes after turn 2 (assistant): system turns come first",
        ),
        ([HI, {"role": "tool", "content": "t"}, YES], "turn 2 (tool) does not follow a tool call"),
        (
            [HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, HI],
            "turn 3 (user) follows a tool call without its result",
        ),
        ([HI, {"role": "asistant", "content": "x"}], "role is text ('asistant'); did you mean 'assistant'?"),
        ([HI, {"role": "assistant", "content": ""}], "turn 2 (assistant) is empty"),
        ([HI, {"role": "assistant", "content": 5}], "turn 2 (assistant): content is a number (5), it must be text"),
        ([HI, {"role": "assistant"}], "turn 2 (assistant): content is null"),
        ([HI, {**YES, "weight": 0.5}], "weight is a number (0.5), it must be 0 or 1"),
        ([{**HI, "weight": 1}, YES], "turn 1 (user): weight is a number (1), it must be 0 or 1 on an assistant turn"),
        ([HI, {**YES, "weight": 0}], "every assistant turn has weight 0"),
        ([HI, {**YES, "name": 5}], "name is a number (5), it must be text"),
        ([HI, {**YES, "tool_calls": {"a": 1}}], "tool_calls is an object with 'a', it must be a list"),
        ([HI, {**YES, "tool_calls": ["f"]}], "a tool call must look like"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, YES], "a content part is 'image_url'; only text parts"),
    ],
)
def test_bad_conversations(tmp_path: Path, turns: list[dict[str, Any]], reason: str) -> None:
    good = json.dumps({"messages": [HI, YES]}).encode()
    path = file_of(tmp_path, good, json.dumps({"messages": turns}).encode())
    error = bad_rows(path)
    assert [bad.line for bad in error.bad_rows] == [2]
    assert reason in error.bad_rows[0].reason


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        (
            "sharegpt",
            {"conversations": [{"from": "humn", "value": "a"}]},
            "turn 1: from is text ('humn'); did you mean 'human'?",
        ),
        ("sharegpt", {"conversations": [{"from": [], "value": "a"}]}, "turn 1: from is an empty list"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": 3}]}, "turn 1 (gpt): value is a number (3)"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "must be JSON"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}], "tools": "{"}, "there is no assistant turn"),
        ("openai_chat", {"messages": [HI, YES], "tools": "{"}, "tools must be a list, or JSON of one"),
        ("openai_chat", {"messages": [HI, YES], "tools": [1]}, "tools is a list of 1, it must be a list of objects"),
        ("openai_chat", {"messages": []}, "field 'messages' is an empty list, it must be a list of messages"),
        ("alpaca", {"instruction": "i", "output": "o", "input": 3}, "field 'input' is a number (3), it must be text"),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["a"]]}, "history has a list of 1"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are identical"),
        ("preference", {"chosen": "a", "rejected": "b"}, "must be answers to 'prompt'"),
        ("preference", {"chosen": [HI, YES], "rejected": [HI, YES]}, "chosen and rejected are identical"),
        ("preference", {"chosen": [HI, YES], "rejected": [HI]}, "is the start of the other"),
        ("preference", {"chosen": [HI, YES], "rejected": [YES]}, "no common start"),
        (
            "preference",
            {"prompt": "q", "chosen": [HI, YES], "rejected": "b"},
            "chosen must start with an assistant turn",
        ),
        ("preference", {"prompt": "q", "chosen": [YES], "rejected": [YES, YES]}, "prompt and rejected: turn 3"),
        ("hh", {"chosen": "a", "rejected": "b"}, "it must be a transcript"),
        (
            "kto",
            {"prompt": "q", "completion": "a", "label": "good"},
            "field 'label' is text ('good'), it must be true or false",
        ),
        ("helpsteer", {"prompt": "q", "response": "a", "helpfulness": 4}, "fewer than three attributes"),
        (
            "helpsteer",
            {"prompt": "q", "response": "a", "helpfulness": 5, "correctness": 1, "coherence": 1},
            "helpfulness is a number (5); the scale is whole numbers from 0 to 4",
        ),
        ("retrieval", {"query": "q", "positive": "p", "negative": [""]}, "a negative is empty"),
        ("retrieval", {"positive": "p"}, "field 'anchor' or 'query' is missing"),
    ],
)
def test_bad_rows_of_other_formats(tmp_path: Path, name: str, row: dict[str, Any], reason: str) -> None:
    error = bad_rows(file_of(tmp_path, json.dumps(row).encode()), format=name)
    assert reason in error.bad_rows[0].reason
    assert "no row is usable" in str(error.hint)


def test_all_bad_rows_are_there_and_twenty_are_shown(tmp_path: Path) -> None:
    path = file_of(tmp_path, *[GOOD] * 30, *[b"{}"] * 25)
    error = bad_rows(path)
    assert [bad.line for bad in error.bad_rows] == list(range(31, 56))
    assert f"{path}:50: " in error.message
    assert f"{path}:51: " not in error.message
    assert error.message.endswith("… and 5 more")


def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    for options in ({}, {"skip_bad_rows": True}):
        path = file_of(tmp_path, b"{}", b"oops")
        with pytest.raises(DataError):
            read_records(path, **options)
        assert len(bad_rows(path, format="prompt_completion", **options).bad_rows) == 2
        assert "no row can be read" in bad_rows(file_of(tmp_path, b"{", b"oops"), **options).message


def test_a_pretty_printed_object_says_what_json_lines_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"prompt": "q", "completion": "a"}, indent=2))
    assert "one whole JSON object per line" in str(bad_rows(path).hint)


def test_a_100_mb_line_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD + b'\n{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'", "completion": "a"}\n' + GOOD + b"\n")
    tracemalloc.start()
    rows = list(stream_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows[1] == BadRow(2, "the row is 95.4 MiB long, the limit is 16 MiB: split it")
    assert [type(row).__name__ for row in rows] == ["PromptCompletion", "BadRow", "PromptCompletion"]
    assert peak < 4 * ROW_LIMIT


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.txt"])
def test_rows_over_the_limit_elsewhere(tmp_path: Path, name: str) -> None:
    long = b"x" * (ROW_LIMIT + 2**21)
    good = b"q,a" if name.endswith("csv") else GOOD
    parts = {
        "rows.json": b"[" + GOOD + b', {"prompt": "' + long + b'", "completion": "a"}, ' + GOOD + b"]",
        "rows.csv": b"prompt,completion\n" + good + b"\n" + long + b",a\n" + good,
        "rows.txt": long,
    }
    path = file_of(tmp_path, parts[name], name=name)
    error = bad_rows(path, **({"format": "text"} if name == "rows.txt" else {}))
    assert "the row is 18.0 MiB long, the limit is 16 MiB" in error.bad_rows[0].reason
    if name != "rows.txt":
        assert len(read_records(path, skip_bad_rows=True).records) == 2


@pytest.mark.parametrize(
    ("content", "lines", "reason"),
    [
        (b"[" + GOOD + b", " + GOOD, [2], "the file ends inside this row"),
        (b"[" + GOOD + b', {"prompt": "q', [2], "the file ends inside this row"),
        (b"[" + GOOD + b",, " + GOOD + b"]", [2], "invalid JSON"),
        (b"[" + GOOD + b"] " + GOOD, [2], "more text after the end of the array"),
        (b"[" + GOOD + b", [1]]", [2], "the row is a list of 1"),
        (b'{"data": [' + GOOD + b", " + GOOD, [2], "the file ends inside this row"),
    ],
)
def test_broken_arrays(tmp_path: Path, content: bytes, lines: list[int], reason: str) -> None:
    error = bad_rows(file_of(tmp_path, content, name="rows.json"))
    assert [bad.line for bad in error.bad_rows] == lines
    assert reason in error.bad_rows[0].reason


@pytest.mark.parametrize(
    ("rows", "line", "reason"),
    [
        (b"q,a\nq,a,b\nq,a", 3, "the row has 3 cells, the header has 2"),
        (b"q,a\nq\nq,a", 3, "the row has 1 cells, the header has 2"),
        (b'q,a\n"q,a\nq,a', 3, "a quote that opens here is never closed: everything up to line 4 was read as one row"),
        (b'q,a\n"q"x,a\nq,a', 3, "invalid CSV"),
        (b"q,a\ncaf\xe9,a\nq,a", 3, "a byte that is not UTF-8 (0xe9)"),
        (b"q,a\nq,\nq,a", 3, "field 'completion' is empty"),
        (b'q,"a\nb"\n\nq, \nq,a', 5, "field 'completion' is empty"),
    ],
)
def test_broken_tables(tmp_path: Path, rows: bytes, line: int, reason: str) -> None:
    error = bad_rows(file_of(tmp_path, b"prompt,completion", rows, name="rows.csv"))
    assert [bad.line for bad in error.bad_rows] == [line]
    assert reason in error.bad_rows[0].reason


def test_a_header_with_a_column_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the header has the column 'prompt' twice"):
        read_records(file_of(tmp_path, b"prompt,prompt", b"a,b", name="rows.csv"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "is empty: it has no rows"),
        ("rows.jsonl", b" \n\r\n", "is empty: it has only blank lines"),
        ("rows.jsonl", b"\xef\xbb\xbf", "is empty"),
        ("rows.json", b"[]", "has no rows"),
        ("rows.csv", b"prompt,completion\n", "has no rows"),
        ("rows.bin", bytes(range(256)) * 4, "is a binary file, not text"),
        ("rows.csv", b"a,b\nc\x00,d", "is a binary file, not text"),
        ("rows.jsonl", "{}".encode("utf-16"), "is UTF-16 text"),
        ("rows.xlsx", b"PK\x03\x04rest", "is a zip or Excel file"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("rows.jsonl.gz", CUT, "the compressed file ends too early, it is truncated"),
        ("rows.jsonl.gz", b"\x1f\x8b" + b"\xff" * 50, "the compressed file is damaged"),
        ("rows.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("rows.parquet", b"PAR1" + b"x" * 50, "the Parquet file is damaged"),
    ],
)
def test_files_that_hold_no_rows(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    for skip in (False, True):
        with pytest.raises(DataError) as caught:
            read_records(path, skip_bad_rows=skip)
        assert caught.value.message.startswith(str(path))
        assert message in caught.value.message


def test_truncated_zstandard(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "rows.jsonl.zst"
    whole = zstandard.compress(b"\n".join([GOOD] * 1000))
    path.write_bytes(whole[:-5])
    with pytest.raises(DataError, match="ends too early, it is truncated"):
        read_records(path)
    path.write_bytes(whole[:6] + b"\xff" * 30)
    with pytest.raises(DataError, match="damaged"):
        read_records(path)


def test_a_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    error = bad_rows(file_of(tmp_path, b"one", b"two \xe9", name="story.txt"))
    assert error.bad_rows == (BadRow(2, "byte 0xe9 is not UTF-8: save the file as UTF-8"),)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    file_of(tmp_path, GOOD, name="train.jsonl")
    with pytest.raises(NotFoundError) as caught:
        read_records(tmp_path / "trian.jsonl")
    assert caught.value.hint == "did you mean train.jsonl?"
    with pytest.raises(NotFoundError) as caught:
        read_records(tmp_path / "nowhere" / "train.jsonl")
    assert caught.value.hint == f"the folder {tmp_path / 'nowhere'} does not exist"


def test_a_folder_lists_its_files(tmp_path: Path) -> None:
    file_of(tmp_path, GOOD, name="train.jsonl")
    with pytest.raises(DataError) as caught:
        read_records(tmp_path)
    assert "is a folder" in caught.value.message
    assert "train.jsonl" in str(caught.value.hint)
