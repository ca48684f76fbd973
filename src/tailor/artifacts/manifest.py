"""`tailor.json` and what is read from it: the artifact as other code knows it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from tailor.artifacts.files import ADAPTER_CONFIG, read_peft
from tailor.errors import ConfigError, DamageError, NotFoundError, nearest
from tailor.techniques import Technique, TechniqueList

MANIFEST = "tailor.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """A customization on disk. `manifest` is `tailor.json`; a plain PEFT folder gets one made up on reading.

    `task`: this is one task of a prompt table, and what `tailor.json` says of it.
    """

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    task: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of a prompt table; none for other artifacts, and for one task of a table."""
        return tuple(self.manifest.get("tasks", ()))

    def of_task(self, task: str | None) -> Artifact:
        """One task of a prompt table as an artifact of its own; None is the only one, or what is no table.

        Raises NotFoundError for a task that is not there, and ConfigError when one of several must be named.
        """
        if task is None and len(self.tasks) > 1:
            raise ConfigError(
                f"{self.name} holds {len(self.tasks)} tasks", hint=f"name one with --task: {', '.join(self.tasks)}"
            )
        if not self.tasks:
            if task not in (None, self.task):
                raise NotFoundError(f"{self.name} has no task {task!r}: it is no prompt table of several tasks")
            return self
        task = self.tasks[0] if task is None else task
        if task not in self.tasks:
            raise NotFoundError(f"{self.name} has no task {task!r}", hint=nearest(task, self.tasks))
        shared = {key: value for key, value in self.manifest.items() if key != "tasks"}
        return replace(self, manifest={**shared, **self.manifest["tasks"][task]}, task=task)

    @property
    def techniques(self) -> tuple[Technique, ...]:
        """The techniques, with the settings they were trained with; none of a model that was tuned elsewhere."""
        found = self.manifest["techniques"]
        return TypeAdapter(TechniqueList).validate_python(found) if found else ()

    @property
    def kind(self) -> str:
        """The techniques' names joined by +, each once in a prompt table; "hosted" for a model tuned elsewhere."""
        if kind := self.manifest.get("kind"):
            return str(kind)
        kinds = [technique["type"] for technique in self.manifest["techniques"]]
        return "+".join(dict.fromkeys(kinds) if self.tasks else kinds)

    @property
    def is_base(self) -> bool:
        """Whether the folder is a model of its own (full, merged) rather than something to attach to one."""
        return (self.folder / "config.json").is_file()

    @property
    def base_name(self) -> str:
        """What to load: the base it was made on, or the folder itself when it is one."""
        return str(self.folder) if self.is_base else str(self.manifest["base"]["name"])


def read(folder: Path) -> Artifact:
    """The artifact in a folder that holds a `tailor.json`. Raises DamageError, and FileNotFoundError without one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        artifact = Artifact(str(manifest["name"]), folder, manifest)
        if not isinstance(manifest["base"], dict) or not isinstance(artifact.kind, str):
            raise TypeError("'base' is no object")
        if created := manifest.get("created"):
            datetime.datetime.fromisoformat(created)
        return artifact
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{folder / MANIFEST}: not an artifact's manifest: {error}") from None


def foreign(folder: Path) -> Artifact:
    """A PEFT folder as an artifact. Raises as `read_peft`."""
    technique, _ = read_peft(folder)
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    base = {"name": config.get("base_model_name_or_path") or "", "fingerprint": ""}
    manifest = {"name": folder.name, "techniques": [technique.model_dump(mode="json")], "base": base}
    return Artifact(folder.name, folder, manifest)
