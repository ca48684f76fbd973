"""benchmarks/shared_prefixes.py: sharing stores less and changes nothing, ratios are of pairs. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def program() -> ModuleType:
    import shared_prefixes

    return shared_prefixes


@pytest.mark.parametrize("technique", ["lora", "prompt_tuning"])
def test_sharing_is_exact(program: ModuleType, technique: str) -> None:
    found = program.differences(technique, instruction=24, num_virtual_tokens=3)
    assert max(found.values()) <= program.EXACT


def test_the_instruction_stands_before_every_row_and_does_not_count(program: ModuleType, tmp_path: Path) -> None:
    files = program.write_files(program.TINY["b"], 2, 5, tmp_path)
    alone, behind = ([json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files)
    assert len(alone) == len(behind) == 2 * program.TINY["b"].batch_size
    assert len({tuple(row["token_ids"][:5]) for row in behind}) == 1
    assert [row["token_ids"][5:] for row in behind] == [row["token_ids"] for row in alone]
    assert [row["loss_mask"] for row in behind] == [[0] * 5 + row["loss_mask"] for row in alone]


def test_ratios_are_medians_of_pairs(program: ModuleType) -> None:
    cases = []
    for case, seconds, stored in (("alone", [1, 2, 4], 10), ("shared", [2, 2, 8], 20), ("unshared", [8, 4, 16], 80)):
        one = program.Measured("b", "lora", case, loaded=1.0, losses=[3.0, 2.0])
        for k, value in enumerate(seconds):
            said = {"seconds": 2.0 * value, "losses": [1.0], "peak": 10.0 * (k + 1), "stored": 2 * stored, "batches": 2}
            one.add(said, tokens=20, num_steps=2)
        cases.append(one)
    cases[1].losses[2] = 1.5
    found = program.summarise(*cases)
    assert found["speed_over_unshared"] == [4, 2, 2]
    assert found["stored_over_unshared"] == 0.25
    assert found["seconds_over_alone"] == {"shared": [2, 1, 2], "unshared": [8, 2, 4]}
    assert found["loss_difference"] == 0.5
    assert cases[0].speed == 5
    assert "speed x2.00 (4.00 2.00 2.00)" in program.told(found, "float32")


@pytest.mark.usefixtures("own_home")
def test_a_tiny_run(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # the program sets them; afterwards they are as before
    output = tmp_path / "found.json"
    options = ["--tiny", "--techniques", "lora", "--repeats", "2", "--threads", "1", "--output", str(output)]
    assert program.main(options) == 0
    found = json.loads(output.read_text("utf-8"))
    alone, shared, unshared = found["runs"]
    assert [one["case"] for one in found["runs"]] == list(program.CASES)
    for k, own in enumerate(alone["tokens"]):
        assert alone["stored"][k] == own
        assert shared["stored"][k] == own + 300
        assert unshared["stored"][k] == own + 300 * program.TINY["b"].batch_size
    assert found["summaries"][0]["loss_difference"] < 1e-5
    assert len(shared["losses"]) == program.WARMUP + 2
    assert "lora           not shared" in capsys.readouterr().out
