"""IA3: trained vectors that scale keys, values and inner feed-forward activations. Liu et al. 2022, arXiv:2205.05638.

    K' = l_k ⊙ K        V' = l_v ⊙ V        down(l_ff ⊙ act(…))        all ones at first      (section 3.3)

Keys and values are scaled as the projections give them, biases included: before norms of keys and rotary positions,
as in NeMo and PEFT. Where query, key and value come from one fused projection, its queries are left alone. The experts
of a mixture are no linear layers of their own: there l_k and l_v are trained, and l_ff is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tailor.errors import ConfigError
from tailor.models.linear import LinearDelta, Terms, is_conv1d, linear_sizes
from tailor.models.placement import Part, Placement
from tailor.models.slots import Slot, layer_of, match_names
from tailor.techniques.technique import PEFT_PREFIX, Defaults, PeftFiles, Technique, Traits, refuse_settings

Scaled = Part | Literal["input"]
"""What of a linear layer is scaled: its output, the keys and values in its fused output, or its input."""

SCALE = "ia3_l"

# PEFT settings that change the result; anything but these values is refused on import
_NEUTRAL = {"modules_to_save": None, "bias": "none"}


class IA3(Technique):
    """Scales of keys, values and feed-forward activations; the fewest parameters of all; merges into the base."""

    type: Literal["ia3"] = "ia3"
    target_layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="decoder layers by index; all when not given"
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="name patterns of linear layers to scale whole, such as [k_proj, v_proj, down_proj]; "
        "keys, values and inner activations when not given",
    )
    feedforward_modules: tuple[str, ...] = Field(
        (), description="those of target_modules whose input is scaled, not their output, such as [down_proj]"
    )

    traits: ClassVar[Traits] = Traits(
        trains="l_k, l_v, l_ff per layer",
        where="key and value projections, inner feed-forward",
        formula="l_k ⊙ K, l_v ⊙ V, down(l_ff ⊙ act(…))",
        source="Liu et al. 2022, arXiv:2205.05638, section 3.3",
        frozen_base=True,
        merges=True,
        mixes=True,
        peft=True,
        rows=(50, 200),
        defaults=Defaults(learning_rate=1e-1, num_epochs=5, min_steps=80, max_steps=2000),
    )

    peft_types: ClassVar[tuple[str, ...]] = ("IA3",)

    @model_validator(mode="after")
    def _inputs_are_of_targets(self) -> Self:
        if self.feedforward_modules and self.target_modules is None:
            raise ValueError("feedforward_modules says how some of target_modules are scaled: give both")
        return self

    def targets(self, slot: Slot) -> dict[str, Scaled]:
        """The linear layers that are scaled, and what of each. Raises ConfigError when a pattern or layer is absent."""
        layers = set(slot.host.layer_numbers(self.target_layers))
        names = [name for name in slot.host.linear_names() if layer_of(name) in layers]
        if self.target_modules is not None:
            return self._named(names, self.target_modules, slot.host.placement)
        placement = slot.host.placement
        found: dict[str, Scaled] = dict.fromkeys(match_names(names, placement.feedforward, "linear layer"), "input")
        for end, part in placement.ia3_targets:
            found |= dict.fromkeys(match_names(names, (end,), "linear layer"), part)
        return {name: found[name] for name in names if name in found}

    def _named(self, names: Sequence[str], patterns: Sequence[str], placement: Placement) -> dict[str, Scaled]:
        """Of the names those that the patterns match, as in PEFT."""
        try:
            chosen = match_names(names, patterns, "linear layer")
            inputs = match_names(names, self.feedforward_modules, "linear layer")
        except ConfigError as error:
            if placement.feedforward:
                raise
            reason = f"the feed-forward layers of a base of type {placement.model_type!r} belong to its experts"
            raise ConfigError(f"{error.message}: {reason}, which IA3 leaves alone", hint=error.hint) from None
        if stray := [name for name in inputs if name not in chosen]:
            raise ConfigError(
                f"feedforward_modules names {stray[0]}, which target_modules does not",
                hint="target_modules lists every layer that is scaled",
            )
        return {name: "input" if name in inputs else "all" for name in chosen}

    def attach(self, slot: Slot) -> None:
        """Put a scale on every target. All are ones, so the slot starts as the base."""
        for name, scaled in self.targets(slot).items():
            size_in, size_out = linear_sizes(slot.host.model.get_submodule(name))
            if scaled in ("all", "input"):
                ones = torch.ones(size_in if scaled == "input" else size_out)
                parameter = slot.new_parameter(f"{name}.{SCALE}", ones)
                slot.add_delta(name, LinearDelta.of(_terms(parameter, scaled)))
            else:
                slot.add_delta(name, LinearDelta(self._fused(slot, name, scaled, size_out)))

    def _fused(self, slot: Slot, name: str, part: Scaled, size: int) -> Callable[[], Terms]:
        """Of a fused projection: l_k and l_v while they train, and the scale of the whole output that they come to."""
        num = _num_keys(slot)
        baked = slot.add_baked(
            f"{name}.{SCALE}",
            (size,),
            lambda: {f"{name}.l_k": torch.ones(num), f"{name}.l_v": torch.ones(num)},
            lambda own: _laid_out(own[f"{name}.l_k"], own[f"{name}.l_v"], part, slot, size),
        )
        return lambda: _terms(baked(), part)

    def to_peft(self, slot: Slot) -> PeftFiles:
        """PEFT's `IA3` files: of a fused projection the scale of its whole output, 1 at the queries."""
        targets = self.targets(slot)
        tensors = {}
        for name, scaled in targets.items():
            if (vector := slot.parameters.get(f"{name}.{SCALE}")) is None:
                size = linear_sizes(slot.host.model.get_submodule(name))[1]
                own = slot.parameters
                vector = _laid_out(own[f"{name}.l_k"], own[f"{name}.l_v"], scaled, slot, size)  # type: ignore[assignment]
            shape = (1, -1) if scaled == "input" else (-1, 1)
            tensors[f"{PEFT_PREFIX}{name}.{SCALE}"] = vector.detach().cpu().clone().view(shape)  # type: ignore[union-attr]
        inputs = [name for name, scaled in targets.items() if scaled == "input"]
        modules, feedforward = _peft_names(list(targets), inputs, slot.host.linear_names())
        config = {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "target_modules": modules,
            "feedforward_modules": feedforward,
            "fan_in_fan_out": any(is_conv1d(slot.host.wrap_linear(name).base) for name in targets),
            "inference_mode": True,
        }
        return config, tensors

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """Reads what PEFT saved as `IA3`; the targets are those the tensors name, and their shapes say what is scaled.

        (out, 1) scales a layer's output and (1, in) its input.
        """
        refuse_settings(config, _NEUTRAL)
        state, inputs = {}, []
        for key, tensor in tensors.items():
            name = re.sub(rf"\.{SCALE}\.default$", f".{SCALE}", key.removeprefix(PEFT_PREFIX))
            if not key.startswith(PEFT_PREFIX) or not name.endswith(f".{SCALE}"):
                raise ConfigError(f"tensor {key!r} is not part of an IA3 adapter", hint="was it renamed on saving?")
            if tensor.dim() != 2 or 1 not in tensor.shape:
                raise ConfigError(f"tensor {key!r} has shape {tuple(tensor.shape)}; IA3's are (out, 1) or (1, in)")
            state[name] = tensor.reshape(-1)
            if tensor.shape[0] == 1:
                inputs.append(name.removesuffix(f".{SCALE}"))
        if not state:
            raise ConfigError("this IA3 adapter holds no tensors: it would change nothing")
        modules = tuple(name.removesuffix(f".{SCALE}") for name in state)
        return cls(target_modules=modules, feedforward_modules=tuple(inputs)), state


def _terms(vector: Tensor, scaled: Scaled) -> Terms:
    if scaled == "input":
        return Terms(input_scale=vector)
    return Terms(output_scale=vector, scales_bias=True)


def _num_keys(slot: Slot) -> int:
    """Numbers in a token's keys, all heads together; its values have as many."""
    _, heads, size = slot.host.kv_shape
    return heads * size


def _laid_out(keys: Tensor, values: Tensor, part: Scaled, slot: Slot, size: int) -> Tensor:
    """(size,) scale of a fused output: ones for the queries, `keys` and `values` where those stand."""
    queries = keys.new_ones(size - len(keys) - len(values))
    if part == "query|key|value":
        return torch.cat([queries, keys, values])
    heads = slot.host.kv_shape[1]
    return torch.cat([each.view(heads, -1) for each in (queries, keys, values)], dim=1).reshape(-1)


def _peft_names(targets: Sequence[str], inputs: Sequence[str], every: Sequence[str]) -> tuple[list[str], list[str]]:
    """PEFT's target_modules and feedforward_modules: last parts of names where they say the same, else full names."""
    ends, input_ends = ({name.rpartition(".")[2] for name in names} for names in (targets, inputs))
    selected = [name for name in every if name.rpartition(".")[2] in ends]
    # PEFT compares the ends of names without regard to dots
    as_inputs = [name for name in targets if name.endswith(tuple(input_ends))]
    if sorted(selected) == sorted(targets) and sorted(as_inputs) == sorted(inputs):
        return sorted(ends), sorted(input_ends)
    return sorted(targets), sorted(inputs)
