"""LoRA: low-rank updates of linear layers, and its variants. Hu et al. 2021, arXiv:2106.09685.

W' = W + c · B A        c = alpha / rank, A: (rank, in) random, B: (out, rank) zero                      (section 4.1)

rsLoRA (Kalajdzievski 2023, arXiv:2312.03732): c = alpha / √rank.
DoRA (Liu et al. 2024, arXiv:2402.09353): W' = m ⊙ (W + c · B A) / |W + c · B A|, norms of rows; m starts as W's.
PiSSA (Meng et al. 2024, arXiv:2404.02948): A₀ and B₀ are W's leading singular vectors. PiSSA takes c · B₀ A₀ out of W;
here W is everybody's, so W' = W + c · (B A − B₀ A₀).
LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns faster than A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tailor.errors import ConfigError, nearest
from tailor.models.linear import LinearDelta, Terms, is_conv1d, linear_sizes, weight_of
from tailor.models.slots import Slot, layer_of, match_names, matches
from tailor.techniques.lora_peft import MAGNITUDE, by_end, read_lora, shortest
from tailor.techniques.low_rank import Start, dora_terms, leading, squared_row_norms, started
from tailor.techniques.technique import PEFT_PREFIX, Defaults, PeftFiles, Technique, Traits

Number = TypeVar("Number", int, float)

Factors = tuple[Callable[[], Tensor], Callable[[], Tensor]]
"""What gives A and B."""


class LoRA(Technique):
    """Low-rank updates of linear layers; merges into the base."""

    type: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1, description="rank of the update: its capacity and its size")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the update's input, in training only")
    target_modules: Literal["query-value", "query-key-value", "all-linear"] | tuple[str, ...] = Field(
        "all-linear",
        description="query-value (as in the paper), query-key-value, all-linear, or name patterns such as "
        "[q_proj, down_proj]",
    )
    target_layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="decoder layers by index; all when not given"
    )
    exclude_modules: tuple[str, ...] = Field((), description="name patterns of targets to leave out")
    rslora: bool = Field(False, description="rsLoRA: scale by alpha / √rank, so that large ranks learn as well")
    dora: bool = Field(False, description="DoRA: also learn the length of every row of the weight; slower")
    init: Literal["random", "pissa"] = Field(
        "random", description="start from init_a and init_b, or from the weight's leading singular vectors (PiSSA)"
    )
    init_a: Start = Field("kaiming", description="how A starts; gaussian is PEFT's, xavier and normal are NeMo's")
    init_b: Literal["zero", "xavier", "normal"] = Field(
        "zero", description="how B starts; unless it or A is zero, the start is not the base"
    )
    lora_plus_ratio: float = Field(1.0, gt=0, description="LoRA+: B's learning rate is this many times A's, e.g. 16")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="other ranks by name pattern, e.g. {down_proj: 4}; the first that matches"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="other alphas by name pattern; the first that matches"
    )

    traits: ClassVar[Traits] = Traits(
        trains="B·A · alpha/rank per target",
        where="linear layers",
        formula="W x + c · B A x, c = alpha / rank; rsLoRA: c = alpha / √rank; "
        "DoRA: m ⊙ (W + c · B A) x / |W + c · B A|; PiSSA: W x + c · (B A − B₀ A₀) x",
        source="Hu et al. 2021, arXiv:2106.09685, section 4.1; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; "
        "DoRA: Liu et al. 2024, arXiv:2402.09353; PiSSA: Meng et al. 2024, arXiv:2404.02948; "
        "LoRA+: Hayou et al. 2024, arXiv:2402.12354",
        frozen_base=True,
        merges=True,
        mixes=True,
        peft=True,
        rows=(50, 200),
        defaults=Defaults(learning_rate=3e-3, num_epochs=5, min_steps=80, max_steps=2000),
    )

    peft_types: ClassVar[tuple[str, ...]] = ("LORA",)
    alternatives: ClassVar[tuple[Mapping[str, Any], ...]] = ({"init": "pissa"}, {"dora": True})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rank": (4, 8, 16, 32)}

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.init_a == "zero" and self.init_b == "zero":
            raise ValueError("init_a and init_b are both zero: neither would ever get a gradient")
        if self.init == "pissa":
            if self.init_a != "kaiming" or self.init_b != "zero":
                raise ValueError("init_a and init_b have no effect with init: pissa, which says how both start")
            if self.lora_plus_ratio != 1:
                raise ValueError(
                    "lora_plus_ratio is for a start where one of A and B is zero; with init: pissa they start alike"
                )
        return self

    def targets(self, slot: Slot) -> list[str]:
        """Names of the linear layers this LoRA sits on. Raises ConfigError when a pattern or a layer matches none."""
        names = slot.host.linear_names()
        if self.target_layers is not None:
            layers = slot.host.layer_numbers(self.target_layers)
            names = [name for name in names if layer_of(name) in layers]
        if self.target_modules != "all-linear":
            names = match_names(names, self._patterns(slot), "linear layer")
        for pattern in self.exclude_modules:
            if not any(matches(name, pattern) for name in names):
                raise _matches_none("exclude_modules", pattern, names)
        names = [name for name in names if not any(matches(name, pattern) for pattern in self.exclude_modules)]
        if not names:
            raise ConfigError("this LoRA has no target: target_modules is empty, or exclude_modules takes all of them")
        return names

    def _patterns(self, slot: Slot) -> Sequence[str]:
        placement = slot.host.placement
        if self.target_modules == "query-value":
            return placement.lora_targets
        if self.target_modules == "query-key-value":
            return tuple(dict.fromkeys([*placement.lora_targets, *(name for name, _ in placement.ia3_targets)]))
        return self.target_modules

    def attach(self, slot: Slot) -> None:
        """Put B·A on every target. Unless init_a and init_b say otherwise, the slot starts as the base."""
        names = self.targets(slot)
        ranks = _by_pattern("rank_pattern", names, self.rank_pattern, self.rank)
        alphas = _by_pattern("alpha_pattern", names, self.alpha_pattern, self.alpha)
        for name in names:
            scale = alphas[name] / self._divisor(ranks[name])
            factors = self._factors(slot, name, ranks[name], scale)
            slot.add_delta(name, LinearDelta(self._terms(slot, name, factors, scale), self.dropout))

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rslora else rank

    def _factors(self, slot: Slot, name: str, rank: int, scale: float) -> Factors:
        """A and B of one target, as parameters or computed from them."""
        module = slot.host.model.get_submodule(name)
        size_in, size_out = linear_sizes(module)
        keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        if self.init == "pissa":
            if rank > min(size_in, size_out):
                raise ConfigError(f"init: pissa takes singular vectors, and {name} has {min(size_in, size_out)} only")
            return _from_singular_vectors(slot, keys, module, rank, scale)
        a_start = started(self.init_a, (rank, size_in), slot.generator(name))
        b_start = started(self.init_b, (size_out, rank), slot.generator(f"{name}/B"))
        a = slot.new_parameter(keys[0], a_start)
        b = slot.new_parameter(keys[1], b_start, rate=self.lora_plus_ratio)
        return (lambda: a), (lambda: b)

    def _terms(self, slot: Slot, name: str, factors: Factors, scale: float) -> Callable[[], Terms]:
        """What changes one target in a pass."""
        a, b = factors
        if not self.dora:
            return lambda: Terms(a(), b(), scale)
        module = slot.host.model.get_submodule(name)
        squared = slot.constant(squared_row_norms(weight_of(module)))
        own = [parameter for key, parameter in slot.parameters.items() if key.startswith(f"{name}.")]
        magnitude = slot.new_parameter(f"{name}.{MAGNITUDE}", squared.sqrt())
        return slot.derived(
            lambda: dora_terms(Terms(a(), b(), scale), weight_of(module), squared, magnitude), *own, magnitude
        )

    def to_peft(self, slot: Slot) -> PeftFiles:
        """PEFT's `LORA` files. PiSSA, which PEFT has as a start that rewrites the base, is a LoRA of twice the rank."""
        assert slot.baked or self.init != "pissa", "bake the slot first: until then A₀ and B₀ are not in its state"
        state = slot.state(of=self)
        targets = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in state))
        twice = 2 if self.init == "pissa" else 1
        ranks = _by_pattern("rank_pattern", targets, self.rank_pattern, self.rank)
        alphas = _by_pattern("alpha_pattern", targets, self.alpha_pattern, self.alpha)
        wider = self._divisor(twice)  # what keeps the scale at `twice` the rank
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": twice * self.rank,
            "lora_alpha": wider * self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "rank_pattern": by_end({n: twice * rank for n, rank in ranks.items()}, twice * self.rank),
            "alpha_pattern": by_end({n: wider * alpha for n, alpha in alphas.items()}, wider * self.alpha),
            "target_modules": shortest(targets, slot.host.linear_names()),
            "fan_in_fan_out": any(is_conv1d(slot.host.wrap_linear(n).base) for n in targets),
            "bias": "none",
            "inference_mode": True,
        }
        return config, {PEFT_PREFIX + name: tensor for name, tensor in state.items()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """Reads what PEFT saved as `LORA`; the targets are those the tensors name, not the config's patterns."""
        settings, state = read_lora(config, tensors)
        return cls(**settings), state


def _from_singular_vectors(slot: Slot, keys: tuple[str, str], module: nn.Module, rank: int, scale: float) -> Factors:
    """[A; A − A₀] and [B − B₀, B₀], whose product is B A − B₀ A₀ and exactly zero at the start.

    Of rank 2r, so that what remains after training is a plain LoRA and knows nothing of singular vectors. While they
    train A and B have names of their own: a plain LoRA of rank r that began with them would be something else.
    """
    size_in, size_out = linear_sizes(module)
    a_key, b_key = (key.replace(".lora_", ".pissa_") for key in keys)
    a0, b0 = torch.empty(0), torch.empty(0)
    if not slot.baked:
        a0, b0 = (slot.constant(factor / math.sqrt(scale)) for factor in leading(weight_of(module), rank))
    a = slot.add_baked(
        keys[0],
        (2 * rank, size_in),
        lambda: {a_key: a0},
        lambda trained: torch.cat([trained[a_key], trained[a_key] - a0]),
    )
    b = slot.add_baked(
        keys[1],
        (size_out, 2 * rank),
        lambda: {b_key: b0},
        lambda trained: torch.cat([trained[b_key] - b0, b0], dim=1),
    )
    return a, b


def _by_pattern(
    setting: str, names: Sequence[str], patterns: Mapping[str, Number], default: Number
) -> dict[str, Number]:
    """Each target's number: of the first pattern that matches. Raises ConfigError for one that decides nothing."""
    found: dict[str, Number] = {}
    for pattern, number in patterns.items():
        hits = [name for name in names if matches(name, pattern)]
        if not hits:
            raise _matches_none(setting, pattern, names)
        if all(name in found for name in hits):
            raise ConfigError(f"{setting}: {pattern!r} has no effect, patterns before it take every layer it matches")
        found = {**dict.fromkeys(hits, number), **found}
    return {name: found.get(name, default) for name in names}


def _matches_none(setting: str, pattern: str, names: Sequence[str]) -> ConfigError:
    ends = sorted({name.rpartition(".")[2] for name in names})
    return ConfigError(f"{setting}: {pattern!r} matches none of this LoRA's targets", hint=nearest(pattern, ends))
