"""`prompt_table.safetensors`: the virtual tokens of many tasks in one file, a tensor each, added one by one.

A task is added by writing the file anew with the other tensors' bytes as they are. What only trains (a prompt encoder)
stands beside it in `training_state.safetensors`, its tensors' names behind the task's: `sentiment/prompt_encoder…`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tailor.techniques import Technique
from tailor.techniques.soft_prompt import SoftPrompt

PROMPT_TABLE = "prompt_table.safetensors"


def in_table(technique: Technique) -> bool:
    """Whether its tokens go into a prompt table: those of a named task, and those that PEFT could not place."""
    return isinstance(technique, SoftPrompt) and bool(technique.task or technique.template)


def is_table(techniques: Sequence[Technique]) -> bool:
    """Whether these are the tasks of one prompt table, to which others can be added."""
    return bool(techniques) and all(isinstance(t, SoftPrompt) and t.task for t in techniques)


def key_of(technique: Technique) -> str:
    """The task's key in the table."""
    assert isinstance(technique, SoftPrompt)
    return technique.task or technique.table_name


def read_tokens(path: Path, technique: Technique) -> dict[str, Tensor]:
    """The slot state of one task; the others' tensors are not read."""
    from safetensors import safe_open

    assert isinstance(technique, SoftPrompt)
    with safe_open(path, "pt") as file:
        return {technique.table_name: file.get_tensor(key_of(technique))}


def without(path: Path, tasks: Sequence[str], *, prefixed: bool = False) -> dict[str, Tensor]:
    """The tensors of a file that are not those tasks' own; nothing when there is no such file."""
    from safetensors.torch import load_file

    if not path.is_file():
        return {}
    return {k: t for k, t in load_file(path).items() if (k.partition("/")[0] if prefixed else k) not in tasks}


def named(task: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A training state with its task in front of every name."""
    return {f"{task}/{name}": tensor for name, tensor in state.items()}


def unnamed(task: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a training state that is one task's, by the slot's own names."""
    return {name.removeprefix(f"{task}/"): t for name, t in state.items() if name.startswith(f"{task}/")}
