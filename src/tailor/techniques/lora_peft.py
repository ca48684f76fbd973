"""PEFT's `LORA` files: what their settings mean for each layer, and which of them we do not honour."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from tailor.errors import ConfigError
from tailor.techniques.technique import PEFT_PREFIX, refuse_settings

Number = TypeVar("Number", int, float)

# PEFT settings that change the result; anything but these values is refused on import
_NEUTRAL = {
    "use_qalora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "megatron_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# the other starts of PEFT (pissa, olora, corda, loftq, lora_ga) rewrite the base's weights when the adapter is loaded
_STARTS_BESIDE_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

MAGNITUDE = "lora_magnitude_vector"


def read_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of `LoRA`, and its state; the targets are those the tensors name, not the config's patterns.

    Raises ConfigError for settings that we do not honour, tensors of another kind, and ranks that the config belies.
    """
    refuse_settings(config, _NEUTRAL)
    if (start := config.get("init_lora_weights")) not in _STARTS_BESIDE_THE_BASE:
        raise ConfigError(
            f"this PEFT adapter sets init_lora_weights={start!r}: it belongs to weights that start has changed",
            hint="save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    dora = bool(config.get("use_dora"))
    state = _state(tensors, dora)
    modules = tuple(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in state))
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    ranks = _by_peft_pattern(modules, config.get("rank_pattern") or {}, rank)
    alphas = _by_peft_pattern(modules, config.get("alpha_pattern") or {}, alpha)
    for name in modules:
        for key, side in ((f"{name}.lora_A.weight", 0), (f"{name}.lora_B.weight", 1)):
            if key in state and state[key].shape[side] != ranks[name]:
                raise ConfigError(f"{key} has rank {state[key].shape[side]}, its config says {ranks[name]}")
    settings = {
        "rank": rank,
        "alpha": alpha,
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": bool(config.get("use_rslora")),
        "dora": dora,
        "target_modules": modules,
        "rank_pattern": by_end(ranks, rank),
        "alpha_pattern": by_end(alphas, alpha),
    }
    return settings, state


def _state(tensors: Mapping[str, Tensor], dora: bool) -> dict[str, Tensor]:
    state = {}
    for key, tensor in tensors.items():
        name = re.sub(r"\.default(?=\.|$)", "", key.removeprefix(PEFT_PREFIX))
        name = re.sub(rf"\.{MAGNITUDE}\.weight$", f".{MAGNITUDE}", name)
        ours = re.search(rf"\.(lora_[AB]\.weight|{MAGNITUDE})$" if dora else r"\.lora_[AB]\.weight$", name)
        if not key.startswith(PEFT_PREFIX) or not ours:
            kind = "DoRA" if dora else "plain LoRA"
            raise ConfigError(f"tensor {key!r} is not part of a {kind} adapter", hint="was it renamed on saving?")
        state[name] = tensor
    if not state:
        raise ConfigError("this LoRA adapter holds no tensors: it would change nothing")
    return state


def _by_peft_pattern(names: Sequence[str], patterns: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Each module's number as PEFT finds it: of the first pattern that matches the name's whole dotted end."""
    try:
        whole = {re.compile(rf"(.*\.)?({pattern})$"): number for pattern, number in patterns.items()}
    except re.error as error:
        raise ConfigError(f"a pattern of this PEFT adapter is no regular expression: {error}") from None
    return {name: next((n for pattern, n in whole.items() if pattern.match(name)), default) for name in names}


def by_end(numbers: Mapping[str, Number], default: Number) -> dict[str, Number]:
    """Patterns, for PEFT and for us, that give each module its number: ends of names where they suffice."""
    values: dict[str, set[Number]] = {}
    for name, number in numbers.items():
        values.setdefault(name.rpartition(".")[2], set()).add(number)
    alike = {end for end, found in values.items() if len(found) == 1}
    ends = {name: name.rpartition(".")[2] for name in numbers}
    return {ends[n] if ends[n] in alike else n: number for n, number in numbers.items() if number != default}


def shortest(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """The last parts of the names (what servers read) when they select exactly the targets, else the full names."""
    ends = sorted({name.rpartition(".")[2] for name in targets})
    selected = [name for name in names if name.rpartition(".")[2] in ends]
    return ends if sorted(selected) == sorted(targets) else sorted(targets)
