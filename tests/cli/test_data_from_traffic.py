"""`tailor data from-traffic`: recorded chats become a file that `tailor data check` accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recorded_chats import told
from tailor.cli.main import run
from tailor.feedback.feedback import Feedback, FeedbackLog
from tailor.feedback.traffic import open_traffic

DAY = 1_772_323_200
"""2026-03-01 in seconds since 1970."""


@pytest.fixture
def recorded(own_home: Path) -> Path:
    traffic, log = open_traffic(), FeedbackLog()
    for number in range(30):
        chat_id = f"chatcmpl-{number}"
        traffic.record(
            told(chat_id, f"How is {number}?", f"It is {number}", f"Number {number}", at=DAY + 3600 * number)
        )
        log.add(Feedback(chat_id, "vote", "ann", "key-1", preferred=number % 2))
        scores = {"helpfulness": number % 5, "correctness": 3, "coherence": 4}
        log.add(Feedback(chat_id, "rating", "ann", "key-1", attributes=scores))
    return own_home


@pytest.mark.parametrize(
    ("kind", "options", "num_rows", "format"),
    [
        ("sft", ["--all", "--min-rating", "1"], 30, "openai_chat"),
        ("preference", [], 30, "preference"),
        ("rated", [], 30, "helpsteer"),
    ],
)
def test_what_is_written_is_accepted(
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    options: list[str],
    num_rows: int,
    format: str,
) -> None:
    file = tmp_path / "rows.jsonl"
    assert run(["data", "from-traffic", "--kind", kind, *options, "-o", str(file), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["num_rows"], out["num_exchanges"], out["damaged"]) == (num_rows, 30, [])
    written = file.read_bytes()
    assert run(["data", "check", str(file), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    assert checked["file"]["format"] == format
    assert checked["file"]["num_rows"] == num_rows
    assert run(["data", "from-traffic", "--kind", kind, *options, "-o", str(file)]) == 8
    assert run(["data", "from-traffic", "--kind", kind, *options, "-o", str(file), "--force"]) == 0
    assert file.read_bytes() == written


def test_times_are_days_or_moments(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def count(*options: str) -> int:
        command = ["data", "from-traffic", "-o", str(tmp_path / "rows.jsonl"), "--force", "--json", *options]
        assert run(command) == 0
        return int(json.loads(capsys.readouterr().out)["num_exchanges"])

    assert count("--since", "2026-03-02") == 6
    assert count("--until", "2026-03-01") == 24
    assert count("--since", "2026-03-01T02:00", "--until", "2026-03-01T04:00:00+00:00") == 2
    assert run(["data", "from-traffic", "-o", str(tmp_path / "x.jsonl"), "--since", "yesterday"]) == 2
    assert run(["data", "from-traffic", "-o", str(tmp_path / "x.jsonl"), "--kind", "stf"]) == 2


def test_what_is_left_out_and_damaged_is_told(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = (recorded / "traffic").glob("*.jsonl")
    with file.open("a") as torn:
        torn.write('{"id":')
    assert run(["data", "from-traffic", "-o", str(tmp_path / "rows.jsonl"), "--model", "moods"]) == 0
    told_to = capsys.readouterr()
    assert f"damaged: {file}:31: not JSON" in told_to.err
    assert "30 rows of 30 chats (sft)" in told_to.out
    assert "left out: 30 another answer was preferred" in told_to.out
    assert ", and 24 more" in told_to.out
    assert run(["data", "from-traffic", "-o", str(tmp_path / "no.jsonl"), "--model", "mood"]) == 6
    assert "did you mean 'moods'" in capsys.readouterr().err


def test_nothing_to_write_is_an_error_with_a_way_on(
    own_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "from-traffic", "-o", str(tmp_path / "rows.jsonl")]
    assert run(command) == 4
    assert "tailor serve --record" in capsys.readouterr().err
    open_traffic().record(told("a", "q", "x"))
    assert run(command) == 4
    told_to = capsys.readouterr().err
    assert "1 nobody said that it is good" in told_to
    assert "--all" in told_to
    assert not (tmp_path / "rows.jsonl").exists()
    assert run([*command, "--all"]) == 0
