"""benchmarks/serve_beside_job.py: one short run of all settings, and its sums. No time is asserted."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tailor.jobs.worker import WorkerSettings


@pytest.fixture
def tally() -> ModuleType:
    return importlib.import_module("beside_tally")


def phase(tally: ModuleType, kind: str, **values: Any) -> Any:
    return tally.Phase(kind, **{"seconds": 2.0, "counted": dict.fromkeys(tally.COUNTED, 0), **values})


def answer(**more: Any) -> Any:
    usage = {"prompt_tokens": 7, "completion_tokens": 5}
    whole = {"status": 200, "done": True, "finish_reason": "length", "usage": usage, "num_chunks": 4}
    times = {"asked_at": 10.5, "first_at": 11.0, "last_at": 13.0}
    return importlib.import_module("load_client").Answer(**{**whole, **times, **more})


def test_times_count_from_when_a_request_was_due(tally: ModuleType) -> None:
    one = phase(tally, "idle")
    one.take(answer(), 10.0)
    assert (one.first, one.each) == ([1.0], [0.5])
    assert (one.asked, one.answered, one.prompt_tokens, one.generated_tokens) == (1, 1, 7, 5)


@pytest.mark.parametrize("short", [{"done": False}, {"finish_reason": None}, {"usage": None}, {"num_chunks": 1}])
def test_an_answer_that_did_not_come_whole_is_missing(tally: ModuleType, short: dict[str, Any]) -> None:
    one = phase(tally, "idle")
    one.take(answer(failure="cut", **short), 10.0)
    assert (one.answered, one.first, one.failures) == (0, [], ["200: cut"])
    assert one.wrong() == ["idle: 1 of 1 answers did not come whole: 200: cut"]


def test_the_server_counts_what_the_clients_saw(tally: ModuleType) -> None:
    one = phase(tally, "beside", counted={"finished": 1, "failed": 0, "prompt_tokens": 7, "generated_tokens": 5})
    one.take(answer(), 10.0)
    assert one.wrong() == []
    one.counted |= {"failed": 1, "generated_tokens": 6}
    assert one.wrong() == [
        "beside: failed: the server counted 1, the clients 0",
        "beside: generated_tokens: the server counted 6, the clients 5",
    ]


def test_ratios_are_those_of_pairs(tally: ModuleType) -> None:
    """Beside over idle: 2, 3 and 8 in the three pairs; the machine was slower in each."""
    firsts = {"idle": [1.0, 10.0, 100.0], "beside": [2.0, 30.0, 800.0]}
    phases = {
        kind: [
            phase(tally, kind, first=[one], each=[one], generated_tokens=8 if kind == "idle" else 6, steps=steps)
            for one, steps in zip(firsts.get(kind, [0.0] * 3), (2, 4, 8), strict=True)
        ]
        for kind in tally.KINDS
    }
    phases["alone"][1].steps = 8
    told = tally.facts(phases)
    assert told["seconds_to_first_token"]["ratio"]["p95"] == {"median": 3.0, "least": 2.0, "greatest": 8.0}
    assert told["seconds_to_first_token"]["idle"] == {"p50": 10.0, "p95": 100.0, "p99": 100.0}
    assert told["tokens_per_second"] == {
        "idle": 4.0,
        "beside": 3.0,
        "ratio": dict.fromkeys(("median", "least", "greatest"), 0.75),
    }
    assert told["steps_per_second"]["ratio"] == {"median": 1.0, "least": 0.5, "greatest": 1.0}
    lines = tally.table({"default": told})
    assert "1e+04 / 1e+05 / 1e+05" in lines[1]
    assert "3.00 / 3.00 / 3.00   p95: 2.00 to 8.00" in lines[1]
    assert lines[4].split() == ["default", "steps", "a", "second", "4", "2", "1.00", "0.50", "to", "1.00"]


def test_a_job_without_a_step_has_no_ratio(tally: ModuleType) -> None:
    told = tally.facts({kind: [phase(tally, kind, first=[1.0], each=[1.0])] for kind in tally.KINDS})
    assert told["steps_per_second"]["ratio"] == dict.fromkeys(("median", "least", "greatest"))
    assert tally.table({"none": told})[4].split()[-4:] == ["–", "–", "to", "–"]


def test_percentiles_are_of_the_nearest_rank(tally: ModuleType) -> None:
    assert [tally.percentile(range(1, 101), p) for p in (50, 95, 99)] == [50, 95, 99]
    assert [tally.percentile([3.0, 1.0], p) for p in (50, 51, 99)] == [1.0, 3.0, 3.0]
    assert math.isnan(tally.percentile([], 50))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_quick_run(tally: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, output = importlib.import_module("serve_beside_job"), tmp_path / "found.json"
    sizes = ["--seconds", "1", "--rate", "3", "--tokens", "6"]
    assert program.main(["--quick", "--settings", "default", "strictest", *sizes, "--output", str(output)]) == 0
    found = json.loads(output.read_text("utf-8"))
    assert found["asked"]["pairs"] == program.QUICK["pairs"]
    assert {name: told["claim"] for name, told in found["settings"].items()} == {
        "default": {"niceness": 19, "idle": False, "threads": WorkerSettings().threads()},
        "strictest": {"niceness": 19, "idle": True, "threads": 1},
    }
    for told in found["settings"].values():
        assert told["wrong"] == []
        assert [one["kind"] for one in told["phases"]] == list(tally.KINDS)
        idle, beside, alone = told["phases"]
        for one in (idle, beside):
            assert (one["asked"], one["answered"], one["generated_tokens"]) == (3, 3, 18)
            assert one["counted"] == {
                "finished": 3,
                "failed": 0,
                "prompt_tokens": one["prompt_tokens"],
                "generated_tokens": 18,
            }
            assert len(one["first"]) == len(one["each"]) == 3
        assert (idle["steps"], alone["asked"], alone["counted"]["finished"]) == (0, 0, 0)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 * 2
