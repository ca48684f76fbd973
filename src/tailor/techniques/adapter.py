"""Bottleneck adapters: two small layers with a nonlinearity between them, added to the output of a block.

H hidden size, m bottleneck_size; out (t, H) is what the block gives, x what it is added from:

    out + scale · up(act(down(norm(x))))        down: (m, H), up: (H, m)        x = out: sequential, Houlsby et al. 2019
                                                (arXiv:1902.00751, section 2.1); x = the block's input: parallel, He et
                                                al. 2022 (arXiv:2110.04366, section 4.2)

NeMo's `parallel_adapter` is the sequential one, split over devices; its defaults are these. A block's input is what the
base hands to it, behind the layer's own norm (AdapterHub's parallel form takes the residual stream in front of that
norm). Around the experts of a mixture the block is all of them together, router included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from tailor.models.bank import Rows, stacked
from tailor.models.block import BlockDelta, Change, Together
from tailor.models.packed import Weight
from tailor.models.placement import Block
from tailor.models.slots import Slot
from tailor.techniques.technique import Defaults, Technique, Traits

Init = Literal["xavier", "normal", "kaiming", "zero"]

NORM_EPS = 1e-5
NORM = ("norm.weight", "norm.bias")

Own = Mapping[str, Tensor]
"""The tensors of one adapter, by their names in it."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class Adapter(Technique):
    """Bottleneck layers at the output of the attention and MLP blocks; sequential or parallel."""

    type: Literal["adapter"] = "adapter"
    bottleneck_size: int = Field(32, ge=1, description="width between the two layers: capacity and size")
    form: Literal["sequential", "parallel"] = Field(
        "sequential", description="what goes in: the block's output (sequential) or its input (parallel)"
    )
    activation: Literal["silu", "swish", "relu", "gelu", "tanh", "identity"] = Field(
        "silu", description="nonlinearity between the two layers; swish is another name of silu"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on what is added, in training only")
    norm: Literal["pre", "post", "none"] = Field(
        "pre", description="a LayerNorm of its own before the first layer, after the second, or none"
    )
    scale: float = Field(1.0, gt=0, description="factor on what is added")
    blocks: tuple[Block, ...] = Field(("attention", "mlp"), description="attention, mlp, or both")
    target_layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="decoder layers by index; all when not given"
    )
    weight_tying: bool = Field(
        False, description="one adapter for the attention and one for the MLP of all layers; nothing tells layers apart"
    )
    init_down: Init = Field(
        "xavier", description="first layer: xavier (normal), normal (deviation 0.2), kaiming (uniform), zero"
    )
    init_up: Init = Field(
        "zero",
        description="second layer; zero: what comes last is, the gain of a post norm instead; others do not start as "
        "the base",
    )
    bias: bool = Field(False, description="biases in both layers")

    traits: ClassVar[Traits] = Traits(
        trains="2 · bottleneck_size × hidden per block",
        where="attention and MLP output",
        formula="out + scale · up(act(down(norm(out)))); parallel: of the block's input instead of out",
        source="Houlsby et al. 2019, arXiv:1902.00751, section 2.1; parallel: He et al. 2022, arXiv:2110.04366",
        frozen_base=True,
        merges=False,
        mixes=True,
        peft=False,
        rows=(50, 200),
        defaults=Defaults(learning_rate=1e-2, num_epochs=5, min_steps=80, max_steps=2000),
    )

    search: ClassVar[Mapping[str, tuple[int, ...]]] = {"bottleneck_size": (8, 16, 32, 64)}

    @field_validator("blocks")
    @classmethod
    def _each_block_once(cls, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
        if not blocks or len(set(blocks)) < len(blocks):
            raise ValueError("name attention, mlp, or both, each once")
        return blocks

    @model_validator(mode="after")
    def _something_learns(self) -> Self:
        if self.init_down == "zero":
            if self.init_up == "zero":
                raise ValueError("init_down and init_up cannot both be zero: nothing could learn")
            if self.activation == "relu":
                raise ValueError("init_down: zero under relu, whose slope at 0 is 0, would never learn")
            if self.norm == "post":
                raise ValueError("init_down: zero under a post norm would divide by a spread of 0")
        return self

    def beyond_peft(self) -> str:
        """PEFT has none of this kind."""
        return "PEFT has no bottleneck adapters"

    def attach(self, slot: Slot) -> None:
        """Put a bottleneck on every block. What comes last in it is zero, so the slot starts as the base."""
        stack = slot.host.placement.layers(slot.host.model)
        made: dict[str, dict[str, nn.Parameter]] = {}
        for layer in slot.host.layer_numbers(self.target_layers):
            for block in self.blocks:
                name = f"{block}.adapter" if self.weight_tying else f"{stack}.{layer}.{block}.adapter"
                if name not in made:
                    made[name] = self._parameters(slot, name)
                own = made[name]
                slot.add_block(block, layer, self._delta(slot, own))

    def _parameters(self, slot: Slot, name: str) -> dict[str, nn.Parameter]:
        """Of one adapter, by their names in it."""
        hidden, size = int(slot.host.model.config.hidden_size), self.bottleneck_size  # type: ignore[union-attr, arg-type]
        post = self.norm == "post"
        # a zero output under a norm would have gradients of 1 / sqrt(eps): the gain is zero instead
        init_up = "xavier" if post and self.init_up == "zero" else self.init_up
        values = {
            "down.weight": _started(self.init_down, (size, hidden), slot.generator(f"{name}.down.weight")),
            "up.weight": _started(init_up, (hidden, size), slot.generator(f"{name}.up.weight")),
        }
        if self.bias:
            values |= {"down.bias": torch.zeros(size), "up.bias": torch.zeros(hidden)}
        if self.norm != "none":
            gain = torch.zeros(hidden) if post and self.init_up == "zero" else torch.ones(hidden)
            values |= {"norm.weight": gain, "norm.bias": torch.zeros(hidden)}
        return {key: slot.new_parameter(f"{name}.{key}", value) for key, value in values.items()}

    def _delta(self, slot: Slot, parameters: Mapping[str, nn.Parameter]) -> BlockDelta:
        """The formula, without `out +`; adapters of equal form can be stacked."""
        own = slot.host.dtype
        kept = slot.derived(lambda: {key: p.to(own) for key, p in parameters.items()}, *parameters.values())

        def narrow(dtype: torch.dtype) -> Own:
            return kept() if dtype == own else {key: p.to(dtype) for key, p in parameters.items()}

        kind = (self.form, self.norm, self.activation, self.scale, self.bias)
        every = tuple(parameters.values())
        return BlockDelta(self._change(narrow), every, self.dropout, ("adapter", *kind), narrow, self._together)

    def _change(self, parameters: Callable[[torch.dtype], Own]) -> Change:
        activation = ACTIVATIONS[self.activation]

        def change(inputs: Tensor, outputs: Tensor) -> Tensor:
            x = outputs if self.form == "sequential" else inputs
            own = parameters(x.dtype)
            if self.norm == "pre":
                x = _norm(x, own)
            x = activation(F.linear(x, own["down.weight"], own.get("down.bias")))
            x = F.linear(x, own["up.weight"], own.get("up.bias"))
            if self.norm == "post":
                x = _norm(x, own)
            return x if self.scale == 1.0 else self.scale * x

        return change

    def _together(self, every: Sequence[Own]) -> Together:
        """Adapters side by side: one product down and one up for all rows, between them each row keeps its own part."""
        activation = ACTIVATIONS[self.activation]
        like = every[0]["down.weight"]
        ranks = tuple(own["down.weight"].shape[0] for own in every)
        down = torch.cat([own["down.weight"] for own in every])
        down_bias = torch.cat([own["down.bias"] for own in every]) if self.bias else None
        if self.norm == "pre":  # down(x ⊙ gain + offset) = (down ⊙ gain) x + down · offset: each adapter's own rows
            gains, offsets = ([own[key].expand_as(own["down.weight"]) for own in every] for key in NORM)
            moved = (down * torch.cat(offsets)).sum(dim=1)
            down, down_bias = down * torch.cat(gains), moved if down_bias is None else down_bias + moved
        into, out = Weight(down, down_bias), Weight(torch.cat([own["up.weight"] for own in every], dim=1))
        rows_of = {key: stacked([own.get(key) for own in every], 0.0, like) for key in ("up.bias", *NORM)}

        def change(inputs: Tensor, outputs: Tensor, rows: Rows) -> None:
            x = outputs if self.form == "sequential" else inputs
            if self.norm == "pre":
                x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
            inner = activation(into(x)).masked_fill(rows.foreign(ranks), 0)
            if self.norm != "post" and rows_of["up.bias"] is None:
                out.add(outputs, inner, self.scale)
                return
            x = out(inner)
            if (bias := rows_of["up.bias"]) is not None:
                x = x + rows.pick(bias)
            if self.norm == "post":
                x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
                gain, offset = (rows.pick(rows_of[key]) for key in NORM)  # type: ignore[arg-type]
                x = torch.addcmul(offset, x, gain)
            outputs.add_(x, alpha=self.scale)

        return change


def _norm(x: Tensor, own: Own) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], own["norm.weight"], own["norm.bias"], NORM_EPS)


def _started(init: Init, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A layer's first weight (out, in): N(0, 2 / (in + out)) and N(0, 0.2²) as in NeMo; uniform within 1/√in, which is
    Kaiming with a = √5, as in the code of He et al."""
    if init == "zero":
        return torch.zeros(shape)
    if init == "kaiming":
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
    deviation = math.sqrt(2.0 / sum(shape)) if init == "xavier" else 0.2
    return deviation * torch.randn(shape, generator=generator)
