"""`tailor data check` on every broken input: exit code and message; and on a good file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tailor.cli.main import run

GOOD = b'{"prompt": "what is it", "completion": "a thing"}\n'
OTHER = b'{"prompt": "where is it", "completion": "over there"}\n'
THIRD = b'{"prompt": "when is it", "completion": "tomorrow at noon"}\n'


def check(path: Path, *flags: str) -> int:
    return run(["data", "check", str(path), *flags])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "q", "completion": }', "invalid JSON at character 31"),
        (b'{"prompt": "q", "completion": NaN}', "NaN is not valid JSON"),
        (b'{"prompt": "q", "completion": 3}', "field 'completion' is a number (3), it must be text"),
        (b'{"prompt": "q"}', "field 'completion' is missing"),
        (b'{"prompt": "q", "completion": ""}', "field 'completion' is empty"),
        (b'{"prompt": "q", "completion": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"prompt": "caf\xe9", "completion": "a"}', "not UTF-8"),
        (b'["q", "a"]', "the row is a list of 2"),
        (b'{"prompt": "a\\u0000b", "completion": "a"}', "NUL"),
    ],
)
def test_a_bad_row_is_listed_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, reason: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + OTHER + line + b"\n" + THIRD)
    assert check(path) == 4
    told = capsys.readouterr()
    assert f"{path}:3: " in told.out
    assert reason in told.out
    assert "first row as trained" in told.out
    assert "error: " in told.err
    assert "1 of 4 rows cannot be read" in told.err
    assert "--skip-bad-rows" in told.err
    assert check(path, "--skip-bad-rows") == 0
    told = capsys.readouterr()
    assert f"{path}:3: " in told.out
    assert "1 of 4 rows cannot be read as prompt_completion and are skipped" in told.out


def test_all_bad_rows_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD * 70 + b"{bad\n" * 60)
    assert check(path) == 4
    out = capsys.readouterr().out
    assert [line for line in range(71, 131) if f"{path}:{line}: invalid JSON" not in out] == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", b"", "is empty: it has no rows"),
        ("blank.jsonl", b"\n \n", "is empty: it has only blank lines"),
        ("model.bin", bytes(range(256)) * 40, "is a binary file"),
        ("rows.xlsx", b"PK\x03\x04" + b"\x00" * 100, "a zip or Excel file"),
        ("mixed.jsonl", (GOOD + b'{"text": "a document"}\n') * 10, "mixes formats"),
        ("unknown.jsonl", b'{"utterance": "q", "reply": "a"}\n' * 3, "is in no known format"),
        ("renamed.jsonl", b'{"text": "q", "category": "a"}\n' * 3, "can be read in 2 ways"),
        ("cut.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)[:-20], "truncated"),
    ],
)
def test_a_bad_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert check(path) == 4
    assert reason in capsys.readouterr().err


def test_a_folder_and_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path) == 4
    assert "is a folder, not a file" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_bytes(GOOD)
    assert check(tmp_path / "rowz.jsonl") == 6
    assert "did you mean rows.jsonl" in capsys.readouterr().err


def test_a_huge_line_is_one_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"prompt": "' + b"x" * (20 * 2**20) + b'", "completion": "a"}\n' + OTHER)
    assert check(path) == 4
    out = capsys.readouterr().out
    assert f"{path}:2: the row is 20.0 MiB long, the limit is 16 MiB" in out
    assert "3 rows, 2 usable" in out


def test_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD + OTHER + THIRD).replace(b"\n", b"\r\n"))
    assert check(path) == 0
    assert "3 rows, 3 usable" in capsys.readouterr().out


def test_a_good_file_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + OTHER + THIRD)
    assert check(path) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert "prompt_completion (100% of the rows looked at), 3 rows, 3 usable" in told.out
    assert "[<|end|>]" in told.out
    assert "<|bos|><|user|>" in told.out
    assert "the end-of-turn token <|end|> is inside the loss" in told.out
    assert "0 error, 0 warning, 1 info" in told.out
    assert "median" in told.out


def test_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"{bad\n" + GOOD + OTHER)
    assert check(path, "--json") == 4
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert report["file"]["num_rows"] == 4
    assert [bad["place"] for bad in report["file"]["bad_rows"]] == [f"{path}:2"]
    duplicate = next(finding for finding in report["findings"] if finding["code"] == "duplicates")
    assert (duplicate["severity"], duplicate["places"]) == ("warning", [f"{path}:3"])
    assert report["lengths"]["total"]["num_rows"] == 3
    assert report["first_row"]["end_of_turn_in_loss"] is True
    assert json.loads(told.err)["error"]["code"] == "data"


def test_columns_name_the_two_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,category\nlost card,card\nno cash,cash\n")
    assert check(path, "--columns", "prompt=text", "--columns", "completion=category") == 0
    assert "prompt_completion" in capsys.readouterr().out
    assert check(path, "--columns", "prompt") == 2
    assert "--columns wants name=value" in capsys.readouterr().err
    assert check(path, "--columns", "promt=text") == 3


def test_a_terminal_is_never_told_what_the_data_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "[red]\x1b[2J", "completion": "[/] done \x1b]0;x\x07"}) + "\n")
    assert check(path) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b" in out


def test_a_wrong_technique_and_a_wrong_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD)
    assert check(path, "--technique", "lroa") == 3
    assert "did you mean 'lora'" in capsys.readouterr().err
    assert check(path, "--format", "alpacca") == 3
    assert "did you mean 'alpaca'" in capsys.readouterr().err
