"""benchmarks/concurrent_training.py: together is exact, ratios are of pairs, the program runs. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tailor.techniques import TECHNIQUES


@pytest.fixture
def program() -> ModuleType:
    import concurrent_training

    return concurrent_training


def test_together_is_exact(program: ModuleType) -> None:
    assert program.largest_difference("mixed", 8) <= program.EXACT


def test_a_slot_is_the_same_whoever_is_beside_it(program: ModuleType) -> None:
    case = program.Case(program.TINY["b"], "tiny", "one", "mixed", (0, 1, 6))
    runs = program.make_trainer(case).runs
    (alone,) = program.make_trainer(program.replace(case, places=(6,))).runs
    assert [run.slot.lowest_layer for run in runs] == [0, -1, 1]
    assert [len(run.draw()) for run in runs] == [1, 1, 1]
    assert runs[2].train == alone.train
    assert all(runs[2].slot.parameters[name].equal(tensor) for name, tensor in alone.slot.parameters.items())
    assert set(program.MIXED) <= set(TECHNIQUES)


def test_ratios_are_medians_of_pairs(program: ModuleType) -> None:
    one = program.Measured("nano", "one", "lora", 1, 5, together=[1.0, 1.0], alone=[1.0, 2.0])
    two = program.Measured("nano", "one", "lora", 2, 5, together=[3.0, 2.0], alone=[6.0, 2.0])
    assert two.ratios == [0.5, 1.0]
    assert "0.75" in two.line()
    assert program.over_one([one, two]) == [
        {"base": "nano", "rows": "one", "techniques": "lora", "slots": 2, "over_one": 2.5}
    ]


@pytest.mark.usefixtures("own_home")
def test_a_tiny_run(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # the program sets them; afterwards they are as before
    output = tmp_path / "found.json"
    options = ["--tiny", "--bases", "nano", "--rows", "one", "--techniques", "lora", "--slots", "2"]
    run = ["--repeats", "2", "--seconds", "0", "--threads", "1", "--output", str(output)]
    assert program.main([*options, *run]) == 0
    found = json.loads(output.read_text("utf-8"))
    (measured,) = found["runs"]
    assert len(measured["together"]) == len(measured["alone"]) == 2
    assert measured["peak_together"] > measured["loaded"] > 0
    assert "nano   lora   one       2" in capsys.readouterr().out
