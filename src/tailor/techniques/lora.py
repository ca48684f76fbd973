"""LoRA: low-rank updates of linear layers. Hu et al. 2021, arXiv:2106.09685.

W' = W + (alpha / rank) · B A        A: (rank, in) Kaiming-uniform, B: (out, rank) zero      (section 4.1)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from tailor.errors import ConfigError
from tailor.models.linear import LinearDelta, Terms, is_conv1d, linear_sizes
from tailor.models.slots import Slot, match_names
from tailor.techniques.technique import PEFT_PREFIX, Defaults, PeftFiles, Technique, Traits, refuse_settings

# PEFT settings that change the result; anything but these values is refused on import
_NEUTRAL = {
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
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


class LoRA(Technique):
    """Low-rank updates of linear layers; merges into the base."""

    type: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="rank of the update: its capacity and its size")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the update's input, in training only")
    target_modules: Literal["query-value", "all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="query-value (as in the paper), all-linear, or name patterns such as [q_proj, down_proj]",
    )
    target_layers: tuple[int, ...] | None = Field(None, description="decoder layers by index; all when not given")

    traits: ClassVar[Traits] = Traits(
        trains="B·A · alpha/rank per target",
        where="linear layers",
        formula="W x + (alpha / rank) · B A x",
        source="Hu et al. 2021, arXiv:2106.09685, section 4.1",
        frozen_base=True,
        merges=True,
        mixes=True,
        peft=True,
        rows=(50, 200),
        defaults=Defaults(learning_rate=3e-3, num_epochs=5, min_steps=80, max_steps=2000),
    )

    peft_types: ClassVar[tuple[str, ...]] = ("LORA",)

    def targets(self, slot: Slot) -> list[str]:
        """Names of the linear layers this LoRA sits on. Raises ConfigError when a pattern or a layer matches none."""
        names = slot.host.linear_names()
        if self.target_layers is not None:
            names = _in_layers(names, self.target_layers)
        if self.target_modules == "all-linear":
            return names
        patterns = self.target_modules
        if patterns == "query-value":
            patterns = slot.host.placement.lora_targets
        return match_names(names, patterns, "linear layer")

    def attach(self, slot: Slot) -> None:
        """Put B·A on every target; B is zero, so the slot starts as the base."""
        for name in self.targets(slot):
            size_in, size_out = linear_sizes(slot.host.model.get_submodule(name))
            bound = 1.0 / math.sqrt(size_in)  # kaiming_uniform with a = sqrt(5), as in the authors' code and PEFT
            start = torch.rand(self.rank, size_in, generator=slot.generator(name)) * (2 * bound) - bound
            a = slot.new_parameter(f"{name}.lora_A.weight", start)
            b = slot.new_parameter(f"{name}.lora_B.weight", torch.zeros(size_out, self.rank))
            slot.add_delta(name, LinearDelta.of(Terms(a, b, self.alpha / self.rank), self.dropout))

    def to_peft(self, slot: Slot) -> PeftFiles:
        """PEFT's `LORA` files."""
        targets = list(slot.deltas)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": _shortest(targets, slot.host.linear_names()),
            "fan_in_fan_out": any(is_conv1d(slot.host.wrap_linear(n).base) for n in targets),
            "bias": "none",
            "inference_mode": True,
        }
        state = {k: v for k, v in slot.state().items() if ".lora_" in k}
        return config, {PEFT_PREFIX + name: tensor for name, tensor in state.items()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """Reads what PEFT saved as `LORA`; the targets are those the tensors name, not the config's patterns."""
        refuse_settings(config, _NEUTRAL)
        if (start := config.get("init_lora_weights")) not in _STARTS_BESIDE_THE_BASE:
            raise ConfigError(
                f"this PEFT adapter sets init_lora_weights={start!r}: it belongs to weights that start has changed",
                hint="save it as a plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        state = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PEFT_PREFIX).replace(".default.", ".")
            if not key.startswith(PEFT_PREFIX) or not re.search(r"\.lora_[AB]\.weight$", name):
                raise ConfigError(
                    f"tensor {key!r} is not part of a plain LoRA adapter", hint="was it renamed on saving?"
                )
            state[name] = tensor
        if not state:
            raise ConfigError("this LoRA adapter holds no tensors: it would change nothing")
        modules = tuple(dict.fromkeys(name.rsplit(".lora_", 1)[0] for name in state))
        technique = cls(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=modules,
        )
        return technique, state


def _in_layers(names: Sequence[str], layers: Sequence[int]) -> list[str]:
    numbered = {name: int(match[1]) for name in names if (match := re.search(r"\.(\d+)\.", name))}
    absent = sorted(set(layers) - set(numbered.values()))
    if absent:
        raise ConfigError(f"target_layers: there is no layer {absent[0]}; layers are 0 to {max(numbered.values())}")
    return [name for name in names if numbered[name] in set(layers)]


def _shortest(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """The last parts of the names (what servers read) when they select exactly the targets, else the full names."""
    ends = sorted({name.rpartition(".")[2] for name in targets})
    selected = [name for name in names if name.rpartition(".")[2] in ends]
    return ends if sorted(selected) == sorted(targets) else sorted(targets)
