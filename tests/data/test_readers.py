"""Each format and container is read into the right record; nothing of a row is lost."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailor.data.formats import FORMATS
from tailor.data.readers import Reading, read_records, stream_records
from tailor.data.records import (
    Comparison,
    Conversation,
    Document,
    Judged,
    PromptCompletion,
    Rated,
    Record,
    Retrieval,
    Source,
)
from tailor.data.rows import BadRow
from tailor.text.messages import Message, assistant, system, user

SHARED = Path(__file__).parents[2] / "../shared/data"
Rows = Sequence[Mapping[str, Any]]

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = [{"role": "user", "content": "hi"}]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(tmp_path: Path, row: Mapping[str, Any], **options: Any) -> tuple[Record, Reading]:
    reading = read_records(write(tmp_path / "rows.jsonl", [row]), **options)
    assert len(reading.records) == 1
    return reading.records[0], reading


def said(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]


CASES: list[tuple[str, dict[str, Any], Record]] = [
    ("prompt_completion", {"prompt": "2+2?", "completion": " 4"}, PromptCompletion("2+2?", " 4")),
    (
        "trl_prompt_completion",
        {
            "prompt": [*ASKED, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "bye"}],
            "completion": [{"role": "assistant", "content": "bye!"}],
        },
        Conversation(
            (
                user("hi"),
                Message("assistant", "yes?", weight=0.0),
                user("bye"),
                Message("assistant", "bye!", weight=1.0),
            )
        ),
    ),
    (
        "openai_chat",
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Rain "}, {"type": "text", "text": "in Rome?"}],
                    "name": "Ada",
                },
                {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
                {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
                {"role": "assistant", "content": "No.", "weight": 1},
            ],
            "tools": [TOOL],
        },
        Conversation(
            (
                Message("developer", "Be brief."),
                Message("user", "Rain in Rome?", name="Ada"),
                Message("assistant", "", tool_calls=(CALL,), weight=0.0),
                Message("tool", "sunny", tool_call_id="c1"),
                Message("assistant", "No.", weight=1.0),
            ),
            (TOOL,),
        ),
    ),
    ("alpaca", {"instruction": "Translate.", "input": "", "output": "ja"}, PromptCompletion("Translate.", "ja")),
    (
        "alpaca",
        {"instruction": "Translate.", "input": "yes", "output": "ja"},
        PromptCompletion("Translate.\nyes", "ja"),
    ),
    (
        "alpaca",
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
        Conversation((system("s"), user("a"), assistant("b"), user("c"), assistant("d"))),
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "No."},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TOOL["function"]]),
        },
        Conversation(
            (
                system("Be brief."),
                user("Rain?"),
                Message(
                    "assistant",
                    "",
                    tool_calls=({"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},),
                ),
                Message("tool", "sunny"),
                assistant("No."),
            ),
            (TOOL,),
        ),
    ),
    (
        "sharegpt",
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        Conversation((user("a"), assistant("b"))),
    ),
    (
        "preference",
        {"prompt": "hi", "chosen": "hello", "rejected": "go away", "margin": 2},
        Comparison((user("hi"),), (assistant("hello"),), (assistant("go away"),), 2.0),
    ),
    (
        "preference",
        {
            "prompt": said("system", "user"),
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        Comparison((system("system 0"), user("user 1")), (assistant("a"),), (assistant("b"),)),
    ),
    (
        "preference",
        {
            "chosen": [*ASKED, {"role": "assistant", "content": "a"}],
            "rejected": [*ASKED, {"role": "assistant", "content": "b"}],
        },
        Comparison((user("hi"),), (assistant("a"),), (assistant("b"),)),
    ),
    (
        "preference",
        {
            "prompt": "hi",
            "chosen": [*ASKED, {"role": "assistant", "content": "a"}],
            "rejected": [*ASKED, {"role": "assistant", "content": "b"}],
        },
        Comparison((user("hi"),), (assistant("a"),), (assistant("b"),)),
    ),
    *(
        (
            "openai_preference",
            {
                "input": {"messages": ASKED},
                f"preferred_{noun}": [{"role": "assistant", "content": "a"}],
                f"non_preferred_{noun}": [{"role": "assistant", "content": "b"}],
            },
            Comparison((user("hi"),), (assistant("a"),), (assistant("b"),)),
        )
        for noun in ("output", "completion")
    ),
    (
        "alpaca_preference",
        {"instruction": "do", "input": "it", "chosen": "a", "rejected": "b"},
        Comparison((user("do\nit"),), (assistant("a"),), (assistant("b"),)),
    ),
    (
        "sharegpt_preference",
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
            "system": "s",
        },
        Comparison((system("s"), user("hi")), (assistant("a"),), (assistant("b"),)),
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant: good\n\nreally",
            "rejected": "\n\nHuman: q\n\nAssistant: r\n\nHuman: s\n\nAssistant: bad",
        },
        Comparison((user("q"), assistant("r"), user("s")), (assistant("good\n\nreally"),), (assistant("bad"),)),
    ),
    ("kto", {"prompt": "q", "completion": "a", "label": False}, Judged((user("q"),), (assistant("a"),), False)),
    (
        "kto",
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": "a"}], "kto_tag": True},
        Judged((user("hi"),), (assistant("a"),), True),
    ),
    (
        "helpsteer",
        {"prompt": "q", "response": "a", "helpfulness": 4, "correctness": 0, "verbosity": 2},
        Rated((user("q"),), (assistant("a"),), {"helpfulness": 4.0, "correctness": 0.0, "verbosity": 2.0}),
    ),
    ("retrieval", {"query": "q", "positive": "p", "negative": "n"}, Retrieval("q", "p", ("n",))),
    ("retrieval", {"anchor": "q", "positive": "p", "negatives": ["n", "m"]}, Retrieval("q", "p", ("n", "m"))),
    ("retrieval", {"anchor": "q", "positive": "p"}, Retrieval("q", "p")),
    ("text", {"text": "Once upon a time."}, Document("Once upon a time.")),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_every_format_is_detected_and_read(tmp_path: Path, name: str, row: dict[str, Any], expected: Record) -> None:
    record, reading = read_one(tmp_path, {**row, "id": 7})
    assert reading.detection.format == name
    assert reading.detection.confidence == 1.0
    assert type(record) is type(expected)
    path = tmp_path / "rows.jsonl"
    assert record.source == Source(str(path), 1)
    assert record.meta == {"id": 7}
    for field in type(expected).__dataclass_fields__:
        if field not in ("source", "meta"):
            assert getattr(record, field) == getattr(expected, field), field
    named, _ = read_one(tmp_path, {**row, "id": 7}, format=name)
    assert named == record


def test_every_format_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(FORMATS)


def test_old_function_calls_become_tool_turns(tmp_path: Path) -> None:
    row = {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": None, "function_call": CALL["function"]},
            {"role": "function", "name": "weather", "content": "sunny"},
            {"role": "assistant", "content": "Sun."},
        ],
        "functions": [TOOL["function"]],
    }
    record, _ = read_one(tmp_path, row)
    assert isinstance(record, Conversation)
    assert record.messages[1].tool_calls == ({"type": "function", "function": CALL["function"]},)
    assert record.messages[2] == Message("tool", "sunny", name="weather")
    assert record.tools == (TOOL,)


def test_fields_of_turns_without_a_place_go_to_meta(tmp_path: Path) -> None:
    turns = [*ASKED, {"role": "assistant", "content": "a", "reasoning_content": "think", "refusal": None}]
    record, _ = read_one(tmp_path, {"messages": turns})
    assert record.meta == {"messages": {"2": {"reasoning_content": "think"}}}
    sides = {"preferred_output": turns[1:], "non_preferred_output": [{"role": "assistant", "content": "b"}]}
    record, _ = read_one(tmp_path, {"input": {"messages": ASKED, "tools": [TOOL]}, **sides})
    assert record.meta == {"preferred_output": {"1": {"reasoning_content": "think"}}, "input": {"tools": [TOOL]}}


def test_columns_rename_before_reading_and_displaced_ones_are_kept(tmp_path: Path) -> None:
    row = {"text": "where is my card", "category": "card_arrival", "prompt": "old", "n": 1}
    record, reading = read_one(tmp_path, row, columns={"prompt": "text", "completion": "category"})
    assert record == PromptCompletion(
        "where is my card", "card_arrival", source=record.source, meta={"n": 1, "prompt": "old"}
    )
    assert reading.detection.format == "prompt_completion"


def test_column_names_in_other_spellings(tmp_path: Path) -> None:
    record, _ = read_one(tmp_path, {"Prompt": "q", "COMPLETION": "a", "User ID": 3})
    assert record == PromptCompletion("q", "a", source=record.source, meta={"User ID": 3})
    record, _ = read_one(tmp_path, {"anchor": "q", "query": "kept", "positive": "p"}, format="retrieval")
    assert record == Retrieval("q", "p", source=record.source, meta={"query": "kept"})


ROWS = [{"prompt": f"question {n} \u00e9\u4f60", "completion": f'a "quoted",\nanswer {n}'} for n in range(5)]


def expect_rows(path: Path, lines: Sequence[int]) -> Reading:
    reading = read_records(path)
    assert [(r.prompt, r.completion) for r in reading.records if isinstance(r, PromptCompletion)] == [
        (row["prompt"], row["completion"]) for row in ROWS
    ]
    assert [record.source.line for record in reading.records] == list(lines)
    assert reading.num_rows == 5
    assert reading.content_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reading.path == path
    return reading


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n", "\r\n  \r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, ending: str, bom: bytes, compression: str) -> None:
    data = bom + ending.join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    path = tmp_path / f"rows.jsonl{compression}"
    if compression == ".gz":
        data = gzip.compress(data[:50]) + gzip.compress(data[50:])  # several members, as `cat a.gz b.gz` makes
    elif compression == ".zst":
        zstandard = pytest.importorskip("zstandard")
        data = zstandard.compress(data[:50]) + zstandard.compress(data[50:])
    path.write_bytes(data)
    step = ending.count("\n")
    reading = expect_rows(path, [1 + step * n for n in range(5)])
    assert {"": "JSONL, 5", ".gz": "gzip", ".zst": "zstd"}[compression] in reading.detection.evidence[0]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrapper", [None, "data", "examples", "rows"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_json_arrays_and_wrappers(tmp_path: Path, indent: int | None, wrapper: str | None, bom: str) -> None:
    value = {"version": [{"data": 1}], "n": "[{", wrapper: ROWS, "after": {"data": []}} if wrapper else ROWS
    path = tmp_path / "rows.json"
    path.write_text(bom + json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
    expect_rows(path, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_arrays_do_not_depend_on_where_the_file_is_cut(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailor.data.containers.CHUNK", chunk)
    tricky = [{"prompt": 'a\\" ]},{[', "completion": "\\"}, {"prompt": "\\\\", "completion": '"'}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(tricky, indent=1))
    assert [(r.prompt, r.completion) for r in read_records(path).records if isinstance(r, PromptCompletion)] == [
        (row["prompt"], row["completion"]) for row in tricky
    ]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv", ";"), (".tsv", "\t"), (".dat", "|")])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_tables(tmp_path: Path, suffix: str, delimiter: str, ending: str) -> None:
    path = tmp_path / f"rows{suffix}"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter, lineterminator=ending)
        writer.writeheader()
        writer.writerows(ROWS)
    expect_rows(path, [2, 4, 6, 8, 10])


def test_tables_have_text_cells_and_yes_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "kto.csv"
    path.write_text(",prompt,completion,label\n0,1,2,True\n1,3,4,false\n")
    records = read_records(path).records
    assert [(r.completion[0].content, r.label, r.meta) for r in records if isinstance(r, Judged)] == [
        ("2", True, {"column_1": "0"}),
        ("4", False, {"column_1": "1"}),
    ]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(arrow.Table.from_pylist(ROWS), path)
    expect_rows(path, [1, 2, 3, 4, 5])
    # Parquet gives every struct all keys: those without a value are null, and mean "not there".
    chats = [
        {"messages": [*ASKED, {"role": "assistant", "content": "a", "weight": 1}], "tools": None},
        {"messages": [*ASKED, {"role": "assistant", "content": "b", "name": "Bo"}], "tools": None},
    ]
    parquet.write_table(arrow.Table.from_pylist(chats), path)
    records = read_records(path).records
    assert [r.messages[1] for r in records if isinstance(r, Conversation)] == [
        Message("assistant", "a", weight=1.0),
        Message("assistant", "b", name="Bo"),
    ]


@pytest.mark.parametrize("name", ["story.txt", "story.md", "story.txt.gz", "story"])
def test_text_files_are_one_document(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = b"\xef\xbb\xbf# Title\r\n\r\nOnce, upon.\r\nA time\r\n"
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    reading = read_records(path)
    assert reading.records == [Document("# Title\n\nOnce, upon.\nA time\n", source=Source(str(path), 1))]


def test_json_lines_in_a_txt_file(tmp_path: Path) -> None:
    assert len(read_records(write(tmp_path / "rows.txt", ROWS)).records) == 5


def test_streaming_gives_records_and_bad_rows_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS[:2], {"prompt": "q"}, ROWS[2]])
    stream = list(stream_records(path))
    assert [type(item) for item in stream] == [PromptCompletion, PromptCompletion, BadRow, PromptCompletion]
    assert stream[0] == read_records(path, skip_bad_rows=True).records[0]


def test_long_rows_within_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "x" * 3_000_000, "completion": "y"}] * 2)
    assert [len(r.prompt) for r in read_records(path).records if isinstance(r, PromptCompletion)] == [3_000_000] * 2


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), ascii_only=st.booleans(), array=st.booleans())
def test_any_text_comes_back_equal(tmp_path: Path, rows: list[tuple[str, str]], ascii_only: bool, array: bool) -> None:
    objects = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    path = tmp_path / "rows.jsonl"
    texts = [json.dumps(row, ensure_ascii=ascii_only) for row in objects]
    content = json.dumps(objects, ensure_ascii=ascii_only) if array else "\n".join(texts)
    path.write_bytes(content.encode())
    assert [(r.prompt, r.completion) for r in read_records(path).records if isinstance(r, PromptCompletion)] == rows


CELL = TEXT.filter(lambda text: "\r" not in text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5))
def test_any_table_cell_comes_back_equal(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    path = tmp_path / "rows.tsv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writerows([("prompt", "completion"), *rows])
    assert [(r.prompt, r.completion) for r in read_records(path).records if isinstance(r, PromptCompletion)] == rows


@pytest.mark.parametrize(
    ("name", "columns", "num_rows"),
    [
        ("banking77/train.jsonl.gz", {"prompt": "text", "completion": "category"}, 10003),
        ("e2e/devset.jsonl.gz", {"prompt": "mr", "completion": "ref"}, 4672),
    ],
)
def test_real_tables_with_columns(name: str, columns: dict[str, str], num_rows: int) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip("the shared data sets are not here")
    reading = read_records(path, columns=columns)
    assert reading.detection.format == "prompt_completion"
    assert (len(reading.records), reading.num_rows, reading.bad_rows) == (num_rows, num_rows, ())
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line, (text, record) in enumerate(zip(file, reading.records, strict=True), start=1):
            row = json.loads(text)
            assert isinstance(record, PromptCompletion)
            assert (record.prompt, record.completion) == tuple(row[column] for column in columns.values())
            assert record.source.line == line
            assert record.meta["id"] == row["id"]


def test_real_hh_transcripts() -> None:
    path = SHARED / "hh-harmless/pairs.jsonl.gz"
    if not path.exists():
        pytest.skip("the shared data sets are not here")
    reading = read_records(path, skip_bad_rows=True)
    assert reading.detection.format == "hh"
    assert reading.num_rows == 1731
    assert len(reading.bad_rows) < 0.02 * reading.num_rows
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for record in reading.records:
        assert isinstance(record, Comparison)
        row = rows[record.source.line - 1]
        assert record.chosen[-1].content == row["chosen_response"].strip()
        assert record.rejected[-1].content == row["rejected_response"].strip()
