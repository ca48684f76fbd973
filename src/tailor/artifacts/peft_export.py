"""The PEFT files of an artifact on their way to other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

from tailor.artifacts.artifact import Artifact
from tailor.artifacts.files import write_peft
from tailor.artifacts.prompt_table import in_table
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.slots import Slot


def copy_peft(artifact: Artifact, slot: Slot, base: Base, folder: Path) -> None:
    """Copy the artifact's PEFT files alone, or write those of a prompt table's task.

    Raises ConfigError for what PEFT has no files for.
    """
    kinds = artifact.techniques
    if len(kinds) != 1:
        merges = all(technique.traits.merges for technique in kinds)
        hint = "export it as a merged model (--format hf)" if merges else "serve it as it is"
        raise ConfigError(f"{artifact.name}: PEFT has no files for a combination of techniques", hint=hint)
    if reason := kinds[0].beyond_peft():
        raise ConfigError(f"{artifact.name} cannot be exported for PEFT: {reason}")
    if in_table(kinds[0]):
        write_peft(folder, kinds[0].to_peft(slot), base)
    for path in artifact.folder.glob("adapter_*"):
        shutil.copyfile(path, folder / path.name)
