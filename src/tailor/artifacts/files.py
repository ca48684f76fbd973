"""The files of an artifact: PEFT's layout where PEFT has one, `prompt.json`, a prompt table, or a Hugging Face folder.

One technique stands in the artifact's own folder, and so do the tasks of a prompt table; several techniques stand in
`part-0-<type>/`, `part-1-<type>/`, each complete.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailor.artifacts.prompt_table import PROMPT_TABLE, in_table, is_table, key_of, read_tokens
from tailor.errors import ConfigError, DamageError, DataError, NotFoundError, TailorError
from tailor.models.base import Base
from tailor.models.linear import merged
from tailor.models.nf4 import nf4_layers
from tailor.models.slots import Slot
from tailor.store import write_json, writing
from tailor.techniques import TECHNIQUES, Technique
from tailor.techniques.technique import PeftFiles

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROMPT = "prompt.json"
WEIGHTS = "weights.safetensors"
TRAINING_STATE = "training_state.safetensors"
"""What training goes on from where it differs from what answers (a prompt encoder)."""

PEFT_TYPES = {kind: technique for technique in TECHNIQUES.values() for kind in technique.peft_types}
"""Which of our techniques reads a PEFT adapter of this type."""


def write_techniques(folder: Path, techniques: Sequence[Technique], slot: Slot, base: Base) -> None:
    """Write every technique's files into `folder` (or its parts)."""
    tables: dict[Path, dict[str, Tensor]] = {}
    for number, technique in enumerate(techniques):
        part = _part(folder, techniques, number)
        part.mkdir(exist_ok=True)
        if in_table(technique):
            (tokens,) = slot.state(of=technique).values()
            tables.setdefault(part / PROMPT_TABLE, {})[key_of(technique)] = tokens
        elif technique.beyond_peft() is None:
            write_peft(part, technique.to_peft(slot), base)
        elif slot.owns_base and not technique.traits.frozen_base:
            write_model(part, base, {})
        elif state := slot.state(of=technique):
            write_state(part / WEIGHTS, state)
        else:
            write_json(part / PROMPT, technique.model_dump(mode="json"))
    for path, tensors in tables.items():
        write_state(path, tensors)


def _part(folder: Path, techniques: Sequence[Technique], number: int) -> Path:
    """Where one of several techniques has its files."""
    alone = len(techniques) == 1 or is_table(techniques)
    return folder if alone else folder / f"part-{number}-{techniques[number].type}"


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Named tensors as safetensors."""
    from safetensors.torch import save_file

    with writing(path):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file."""
    from safetensors.torch import load_file

    return load_file(path)


def write_peft(folder: Path, files: PeftFiles, base: Base) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, as PEFT and the servers that load it expect them."""
    config, tensors = files
    write_json(folder / ADAPTER_CONFIG, {"base_model_name_or_path": base.name, **config})
    write_state(folder / ADAPTER_WEIGHTS, tensors)


def read_peft(folder: Path) -> tuple[Technique, dict[str, Tensor]]:
    """The technique and slot state of a PEFT folder, ours or anybody's. Raises by name for what we do not honour."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise NotFoundError(
            f"{folder} holds no {ADAPTER_WEIGHTS}",
            hint="pickled weights are not read; save as safetensors" if pickled else None,
        )
    try:
        config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / ADAPTER_CONFIG}: {error}") from None
    kind = PEFT_TYPES.get(str(config.get("peft_type")))
    if kind is None:
        raise ConfigError(
            f"{folder}: PEFT adapters of type {config.get('peft_type')} are not supported",
            hint=f"known: {', '.join(PEFT_TYPES)}",
        )
    return kind.from_peft(config, load_tensors(folder / ADAPTER_WEIGHTS))


@contextmanager
def damage_told(name: str, folder: Path) -> Iterator[None]:
    """Raise DamageError with the artifact's name and folder for whatever goes wrong in reading its files."""
    try:
        yield
    except TailorError:
        raise
    except Exception as error:
        raise DamageError(f"the files of artifact {name!r} in {folder} are damaged: {error}") from error


def read_state(folder: Path, techniques: Sequence[Technique]) -> dict[str, Tensor]:
    """The slot state of an artifact's techniques, parts united."""
    state: dict[str, Tensor] = {}
    for number, technique in enumerate(techniques):
        part = _part(folder, techniques, number)
        if in_table(technique):
            state |= read_tokens(part / PROMPT_TABLE, technique)
        elif (part / ADAPTER_CONFIG).is_file():
            state |= read_peft(part)[1]
        elif (part / WEIGHTS).is_file():
            state |= load_tensors(part / WEIGHTS)
    return state


def write_model(folder: Path, base: Base, changes: Mapping[str, Tensor]) -> None:
    """A Hugging Face folder of the base's weights with some replaced, and its tokenizer; no trace of wrappers.

    Those of a quantised base are written dequantised: onto them a merge is exact.
    """
    from transformers import AutoModelForCausalLM

    weights = {re.sub(r"\.base\.(?=[^.]+$)", ".", name): p.detach() for name, p in base.model.named_parameters()}
    weights |= {f"{n}.weight": q.weight for n, q in nf4_layers(base.model).items() if f"{n}.weight" not in changes}
    weights |= changes
    config = copy.deepcopy(base.config)  # from_config writes its attention into the config it is given
    with torch.device("meta"):  # no second copy of the weights: the tensors at hand are put in
        stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=base.dtype)
    missing, unexpected = stock.load_state_dict(weights, strict=False, assign=True)
    tied = set(getattr(stock, "all_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied - {n for n, _ in stock.named_buffers()}:
        raise ConfigError(f"the weights do not fit the architecture: {sorted([*missing, *unexpected])[:3]}")
    stock.tie_weights()
    if stock.generation_config is not None and base.model.generation_config is not None:
        stock.generation_config = base.model.generation_config
    with writing(folder):
        stock.save_pretrained(folder)
    base.tokenizer.hf.save_pretrained(folder)
    if base.folder != Path():
        copy_tokenizer(base.folder, folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files as they are: re-saving through a library may change them."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "chat_template*", "*.model", "vocab.*", "merges.txt"):
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def merged_weights(base: Base, slot: Slot) -> dict[str, Tensor]:
    """W' and b' of every touched layer, computed in fp32 (or wider) and rounded once to the base's dtype."""
    changed = {}
    for name, deltas in slot.deltas.items():
        wrapper = base.host.wrap_linear(name)
        weight = wrapper.weight.detach()
        with torch.no_grad():
            new, bias = merged(weight.t() if wrapper.transposed else weight, wrapper.bias, deltas)
        changed[f"{name}.weight"] = (new.t() if wrapper.transposed else new).to(weight.dtype)
        if bias is not None and wrapper.bias is not None:
            changed[f"{name}.bias"] = bias.to(wrapper.bias.dtype)
    return changed
