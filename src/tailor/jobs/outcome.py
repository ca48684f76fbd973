"""What a job's process came to, as the files it left say: its output, its run folder, its artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.errors import InterruptedRunError, TailorError, TerminatedRunError
from tailor.jobs.process import Process
from tailor.runs import Run, home

STOPPED = (InterruptedRunError.code, TerminatedRunError.code)
"""Codes of a process that was asked to stop and has saved its checkpoint."""


@dataclass(frozen=True)
class Outcome:
    """Either a `result` (the artifact's facts) or an `error` (code, message, hint)."""

    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None


def outcome_of(process: Process, name: str) -> Outcome | None:
    """What became of the job called `name` in a process that is gone; None when it was stopped or killed."""
    error = (_last_object(process.stderr) or {}).get("error")
    told = _told(_last_object(process.stdout), name)
    if told is not None:
        return told
    if error is not None and error["code"] not in STOPPED:
        return Outcome(error=error)
    return _on_disk(name)


def run_of(name: str) -> Run | None:
    """The latest run of a job: names of jobs are given once, so whatever is called so is its."""
    runs = [Run(path.parent) for path in (home() / "runs").glob(f"{name}-*/run.json")]
    return max(runs, key=lambda run: str(run.manifest["created"]), default=None)


def discard(name: str) -> None:
    """Remove the artifact of a job that was cancelled at its last moment, and its checkpoints."""
    for folder in (home() / "artifacts" / name, *(home() / "artifacts").glob(f"{name}-step-*")):
        if folder.is_dir():
            shutil.rmtree(folder)


def _told(said: Mapping[str, Any] | None, name: str) -> Outcome | None:
    """The outcome that the command printed, for one recipe or for several."""
    if said is None:
        return None
    mine = next((run for run in said.get("runs", [said]) if run.get("name", run.get("artifact")) == name), None)
    if mine is None:
        return None
    return Outcome(error=mine["error"]) if mine.get("status") == "failed" else _checked(mine)


def _on_disk(name: str) -> Outcome | None:
    """The outcome of a process that was killed between finishing its work and saying so."""
    run = run_of(name)
    if run is None or run.manifest["status"] != "finished":
        return None
    from tailor.artifacts import artifact as artifacts

    try:
        return _checked(artifacts.find(name).manifest)
    except TailorError:
        return None


def _checked(facts: Mapping[str, Any]) -> Outcome:
    if (facts.get("parity") or {}).get("passed") is False:
        message = "the trained model is saved, but it does not answer as it did in training"
        return Outcome(error={"code": "quality", "message": message, "hint": None})
    return Outcome(result=facts)


def _last_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file's last line, if that is one."""
    try:
        lines = path.read_bytes().strip().splitlines()
        found = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
