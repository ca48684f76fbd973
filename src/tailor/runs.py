"""Run folders: the recipe, the manifest and `metrics.jsonl` of one training run, safe to kill at any moment."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError, nearest
from tailor.store import write_json, write_text

Status = Literal["running", "finished", "interrupted", "failed"]


def home() -> Path:
    """Where everything lives: TAILOR_HOME, else ./.tailor; absolute."""
    return Path(os.environ.get("TAILOR_HOME") or ".tailor").expanduser().absolute()


class Run:
    """One run folder: `recipe.yaml`, `run.json` (the manifest) and `metrics.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole = False  # does metrics.jsonl end in a newline?

    @classmethod
    def create(cls, name: str, recipe_text: str, manifest: Mapping[str, Any]) -> Run:
        """Make `<home>/runs/<name>-<YYYYMMDD-HHMMSS>[-n]/` with status running.

        `manifest` is what the caller knows (`num_threads`, hashes); name, times, status and versions are added.
        Raises ConfigError when the name cannot be a folder.
        """
        check_run_name(name)
        now = datetime.datetime.now(datetime.UTC)
        parent = home() / "runs"
        draft = parent / f".{secrets.token_hex(4)}.tmp"
        draft.mkdir(parents=True)
        write_text(draft / "recipe.yaml", recipe_text)
        write_text(draft / "metrics.jsonl", "")
        facts = {"name": name, "status": "running", "created": now.isoformat(), "versions": versions()}
        write_json(draft / "run.json", {**manifest, **facts})
        stem = f"{name}-{now.astimezone():%Y%m%d-%H%M%S}"
        folder, n = parent / stem, 1
        while True:  # a rename onto a folder with files fails, so two processes never share one
            try:
                draft.rename(folder)
                return cls(folder)
            except OSError:
                if not folder.exists():
                    raise
                n += 1
                folder = parent / f"{stem}-{n}"

    @classmethod
    def open(cls, name_or_path: str | Path) -> Run:
        """A run by its folder, its full name, or a bare name (the latest with it). Raises NotFoundError."""
        path = Path(name_or_path).expanduser()
        for folder in (path, home() / "runs" / path):
            if (folder / "run.json").is_file():
                return cls(folder.absolute())
        runs = list_runs()
        for run in runs:
            if run.manifest["name"] == str(name_or_path):
                return run
        known = dict.fromkeys([run.manifest["name"] for run in runs])
        raise NotFoundError(f"no run {str(name_or_path)!r} in {home() / 'runs'} ({nearest(str(name_or_path), known)})")

    @property
    def name(self) -> str:
        """The folder's name: unlike the bare name in the manifest, it is unique."""
        return self.folder.name

    @property
    def manifest(self) -> dict[str, Any]:
        """What `run.json` says now. Raises DataError when it is damaged."""
        path = self.folder / "run.json"
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: not JSON: {error}") from None
        if not isinstance(manifest, dict) or not {"name", "status", "created"} <= manifest.keys():
            raise DataError(f"{path}: not the manifest of a run (name, status and created are missing)")
        return manifest

    def set_status(self, status: Status, **facts: Any) -> None:
        """Record how the run stands, and any facts worth keeping beside it (`best_step=120`)."""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        write_json(self.folder / "run.json", {**self.manifest, **facts, "status": status, "updated": now})

    def log(self, step: int, **values: Any) -> None:
        """Append one line to `metrics.jsonl` and hand it to the system, so that it survives a kill."""
        if not self._whole:
            self._drop_torn_line()
        line = json.dumps(_to_json({"step": step, **values}), allow_nan=False)
        with open(self._metrics, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def metrics(self, start: int = 0) -> list[dict[str, Any]]:
        """All logged lines, oldest first. A last line torn by a kill is left out; any other bad line is a DataError.

        `start` is the byte where an earlier look ended: only newer lines, unless the file has been written anew.
        """
        return [row for _, row in self._lines(start)]

    def truncate(self, step: int) -> None:
        """Forget what was logged after `step`, in one atomic replacement: a resumed run logs it again."""
        write_text(self._metrics, "".join(f"{line}\n" for line, row in self._lines() if row["step"] <= step))
        self._whole = True

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run: raises ConflictError while another holder lives."""
        with hold(self.folder, f"run {self.name}"):
            yield

    @property
    def _metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _lines(self, start: int = 0) -> list[tuple[str, dict[str, Any]]]:
        if not self._metrics.exists():
            return []
        data = self._metrics.read_bytes()
        start = start if data[start - 1 : start] == b"\n" else 0
        first = data.count(b"\n", 0, start) + 1
        *lines, tail = data[start:].split(b"\n")
        rows = []
        for number, line in enumerate([*lines, tail] if tail else lines, start=first):
            try:
                row = json.loads(line)
                if not isinstance(row["step"], int):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                if number == first + len(lines):
                    break  # torn: the process died while writing it
                raise DataError(f"{self._metrics}:{number}: not a line of metrics") from None
            rows.append((line.decode("utf-8"), _from_json(row)))
        return rows

    def _drop_torn_line(self) -> None:
        if self._metrics.exists() and self._metrics.read_bytes()[-1:] not in (b"", b"\n"):
            write_text(self._metrics, "".join(f"{line}\n" for line, _ in self._lines()))
        self._whole = True


def check_run_name(name: str) -> str:
    """A name that can be a folder's. Raises ConfigError for others."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(
            f"{name!r} cannot name a run: use up to 100 of a-z A-Z 0-9 . _ - and begin with one of a-z A-Z 0-9"
        )
    return name


@contextlib.contextmanager
def hold(folder: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder (made if need be) while the block runs; the system lets go when a process dies.

    Raises ConflictError while another process holds it, unless it is to `wait`; `what` is what people call it.
    """
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise ConflictError(
                f"{what} is in use" + (f" by process {holder}" if holder else ""),
                hint="wait for it, or stop that process first",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def list_runs() -> list[Run]:
    """All runs under the home, newest first."""
    runs = [Run(path.parent) for path in (home() / "runs").glob("*/run.json") if not path.parent.name.startswith(".")]
    return sorted(runs, key=lambda run: str(run.manifest["created"]), reverse=True)


def versions() -> dict[str, str]:
    """Of Python and the packages that decide results; from their metadata: importing torch to ask takes seconds."""
    versions = {"python": platform.python_version()}
    for name, distribution in (("tailor", "tailor-llm"), ("torch", "torch"), ("transformers", "transformers")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(distribution)
    return versions


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: Any) -> Any:
    """Strict JSON has no NaN, and a diverged loss must still be logged: it is written as text."""
    if isinstance(value, Mapping):
        return {key: _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner) for inner in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
