"""P-tuning: virtual tokens made by a small network while it trains. Liu et al. 2021, arXiv:2103.10385.

P = 10 r · f(E): the n inputs E are a trained table, the encoder f an MLP or a bidirectional LSTM with an MLP on it
(section 3.2), r the root mean square of the base's word embeddings, which differs between bases by a factor of fifty:
in units of it one learning rate suits them all. At the end P is kept and f is dropped; f stays beside the artifact, so
that training can go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from tailor.errors import ConfigError
from tailor.models.dropout import keep_mask_of_step
from tailor.models.slots import Slot
from tailor.techniques.soft_prompt import TABLE, SoftPrompt, read_table
from tailor.techniques.technique import Defaults, PeftFiles, Traits

ENCODER = "prompt_encoder"
INPUTS = f"{ENCODER}.embedding.weight"
GAIN = 10.0
"""What the encoder's output is worth, in units of r: 10 trained better than 1 at every rate tried (docs/log.md)."""
TABLE_RATE = 1000.0
"""The learning rate of a plain table in units of r over an encoder's, whose weights all move at once: with the default
it is prompt tuning's."""


class PTuning(SoftPrompt):
    """Virtual tokens in front of the text, the output of a prompt encoder that is dropped after training."""

    type: Literal["p_tuning"] = "p_tuning"
    encoder: Literal["mlp", "lstm", "embedding"] = Field(
        "mlp",
        description="mlp: GELU between linear layers; lstm: bidirectional, an MLP on it; embedding: a plain table",
    )
    encoder_hidden: int | None = Field(
        None, ge=1, description="width inside the encoder; the base's hidden size (lstm: half) when not given"
    )
    embedding_size: int | None = Field(
        None, ge=1, description="width of the encoder's inputs; the base's hidden size when not given"
    )
    num_layers: int = Field(2, ge=1, description="linear layers of the mlp (at least 2), or layers of the lstm")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout after the mlp's and lstm's layers but the last")
    init_std: float | None = Field(
        None, gt=0, description="standard deviation of the weights at the start; 1/√inputs when not given"
    )
    condition: str | None = Field(
        None, description="text (such as the task's name) whose word embeddings are the encoder's first inputs"
    )

    traits: ClassVar[Traits] = Traits(
        trains="a prompt encoder; num_virtual_tokens × hidden are kept",
        where="embedding",
        formula="[10 r · f(E); X]: outputs of an encoder f stand in front of the embedded text X",
        source="Liu et al. 2021, arXiv:2103.10385, section 3.2",
        frozen_base=True,
        merges=False,
        mixes=True,
        peft=True,
        rows=(50, 300),
        defaults=Defaults(learning_rate=0.01, num_epochs=8, min_steps=160, max_steps=3000),
    )

    peft_types: ClassVar[tuple[str, ...]] = ("P_TUNING",)
    alternatives: ClassVar[tuple[Mapping[str, Any], ...]] = ({"encoder": "lstm"},)
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_virtual_tokens": (10, 20, 50), "encoder": ("mlp", "lstm")}

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.encoder == "mlp" and self.num_layers < 2:
            raise ValueError("an mlp has at least 2 linear layers (num_layers); encoder: embedding has none")
        if self.encoder == "embedding":
            given = {"encoder_hidden", "embedding_size", "num_layers", "dropout", "condition"} & self.model_fields_set
            idle = sorted(key for key in given if getattr(self, key) != type(self).model_fields[key].default)
            if idle:
                raise ValueError(f"{' and '.join(idle)}: a plain table (encoder: embedding) has no such thing")
        if self.condition is not None and self.embedding_size is not None:
            raise ValueError("condition is words, which are as wide as the base has them: give no embedding_size")
        return self

    def attach(self, slot: Slot) -> None:
        """Let the encoder's output (the baked table, when attached for use) lead every sequence of the slot."""
        hidden, unit = slot.host.embedding_shape()[1], slot.host.embedding_rms()
        if self.encoder == "embedding":
            table = slot.new_parameter(self.table_name, unit * self._inputs(slot, hidden), rate=TABLE_RATE * unit)
            self.add_rows(slot, lambda: table)
            return
        words = self._words(slot)
        first = slot.constant(slot.host.embed(words) / unit) if words else None

        def start() -> dict[str, Tensor]:
            make = self._mlp_start if self.encoder == "mlp" else self._lstm_start
            width = self.embedding_size or hidden
            own = {INPUTS: self._inputs(slot, width)[len(words) :]} if len(words) < self.num_virtual_tokens else {}
            return own | make(slot, width, hidden)

        def compute(weights: Mapping[str, Tensor]) -> Tensor:
            parts = [part for part in (first, weights.get(INPUTS)) if part is not None]
            encode = self._mlp if self.encoder == "mlp" else self._lstm
            return GAIN * unit * encode(slot, weights, torch.cat(parts))

        rows = slot.add_baked(self.table_name, (self.num_virtual_tokens, hidden), start, compute)
        self.add_rows(slot, rows)

    def _words(self, slot: Slot) -> list[int]:
        """The condition's tokens, at most as many as there are inputs."""
        if self.condition is None or slot.baked:
            return []
        if not (ids := slot.host.tokenizer.encode(self.condition)):
            raise ConfigError("condition has no tokens")
        return ids[: self.num_virtual_tokens]

    def _inputs(self, slot: Slot, width: int) -> Tensor:
        std = (self.init_std or 1.0) if self.encoder == "embedding" else 1.0
        return std * torch.randn(self.num_virtual_tokens, width, generator=slot.generator(INPUTS))

    def _weight(self, slot: Slot, name: str, size_out: int, size_in: int) -> dict[str, Tensor]:
        std = self.init_std or 1.0 / math.sqrt(size_in)
        return {name: std * torch.randn(size_out, size_in, generator=slot.generator(name))}

    def _linear(self, slot: Slot, name: str, size_out: int, size_in: int) -> dict[str, Tensor]:
        return self._weight(slot, f"{name}.weight", size_out, size_in) | {f"{name}.bias": torch.zeros(size_out)}

    def _mlp_start(self, slot: Slot, width: int, hidden: int) -> dict[str, Tensor]:
        inner = [self.encoder_hidden or hidden] * (self.num_layers - 1)
        sizes = [width, *inner, hidden]
        weights: dict[str, Tensor] = {}
        for layer in range(self.num_layers):
            weights |= self._linear(slot, f"{ENCODER}.mlp.{layer}", sizes[layer + 1], sizes[layer])
        return weights

    def _mlp(self, slot: Slot, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        out = inputs
        for layer in range(self.num_layers):
            if layer:
                out = self._dropped(slot, layer, F.gelu(out))
            name = f"{ENCODER}.mlp.{layer}"
            out = F.linear(out, weights[f"{name}.weight"], weights[f"{name}.bias"])
        return out

    def _lstm_start(self, slot: Slot, width: int, hidden: int) -> dict[str, Tensor]:
        inner = self.encoder_hidden or max(1, hidden // 2)
        weights: dict[str, Tensor] = {}
        for layer in range(self.num_layers):
            for end in _directions(layer):
                weights |= self._weight(
                    slot, f"{ENCODER}.lstm.weight_ih_{end}", 4 * inner, 2 * inner if layer else width
                )
                weights |= self._weight(slot, f"{ENCODER}.lstm.weight_hh_{end}", 4 * inner, inner)
                weights |= {f"{ENCODER}.lstm.bias_{side}_{end}": torch.zeros(4 * inner) for side in ("ih", "hh")}
        weights |= self._linear(slot, f"{ENCODER}.head.0", 2 * inner, 2 * inner)
        return weights | self._linear(slot, f"{ENCODER}.head.1", hidden, 2 * inner)

    def _lstm(self, slot: Slot, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        out = inputs[None]
        for layer in range(self.num_layers):
            if layer:
                out = self._dropped(slot, layer, out)
            kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            own = [weights[f"{ENCODER}.lstm.{kind}_{end}"] for end in _directions(layer) for kind in kinds]
            state = out.new_zeros(2, 1, own[1].shape[1])
            # layer by layer: torch's dropout between them would not be the slot's own
            out = torch.lstm(out, (state, state), own, True, 1, 0.0, True, True, True)[0]
        names = [f"{ENCODER}.head.{number}" for number in (0, 1)]
        first, second = ((weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in names)
        return F.linear(F.relu(F.linear(out[0], *first)), *second)

    def _dropped(self, slot: Slot, layer: int, values: Tensor) -> Tensor:
        mask = keep_mask_of_step(slot, f"{ENCODER}.{layer}", self.dropout, values)
        return values if mask is None else values * mask

    def to_peft(self, slot: Slot) -> PeftFiles:
        """PEFT's `P_TUNING` files for inference: PEFT, too, keeps the encoder's output and not the encoder."""
        with torch.no_grad():
            return self.table_files(
                slot,
                peft_type="P_TUNING",
                encoder_reparameterization_type="LSTM" if self.encoder == "lstm" else "MLP",
                encoder_hidden_size=self.encoder_hidden or slot.host.embedding_shape()[1],
            )

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """Reads what PEFT saved as `P_TUNING`: a table, whose encoder PEFT has not kept."""
        table = read_table(config, tensors)
        return cls(num_virtual_tokens=int(table.shape[0]), encoder="embedding"), {TABLE: table}


def _directions(layer: int) -> tuple[str, str]:
    """How torch.nn.LSTM names the weights of a layer, forwards and backwards."""
    return f"l{layer}", f"l{layer}_reverse"
