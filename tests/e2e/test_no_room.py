"""A disk that has no room, or a limit on files: said in one line, and what was saved before is there to go on from."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tailor.artifacts.files import load_tensors, write_state
from tailor.runs import Run
from tailor.store import writing

TAILOR = (sys.executable, "-c", "from tailor.cli.main import main; main()")
ROWS = [{"prompt": f"Is {n} even?", "completion": "no" if n % 2 else "yes"} for n in range(12)]
SETTINGS = ("train.num_steps=3", "train.batch_size=4", "train.checkpoint_every=1", "output.verify=false")


def tailor(*arguments: str, most_bytes: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """The command, which may write files of so many bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    program = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[2])))"
    )
    limited = (sys.executable, "-c", f"{program}; os.execv(sys.argv[3], sys.argv[3:])", str(most_bytes), str(hard))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*limited, *TAILOR, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_a_run_without_room_says_so_and_goes_on_later(own_home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = ("tune", str(rows), "--name", "mine", "--quiet", "--json", *SETTINGS)
    stopped = tailor(*asked, most_bytes=200_000)
    assert stopped.returncode == 5, stopped.stderr
    told = json.loads(stopped.stderr.splitlines()[-1])["error"]
    assert (told["code"], "File too large" in told["message"]) == ("storage_full", True)
    assert "Traceback" not in stopped.stderr
    run = Run.open("mine")
    assert run.manifest["status"] == "failed"
    assert [line["step"] for line in run.metrics()] == [1]
    assert not (own_home / "artifacts").exists() or not any((own_home / "artifacts").iterdir())
    assert [path.name for path in run.folder.glob(".*.tmp")] == []  # no halves are left
    resumed = tailor("resume", "mine", "--quiet", "--json")
    assert resumed.returncode == 0, resumed.stderr
    whole = tailor(*("whole" if part == "mine" else part for part in asked))
    assert whole.returncode == 0, whole.stderr
    weights = [own_home / "artifacts" / name / "adapter_model.safetensors" for name in ("mine", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_a_library_says_of_the_system_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as error, writing(tmp_path / "x"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))
    with pytest.raises(RuntimeError, match="something else"), writing(tmp_path):
        raise RuntimeError("something else")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as plain:
        write_state(tmp_path / "file" / "w.safetensors", {"a": torch.zeros(2)})
    assert plain.value.filename == str(tmp_path / "file" / "w.safetensors")
    write_state(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    assert torch.equal(load_tensors(tmp_path / "w.safetensors")["a"], torch.ones(2))
