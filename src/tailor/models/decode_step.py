"""One token more for every sequence, in as few calls as can be: what a CPU runs for the decoders of Llama's form.

A step of generation through the model's own modules spends as much time on calls as on reading the weights. Here the
layers that read the same input are one product, in a layout made for few rows (`PackedLinear`), and nothing is called
that does not compute. What slots change is the same as everywhere (`bank.changed`, `SlotBlock`).

    x += o(attend(rotate(qkv(norm(x)))))        x += down(silu(gate(norm(x))) · up(norm(x)))

The names of a decoder's modules do not make it of that form: the first step is computed both ways, and the model's own
modules go on when the numbers differ (`Stepper`). n tokens, one of each sequence; H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tailor.errors import ConfigError
from tailor.machine import memory
from tailor.models.bank import Piece, changed
from tailor.models.decode import Options, decode
from tailor.models.fused import rotated, silu_gate
from tailor.models.packed import Int8Linear, PackedLinear, Product, has_int8
from tailor.models.slots import version_of
from tailor.models.step_changes import Joined, StepChanges

if TYPE_CHECKING:
    from tailor.models.host import SlotHost
    from tailor.models.placement import Block
    from tailor.models.plan import Plan

MODEL_TYPES = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Whose layers are of the form. Others have their names too and scale something: little, seen in half precision."""
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
MLP = ("gate_proj", "up_proj", "down_proj")
PRODUCTS = (("self_attn", ATTENTION[:3]), ("self_attn", ATTENTION[3:]), ("mlp", MLP[:2]), ("mlp", MLP[2:]))
"""The layer's linear layers, by the input that they read."""


class _Layer(NamedTuple):
    """A decoder layer: its norms, those of its heads where it has some, and the four products."""

    number: int
    norm: nn.Module
    mlp_norm: nn.Module
    head_norms: tuple[nn.Module, nn.Module] | None
    rotates: bool
    products: tuple[Product, ...]
    options: Options


class DecodeStep:
    """The decoder of a model, for plans that only decode (`Plan.decodes`); `pack` makes the products."""

    def __init__(
        self, host: SlotHost, options: Mapping[int, Options], pack: Callable[[Sequence[nn.Linear]], Product]
    ) -> None:
        decoder: nn.Module = host.model.base_model  # type: ignore[assignment]
        self.host = host
        self.pack = pack
        self.stem = host.placement.layers(host.model)
        self.embedding = host.placement.embedding(host.model)
        self.rotary: nn.Module = decoder.rotary_emb  # type: ignore[assignment]
        self.norm: nn.Module = decoder.norm  # type: ignore[assignment]
        self.size = host.kv_shape[2]
        self.groups = host.kv_shape[1]
        self.state = weights_state(host)
        layers = host.model.get_submodule(self.stem).children()
        self.layers = [self._layer(k, layer, options[k]) for k, layer in enumerate(layers)]
        head: nn.Module = host.model.get_output_embeddings()  # type: ignore[operator]
        self.head = pack([head]) if isinstance(head, nn.Linear) else None
        self.changes = StepChanges(host, [joined for layer in self.layers for joined in self._joined(layer)])

    def _layer(self, number: int, layer: nn.Module, options: Options) -> _Layer:
        norms = [getattr(layer.self_attn, name, None) for name in HEAD_NORMS]
        return _Layer(
            number,
            layer.input_layernorm,  # type: ignore[arg-type]
            layer.post_attention_layernorm,  # type: ignore[arg-type]
            (norms[0], norms[1]) if norms[0] is not None and norms[1] is not None else None,
            bool(getattr(layer.self_attn, "use_rope", True)),
            tuple(self.pack([_own(layer.get_submodule(part), n) for n in names]) for part, names in PRODUCTS),  # type: ignore[misc]
            options,
        )

    def _joined(self, layer: _Layer) -> list[Joined]:
        """The layer's products, for what slots change."""
        found = []
        for (part, names), product in zip(PRODUCTS, layer.products, strict=True):
            every = tuple(f"{self.stem}.{layer.number}.{part}.{name}" for name in names)
            found.append(Joined(every, product.sizes))
        return found

    @torch.no_grad()
    def __call__(self, plan: Plan, input_ids: Tensor, position_ids: Tensor) -> Tensor | None:
        """(n,) ids and positions → (n, H) hidden states behind the last norm, as the decoder gives them.

        None when a slot of the pass changes a layer in a way that products side by side do not have.
        """
        pieces = self.changes.of(plan)
        if pieces is None:
            return None
        adds = any(span.slot in self.host.slots and self.host.slots[span.slot].blocks for span in plan.spans)
        x = self.host.model.get_submodule(self.embedding)(input_ids[None])[0]
        cos, sin = (angles[0][:, None] for angles in self.rotary(x[None], position_ids[None]))
        if cos.shape[-1] == self.size and cos.dtype == x.dtype:  # as `rotated` does it, with the halves swapped
            half = self.size // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            turn = partial(_rolled, cos=cos, sin=sin, half=half)
        else:
            turn = partial(rotated, cos=cos, sin=sin)
        for layer in self.layers:
            own = pieces[len(PRODUCTS) * layer.number :]
            h = layer.norm.forward(x)
            y = self._attended(plan, layer, h, turn, own)
            x = x + (self._added("attention", layer, h, y) if adds else y)
            h = layer.mlp_norm.forward(x)
            y = self._through_mlp(layer, h, own)
            x = x + (self._added("mlp", layer, h, y) if adds else y)
        return self.norm(x)  # type: ignore[no-any-return]

    def _attended(
        self, plan: Plan, layer: _Layer, x: Tensor, turn: Callable[[Tensor], Tensor], pieces: Sequence[Sequence[Piece]]
    ) -> Tensor:
        """(n, H) → (n, H): the attention block. Heads stand side by side: of queries, of keys, of values."""
        qkv, out = layer.products[:2]
        heads = changed(qkv, x, qkv.bias, pieces[0]).view(len(x), -1, self.size)
        num, groups = heads.shape[1], self.groups
        turned, value = torch.split_with_sizes(heads, (num - groups, groups), dim=1)
        if layer.head_norms is not None:
            parts = torch.split_with_sizes(turned, (num - 2 * groups, groups), dim=1)
            turned = torch.cat([norm.forward(part) for norm, part in zip(layer.head_norms, parts, strict=True)], dim=1)
        if layer.rotates:
            turned = turn(turned)
        query, key = torch.split_with_sizes(turned, (num - 2 * groups, groups), dim=1)
        decoding = plan.decoding(x.device)
        found = [decode(group, layer.number, query, key, value, layer.options) for group in decoding.groups]
        return changed(out, decoding.answered(found).flatten(1), out.bias, pieces[1])

    def _through_mlp(self, layer: _Layer, x: Tensor, pieces: Sequence[Sequence[Piece]]) -> Tensor:
        """(n, H) → (n, H): the MLP block."""
        gate_up, down = layer.products[2:]
        both = changed(gate_up, x, gate_up.bias, pieces[2])
        inner = silu_gate(*torch.split_with_sizes(both, gate_up.sizes, dim=1))
        return changed(down, inner, down.bias, pieces[3])

    def _added(self, kind: Block, layer: _Layer, x: Tensor, y: Tensor) -> Tensor:
        """A block's output, which nobody else holds, with what slots add to it."""
        block = self.host.block_named(f"{self.stem}.{layer.number}.{kind}")
        return y if block is None else block.add(x, y)


def _rolled(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """`rotated` for whole heads: `sin` is negative in its first half."""
    return torch.addcmul(x * cos, x.roll(half, -1), sin)


LIMIT = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""How far two ways to compute the same may lie apart (`apart`)."""


def apart(found: Tensor, expected: Tensor) -> float:
    """The difference of two results of a model, over their spread: the greatest one, in half precision the RMS.

    The rounding of a deep model in half precision reaches a tenth of the spread somewhere among a million logits; what
    is computed wrongly differs by about the spread itself.
    """
    difference = (found.double() - expected.double()).abs()
    half = LIMIT[expected.dtype] > 1e-2
    size = difference.square().mean().sqrt() if half else difference.max()
    return float(size) / (float(expected.double().std()) or 1.0)


class Stepper:
    """Takes decoding steps the short way where that gives what the model's own modules give.

    With `int8` it then goes on with weights in 8 bits. `reason` is why it does not, when it has `refused`.
    """

    def __init__(self, host: SlotHost) -> None:
        self.host = host
        self.int8 = False
        self.step: DecodeStep | None = None
        self.reason = ""

    @property
    def refused(self) -> bool:
        """Whether all steps go the long way."""
        return bool(self.reason)

    def use_int8(self, wanted: bool) -> None:
        """Decode with weights in 8 bits from now on, or no more. Raises ConfigError where that cannot be."""
        if wanted == self.int8:
            return
        if wanted and not has_int8(self.host.dtype):
            raise ConfigError(
                f"int8: this processor or torch has no products of integers to go with {self.host.dtype}",
                hint="it takes a CPU, and dtype float32 or bfloat16",
            )
        self.int8, self.step = wanted, None

    def has_room(self) -> bool:
        """Whether there is memory for a copy of the weights, now."""
        free = memory()
        return free is None or 2 * sum(p.nbytes for p in self.host.weights) < free[0]

    def run(self, plan: Plan, input_ids: Tensor, position_ids: Tensor, modules: Callable[[], Tensor]) -> Tensor:
        """(n, H) hidden states of a plan that decodes; `modules` computes them the long way."""
        if self.step is not None and self.step.state == weights_state(self.host):
            hidden = self.step(plan, input_ids, position_ids)
            return modules() if hidden is None else hidden
        self.step = None
        expected = modules()
        self.reason = self.reason or other_form(self.host)
        if self.refused or not self.has_room():
            return expected
        step = DecodeStep(self.host, plan.options, PackedLinear)
        hidden = step(plan, input_ids, position_ids)
        if hidden is None:  # not this time: what this pass holds says nothing of the model
            return expected
        if not apart(hidden, expected) < LIMIT[self.host.dtype]:
            self.reason = "its decoder layers compute something else than Llama's"
            return modules()  # once more: the keys and values that the step has written are not the model's
        self.step = DecodeStep(self.host, plan.options, Int8Linear) if self.int8 else step
        return expected


def weights_state(host: SlotHost) -> tuple[int, int]:
    """Changes whenever a weight of the model does: packed copies are of one state."""
    owner = 0 if host.owner is None else host.owner.epoch
    return owner, sum(map(version_of, host.weights))


def other_form(host: SlotHost) -> str:
    """Why the decoder's modules have not the names and kinds that a step needs; empty when they have."""
    decoder: nn.Module = host.model.base_model  # type: ignore[assignment]
    if host.device.type != "cpu":
        return f"it is on {host.device.type}"
    if host.placement.model_type not in MODEL_TYPES:
        return f"decoder layers of {host.placement.model_type} are not of Llama's form"
    stack = host.model.get_submodule(host.placement.layers(host.model))
    layers = [dict(layer.named_children()) for layer in stack.children()]
    around = hasattr(decoder, "rotary_emb") and hasattr(decoder, "norm")
    if not around or any(parts.keys() != LAYER for parts in layers):
        return "its decoder layers are not of Llama's form"
    for parts in layers:
        inside = {name for name, _ in parts["self_attn"].named_children()}
        if not set(ATTENTION) <= inside <= {*ATTENTION, *HEAD_NORMS} or len(inside & set(HEAD_NORMS)) == 1:
            return "its attention is not of Llama's form"
        if not all(isinstance(_own(parts[part], name), nn.Linear) for part, names in PRODUCTS for name in names):
            return "its linear layers are not of Llama's form, or quantised"
        probe = torch.linspace(-4, 4, 9)
        if not torch.allclose(parts["mlp"].act_fn(probe), nn.functional.silu(probe)):  # type: ignore[operator]
            return "its MLP has another activation than Llama's"
    return ""


def _own(parent: nn.Module, name: str) -> nn.Module | None:
    """The model's own module of this name, be it wrapped or not."""
    module = getattr(parent, name, None)
    return getattr(module, "base", module)
