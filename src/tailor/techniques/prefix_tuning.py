"""Prefix tuning: trained keys and values in front of every sequence, in every layer. Li & Liang 2021, arXiv:2101.00190.

    attention(q, [P_k; K], [P_v; V])        P = s · T, or with reparametrisation P = s · MLP(E)      (sections 4.2, 4.3)

s is the root mean square of the base's own keys (values) of the layer: they differ by orders of magnitude between
layers and bases, and AdamW moves every number by about the learning rate. The MLP is dropped after training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tailor.errors import ConfigError
from tailor.models.prefix import Prefix
from tailor.models.slots import Slot
from tailor.techniques.soft_prompt import TABLE, read_table
from tailor.techniques.technique import Defaults, PeftFiles, Technique, Traits

PREFIX = "prefix"
ENCODER = "prefix_encoder"
NUM_SAMPLED = 64
"""Words over which the size of the base's keys and values is measured."""
MLP_RATE = 0.01
"""The learning rate of the reparametrisation over that of a plain prefix: an MLP moves all weights behind a number at
once. Measured on tailor-nano (docs/log.md)."""


class PrefixTuning(Technique):
    """Trained keys and values in front of the text, in every layer; the base stays as it is."""

    type: Literal["prefix_tuning"] = "prefix_tuning"
    num_virtual_tokens: int = Field(50, ge=1, description="length of the prefix; each costs context like a word")
    reparametrisation: bool = Field(False, description="train an MLP that makes the prefix, and drop it at the end")
    encoder_hidden: int | None = Field(
        None, ge=1, description="width inside the MLP, 512 when not given; a start by words needs num_virtual_tokens"
    )
    init: Literal["vocab", "text", "random"] = Field(
        "vocab", description="start from the base's keys and values of sampled words, of init_text, or from noise"
    )
    init_text: str | None = Field(None, description="the text whose keys and values are the start (init: text)")

    traits: ClassVar[Traits] = Traits(
        trains="2 × layers × num_virtual_tokens × key/value width",
        where="attention",
        formula="attention(q, [P_k; K], [P_v; V])",
        source="Li & Liang 2021, arXiv:2101.00190, sections 4.2 and 4.3",
        frozen_base=True,
        merges=False,
        mixes=True,
        peft=True,
        rows=(50, 300),
        defaults=Defaults(learning_rate=0.1, num_epochs=8, min_steps=160, max_steps=3000),
    )

    peft_types: ClassVar[tuple[str, ...]] = ("PREFIX_TUNING",)
    alternatives: ClassVar[tuple[Mapping[str, Any], ...]] = ({"reparametrisation": True},)
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_virtual_tokens": (10, 30, 50)}

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init_text and init: text go together (either one alone has no effect)")
        if self.encoder_hidden is not None and not self.reparametrisation:
            raise ValueError("encoder_hidden has no effect without reparametrisation: true")
        if self.init != "random" and self.reparametrisation and self.hidden < self.num_virtual_tokens:
            raise ValueError(
                f"an MLP {self.hidden} wide cannot start at {self.num_virtual_tokens} words: "
                "give encoder_hidden at least num_virtual_tokens, or init: random"
            )
        return self

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return self.encoder_hidden or 512

    def attach(self, slot: Slot) -> None:
        """Put the prefix in front of every sequence of the slot."""
        layers, groups, size = slot.host.kv_shape
        if self.num_virtual_tokens >= (context := _context(slot)):
            raise ConfigError(f"{self.num_virtual_tokens} virtual tokens fill the base's context of {context}")
        shape = (layers, 2, groups, self.num_virtual_tokens, size)
        unit = functools.cache(lambda: _unit(slot))

        def start() -> dict[str, Tensor]:
            wanted = self._start(slot, unit()) / unit()
            return self._mlp_start(slot, wanted) if self.reparametrisation else {f"{ENCODER}.table": wanted}

        def compute(weights: Mapping[str, Tensor]) -> Tensor:
            made = _mlp(weights, shape) if self.reparametrisation else weights[f"{ENCODER}.table"]
            return unit() * made

        rate = MLP_RATE if self.reparametrisation else 1.0
        slot.add_prefix(Prefix(self.num_virtual_tokens, slot.add_baked(PREFIX, shape, start, compute, rate)))

    def _start(self, slot: Slot, unit: Tensor) -> Tensor:
        """(L, 2, G, P, D) keys and values to start from."""
        num, generator = self.num_virtual_tokens, slot.generator(PREFIX)
        if self.init == "random":
            layers, groups, size = slot.host.kv_shape
            return unit * slot.constant(torch.randn(layers, 2, groups, num, size, generator=generator))
        if self.init == "text":
            if not (ids := slot.host.tokenizer.encode(self.init_text or "")):
                raise ConfigError("init_text has no tokens")
        else:
            ids = torch.randperm(slot.host.embedding_shape()[0], generator=generator)[:num].tolist()
        return slot.constant(slot.host.keys_values([ids[k % len(ids)] for k in range(num)]))

    def _mlp_start(self, slot: Slot, wanted: Tensor) -> dict[str, Tensor]:
        """Weights that give `wanted`: those of the last layer are the smallest that do."""
        width = slot.host.embedding_shape()[1]

        def draw(name: str, size: int) -> Tensor:
            return torch.randn(size, width, generator=slot.generator(f"{ENCODER}.{name}"))

        inputs, weight = draw("embedding", self.num_virtual_tokens), draw("mlp.0", self.hidden) / math.sqrt(width)
        inner = slot.constant(torch.linalg.pinv(torch.tanh(inputs @ weight.t()).double()))
        return {
            f"{ENCODER}.embedding.weight": inputs,
            f"{ENCODER}.mlp.0.weight": weight,
            f"{ENCODER}.mlp.0.bias": torch.zeros(self.hidden),
            f"{ENCODER}.mlp.1.weight": (inner @ _rows(wanted)).t(),
            f"{ENCODER}.mlp.1.bias": torch.zeros(wanted.numel() // self.num_virtual_tokens),
        }

    def to_peft(self, slot: Slot) -> PeftFiles:
        """PEFT's `PREFIX_TUNING` files for inference: PEFT, too, keeps the MLP's output and not the MLP."""
        assert slot.prefix is not None
        with torch.no_grad():
            prefix = slot.prefix.layers().detach().cpu()
        layers, _, groups, num, size = prefix.shape
        config = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": num,
            "num_layers": layers,
            "num_attention_heads": groups,
            "token_dim": groups * size,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "inference_mode": True,
        }
        return config, {TABLE: _rows(prefix).clone()}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """Reads what PEFT saved as `PREFIX_TUNING`, with `prefix_projection` (it saves what that gives) or without."""
        table = read_table(config, tensors)
        absent = [key for key in ("num_layers", "num_attention_heads", "token_dim") if not config.get(key)]
        if absent:
            raise ConfigError(f"this PEFT prefix does not say its {' and '.join(absent)}")
        if config.get("num_transformer_submodules") not in (None, 1):
            raise ConfigError("this PEFT prefix is for an encoder and a decoder; bases here have a decoder only")
        layers, groups, width = (int(config[key]) for key in ("num_layers", "num_attention_heads", "token_dim"))
        if table.shape[1] != layers * 2 * width or width % groups:
            raise ConfigError(
                f"a row of this prefix has {table.shape[1]} numbers; 2 × {layers} layers × {width} are "
                f"{2 * layers * width} (in {groups} heads)"
            )
        shape = (layers, 2, groups, table.shape[0], width // groups)
        return cls(num_virtual_tokens=int(table.shape[0])), {PREFIX: _prefix(table, shape).contiguous()}


def _context(slot: Slot) -> int:
    return int(slot.host.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]


def _unit(slot: Slot) -> Tensor:
    """(L, 2, 1, 1, 1) root mean square of the base's keys and values by layer, over words from all the vocabulary."""
    if slot.host.device.type == "meta":
        return torch.ones(())  # without numbers; a scalar goes with tensors of any device
    vocabulary = slot.host.embedding_shape()[0]
    words = range(0, vocabulary, -(-vocabulary // min(NUM_SAMPLED, _context(slot))))
    found = slot.constant(slot.host.keys_values(words))
    return found.square().mean(dim=(2, 3, 4), keepdim=True).sqrt()


def _mlp(weights: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    inner = weights[f"{ENCODER}.embedding.weight"]
    inner = torch.tanh(F.linear(inner, weights[f"{ENCODER}.mlp.0.weight"], weights[f"{ENCODER}.mlp.0.bias"]))
    rows = F.linear(inner, weights[f"{ENCODER}.mlp.1.weight"], weights[f"{ENCODER}.mlp.1.bias"])
    return _prefix(rows, shape)


def _prefix(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(P, L · 2 · G · D), as PEFT lays a prefix out, to (L, 2, G, P, D)."""
    layers, _, groups, num, size = shape
    return rows.view(num, layers, 2, groups, size).permute(1, 2, 3, 0, 4)


def _rows(prefix: Tensor) -> Tensor:
    """(L, 2, G, P, D) to (P, L · 2 · G · D)."""
    return prefix.permute(3, 0, 1, 2, 4).flatten(1)
