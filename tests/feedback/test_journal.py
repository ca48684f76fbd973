"""Append-only lines: many writers, killed writers, full files, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tailor.errors import ResourceError
from tailor.feedback.journal import Damage, Journal, Line, encode, head_of

WRITER = """
import sys
from pathlib import Path
from tailor.feedback.journal import Journal, encode
journal = Journal(Path(sys.argv[1]), max_file_bytes=1 << 16, sync_every=60)
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    journal.append(encode({"id": f"{sys.argv[2]}-{number}", "text": "é" * (number % 700)}))
"""


def start(folder: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), name, str(count)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return writer


def ids(journal: Journal) -> list[str]:
    lines = list(journal.lines())
    assert all(isinstance(line, Line) for line in lines)
    return [line.entry["id"] for line in lines if isinstance(line, Line)]


def test_lines_come_back_with_their_places(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "log")
    assert list(journal.lines()) == []
    journal.append(encode({"id": "a", "text": "two\nlines \ud83d"}))
    journal.append(encode({"id": "b"}))
    (file,) = journal.files()
    assert list(journal.lines()) == [
        Line(f"{file}:1", {"id": "a", "text": "two\nlines \ud83d"}),
        Line(f"{file}:2", {"id": "b"}),
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_full_files_are_followed_by_others_in_their_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_file_bytes=64)
    for number in range(12):
        journal.append(encode({"id": str(number), "text": "x" * 30}))
    assert len(journal.files()) == 12
    again = Journal(tmp_path, max_file_bytes=64)  # a process that starts later looks for the end
    again.append(encode({"id": "12"}))
    assert ids(again) == [str(number) for number in range(13)]
    (tmp_path / "2026-01-01-2.jsonl").write_text('{"id": "2"}\n')
    (tmp_path / "2026-01-01-10.jsonl").write_text('{"id": "10"}\n')
    (tmp_path / "notes.jsonl").write_text("mine")
    assert ids(again)[:2] == ["2", "10"]


def test_a_torn_line_spoils_no_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(encode({"id": "a"}))
    (file,) = journal.files()
    with file.open("ab") as torn:
        torn.write(b'{"id": "b", "te')
    assert isinstance(list(journal.lines())[1], Damage)
    journal.append(encode({"id": "c"}))
    first, second, third = journal.lines()
    assert (first, third) == (Line(f"{file}:1", {"id": "a"}), Line(f"{file}:3", {"id": "c"}))
    assert isinstance(second, Damage)
    assert second.place == f"{file}:2"
    assert "not JSON" in second.reason


@pytest.mark.parametrize(
    ("line", "reason"), [(b"[1]", "not a JSON object"), (b"\0\0\0", "not JSON"), (b'"\xff"', "not JSON")]
)
def test_what_is_no_entry_is_said(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "2026-01-01-001.jsonl").write_bytes(b'{"id": "a"}\n' + line + b'\n\n{"id": "b"}\n')
    first, bad, last = Journal(tmp_path).lines()
    assert isinstance(first, Line)
    assert isinstance(bad, Damage)
    assert reason in bad.reason
    assert isinstance(last, Line)
    assert last.place.endswith(":4")


def test_entries_are_found_by_their_first_field(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_file_bytes=100)
    journal.append(encode({"id": "a", "text": '{"id":"b",'}))
    for number in range(5):
        journal.append(encode({"id": "b", "number": number, "text": "x" * 40}))
    journal.append(encode({"id": "bb", "number": 9}))
    assert [entry["number"] for entry in journal.starting_with(head_of("id", "b"))] == [4, 3, 2, 1, 0]
    assert list(journal.starting_with(head_of("id", "c"))) == []


def test_a_disk_that_is_full_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, write = Journal(tmp_path), os.write
    journal.append(encode({"id": "a"}))
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    with pytest.raises(ResourceError, match="No space left"):
        journal.append(encode({"id": "b"}))
    monkeypatch.undo()
    journal.append(encode({"id": "c"}))
    assert ids(journal) == ["a", "c"]


def test_several_processes_write_and_killed_ones_lose_nothing_of_the_others(tmp_path: Path) -> None:
    writers = [start(tmp_path, name, 300) for name in ("x", "y")]
    victim = start(tmp_path, "z", 1_000_000)
    codes = [writer.wait(60) for writer in writers]
    victim.send_signal(signal.SIGKILL)
    victim.wait(60)
    for each in (*writers, victim):
        assert each.stdout is not None
        each.stdout.close()
    assert codes == [0, 0]
    journal = Journal(tmp_path, max_file_bytes=1 << 16)
    journal.append(encode({"id": "after"}))
    lines = list(journal.lines())
    found = [line.entry["id"] for line in lines if isinstance(line, Line)]
    assert len(lines) - len(found) <= 1  # the line it died in
    for name in ("x", "y"):
        assert [each for each in found if each.startswith(name)] == [f"{name}-{k}" for k in range(300)]
    z = [each for each in found if each.startswith("z")]
    assert z == [f"z-{k}" for k in range(len(z))]
    assert found.count("after") == 1
