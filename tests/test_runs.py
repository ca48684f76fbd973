from __future__ import annotations

import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError
from tailor.runs import Run, home, list_runs

pytestmark = pytest.mark.usefixtures("own_home")


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert home() == tmp_path / "home"
    monkeypatch.delenv("TAILOR_HOME")
    monkeypatch.chdir(tmp_path)
    assert home() == tmp_path / ".tailor"


def test_create_writes_recipe_and_manifest(own_home: Path) -> None:
    run = Run.create("tickets", "data: x\n", {"num_threads": 2, "name": "not this"})
    assert run.folder.parent == own_home / "runs"
    assert run.name.startswith("tickets-2")
    assert (run.folder / "recipe.yaml").read_text() == "data: x\n"
    manifest = run.manifest
    assert (manifest["name"], manifest["status"], manifest["num_threads"]) == ("tickets", "running", 2)
    assert manifest["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(manifest["versions"]) == {"python", "tailor", "torch", "transformers"}
    assert [path.name for path in run.folder.parent.iterdir()] == [run.name]
    run.set_status("finished", best_step=7)
    assert (run.manifest["status"], run.manifest["best_step"], run.manifest["num_threads"]) == ("finished", 7, 2)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-rf", "a b", "ü", "x" * 101])
def test_names_that_are_no_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a run"):
        Run.create(name, "", {})


def test_runs_of_one_second_get_folders_of_their_own() -> None:
    runs = [Run.create("a", "", {}) for _ in range(12)]
    assert len({run.folder for run in runs}) == 12
    assert [run.name for run in list_runs()] == [run.name for run in reversed(runs)]
    assert Run.open("a").folder == runs[-1].folder
    assert Run.open(runs[3].name).folder == runs[3].folder
    assert Run.open(runs[4].folder).folder == runs[4].folder


def test_open_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there are none"):
        Run.open("tickets")
    Run.create("tickets", "", {})
    Run.create("tickets-2", "", {})
    with pytest.raises(NotFoundError, match=r"no run 'tickts' .*did you mean 'tickets'\?"):
        Run.open("tickts")


def test_a_damaged_manifest_is_named() -> None:
    run = Run.create("a", "", {})
    for text in ("{", "[]", "{}"):
        (run.folder / "run.json").write_text(text)
        with pytest.raises(DataError, match=r"run\.json: not"):
            Run.open("a")


def test_metrics_come_back_exactly() -> None:
    run = Run.create("a", "", {})
    assert run.metrics() == []
    run.log(1, loss=0.1 + 0.2, slot="lora", nested={"lr": [1e-5]})
    run.log(2, loss=np.float32(0.5), rows=np.int64(3))
    assert run.metrics() == [
        {"step": 1, "loss": 0.1 + 0.2, "slot": "lora", "nested": {"lr": [1e-5]}},
        {"step": 2, "loss": 0.5, "rows": 3},
    ]


def test_metrics_since_an_earlier_look() -> None:
    run = Run.create("tickets", "", {})
    path = run.folder / "metrics.jsonl"
    run.log(1, loss=2.0)
    seen = path.stat().st_size
    assert run.metrics(seen) == []
    run.log(2, loss=1.0)
    assert run.metrics(seen) == [{"step": 2, "loss": 1.0}]
    assert [line["step"] for line in run.metrics(seen - 1)] == [1, 2], "no line begins there"
    path.write_bytes(path.read_bytes() + b"damaged\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:3"):
        run.metrics(seen)
    path.write_bytes(b"")
    run.log(1, loss=3.0)
    assert [line["loss"] for line in run.metrics(10 * seen)] == [3.0], "written anew"


def test_a_diverged_loss_is_logged_in_strict_json() -> None:
    run = Run.create("a", "", {})
    run.log(1, loss=math.nan, norm=math.inf, low=[-math.inf])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((run.folder / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = run.metrics()
    assert math.isnan(row["loss"])
    assert (row["norm"], row["low"]) == (math.inf, [-math.inf])


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3, "loss": 1.0}'])
def test_truncate_after_a_kill(torn: str) -> None:
    run = Run.create("a", "", {})
    for step in (1, 2):
        run.log(step, loss=step / 3)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write(torn)
    again = Run.open("a")
    assert [row["step"] for row in again.metrics()][:2] == [1, 2]
    again.truncate(1)
    again.log(2, loss=9.0)
    assert again.metrics() == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 9.0}]


def test_log_does_not_grow_on_a_torn_line() -> None:
    run = Run.create("a", "", {})
    run.log(1, loss=1.0)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    Run.open("a").log(2, loss=2.0)
    assert run.metrics() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("bad", ["nonsense", "{}", "[1]", '{"step": "1"}', "\xff"])
def test_a_damaged_line_in_the_middle_is_not_dropped(bad: str) -> None:
    run = Run.create("a", "", {})
    (run.folder / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + bad.encode("latin-1") + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a line of metrics"):
        run.truncate(1)


def test_one_holder_at_a_time() -> None:
    run = Run.create("a", "", {})
    with run.lock(), pytest.raises(ConflictError, match=f"in use by process {os.getpid()}"), Run.open("a").lock():
        pytest.fail("two holders")
    with run.lock():
        pass


def test_the_lock_of_a_killed_process_is_stale() -> None:
    run = Run.create("a", "", {})
    script = """
import sys, time
from tailor.runs import Run
with Run.open('a').lock():
    print(1, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(ConflictError, match=f"process {process.pid}"), run.lock():
            pytest.fail("two holders")
        process.send_signal(signal.SIGKILL)
    with run.lock():
        pass


def test_nothing_is_lost_by_kill_9() -> None:
    run = Run.create("a", "", {})
    script = """
from tailor.runs import Run
run = Run.open('a')
step = 0
while True:
    step += 1
    run.log(step, loss=step / 7)
"""
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        while len(run.metrics()) < 50 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    rows = run.metrics()
    assert rows == [{"step": step, "loss": step / 7} for step in range(1, len(rows) + 1)]
    assert len(rows) >= 50


def test_torch_is_not_imported_for_its_version() -> None:
    script = """
import sys, tailor.config
from tailor.runs import Run
Run.create('a', '', {})
assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
