"""benchmarks/startup.py: what ends a measurement, and what is told of it. No time is asserted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def startup() -> ModuleType:
    import startup

    return startup


def test_a_program_is_timed_to_its_end(startup: ModuleType, tmp_path: Path) -> None:
    seconds, cpu = startup.timed([sys.executable, "-c", "open('here', 'w')"], tmp_path, "")
    assert (tmp_path / "here").exists()
    assert cpu > 0
    assert seconds > 0


def test_a_program_with_a_log_is_killed_when_a_line_is_whole(startup: ModuleType, tmp_path: Path) -> None:
    script = (
        "import pathlib, time\n"
        "file = open(pathlib.Path('runs'), 'w')\n"
        "file.write('{\"step\": 1'); file.flush(); time.sleep(0.2); pathlib.Path('half').touch()\n"
        "file.write('}\\n'); file.flush(); time.sleep(60); pathlib.Path('end').touch()\n"
    )
    startup.timed([sys.executable, "-c", script], tmp_path, "ru*s")
    assert (tmp_path / "half").exists()
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize(("script", "log"), [("raise SystemExit('no luck')", ""), ("print('no luck')", "steps")])
def test_one_that_fails_or_never_logs_is_no_measurement(
    startup: ModuleType, tmp_path: Path, script: str, log: str
) -> None:
    with pytest.raises(SystemExit, match="no luck"):
        startup.timed([sys.executable, "-c", script], tmp_path, log)


def test_medians_goals_and_ratios(startup: ModuleType) -> None:
    ours = startup.Start("ours", ["a"], limit=2.0, beside="theirs", seconds=[1.0, 9.0, 3.0], cpu=[0.5, 0.5, 2.0])
    theirs = startup.Start("theirs", ["b"], seconds=[6.0], cpu=[2.0])
    _, first, second = startup.report([ours, theirs])
    assert "3.000    0.500   < 2 s: NOT met;  theirs takes 2.00 × the wall clock, 4.00 × the CPU" in first
    assert second.split() == ["theirs", "6.000", "2.000"]


def test_the_goals_stand_for_programs_that_are_there(startup: ModuleType) -> None:
    found = {start.name: start for start in startup.starts()}
    assert found["tailor --help"].limit == 0.3
    assert found["tailor tune, first step"].limit == 6.0
    assert all(Path(start.command[0]).exists() for start in found.values())
    compile(startup.PEER, "peer", "exec")
