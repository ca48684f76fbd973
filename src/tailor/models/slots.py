"""Slots: many customizations attached to one loaded, frozen base, sharing its passes.

Attaching only adds; techniques wrap modules from outside and the model's own code never hears of them. Slot 0 is the
plain base. What a slot adds is found through the running `Plan`, which names the tokens of every slot.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailor.errors import ConfigError, ConflictError, nearest
from tailor.models.block import BlockDelta, SlotBlock
from tailor.models.derived import Baked, Derived, T
from tailor.models.dropout import stable_seed
from tailor.models.embedding import SlotEmbedding, VirtualTokens
from tailor.models.linear import LinearDelta, SlotLinear, is_linear
from tailor.models.placement import Block, Placement
from tailor.models.prefix import Prefix
from tailor.text.messages import Message
from tailor.text.tokenizer import VIRTUAL, Tokenizer

if TYPE_CHECKING:
    from tailor.models.plan import Plan

BASE_SLOT = 0
"""The slot number of rows that belong to no customization."""

ALONE = "full fine-tuning changes the base itself and runs alone: no other slot or technique"

Compose = Callable[[tuple[Message, ...]], tuple[Message, ...]]


class Slot:
    """One customization attached right now: its parameters, its virtual tokens, its rewriting of the prompt.

    Techniques fill it in `attach` through `new_parameter` and `add_delta`, `add_block`, `add_virtual_tokens`,
    `add_prefix`, `own` and `compose`. `rates` are multiples of the learning rate, by parameter. `baked`: what only
    trains (encoders) is not there. `revision` counts changes of the parameters that torch does not see.
    """

    def __init__(self, host: SlotHost, number: int, seed: int, *, baked: bool = False) -> None:
        self.host = host
        self.number = number
        self.seed = seed
        self.baked = baked
        self.revision = 0
        self.parameters: dict[str, nn.Parameter] = {}
        self.rates: dict[str, float] = {}
        self.deltas: dict[str, list[LinearDelta]] = {}
        self.blocks: dict[str, list[BlockDelta]] = {}
        self.prefix: Prefix | None = None
        self._bakes: list[Baked] = []
        self.virtual_ids: tuple[int, ...] = ()
        self.compose: Compose | None = None
        self.answer_pattern: str | None = None
        self.owns_base = False

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def has_dropout(self) -> bool:
        """Whether its passes in training are noisy: then no two sequences may share what is drawn for one."""
        every = [*self.deltas.values(), *self.blocks.values()]
        return any(delta.dropout for deltas in every for delta in deltas)

    @property
    def num_prefix(self) -> int:
        """Positions of the context that its prefix takes."""
        return self.prefix.num if self.prefix else 0

    def num_operations(self) -> int:
        """Multiplications per token that its linear layers and blocks add to the base's."""
        every = [*self.deltas.values(), *self.blocks.values()]
        return sum(delta.num_operations() for deltas in every for delta in deltas)

    @property
    def lowest_layer(self) -> int:
        """The lowest decoder layer that it changes; below it nothing needs a gradient. -1: the embedding."""
        if self.virtual_ids or self.owns_base:
            return -1
        if self.prefix or not (self.deltas or self.blocks):
            return 0
        return min(layer_of(name) for name in (*self.deltas, *self.blocks))

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator that depends on the slot's seed and `name` only, not on the order of attaching."""
        return torch.Generator().manual_seed(stable_seed(f"{self.seed}/{name}"))

    def new_parameter(self, name: str, value: Tensor, rate: float = 1.0) -> nn.Parameter:
        """A trainable parameter in fp32 (float64 on a float64 base) on the base's device, kept under `name`.

        `rate` multiplies the learning rate.
        """
        if self.owns_base:
            raise ConflictError(ALONE)
        if name in self.parameters:
            raise ConfigError(f"two techniques of one list both want to add {name}", hint="give each its own targets")
        parameter = nn.Parameter(self.constant(value))
        self.parameters[name] = parameter
        if rate != 1.0:
            self.rates[name] = rate
        return parameter

    def constant(self, value: Tensor) -> Tensor:
        """`value` where and as precise as parameters are; it does not learn and is not part of the slot's state."""
        return value.detach().to(self.host.device, torch.promote_types(self.host.dtype, torch.float32))

    def derived(self, compute: Callable[[], T], *parameters: nn.Parameter) -> Derived[T]:
        """What `compute` makes of the parameters, computed no more often than they change."""
        return Derived(self, compute, parameters)

    def add_baked(
        self,
        name: str,
        shape: Sequence[int],
        start: Callable[[], Mapping[str, Tensor]],
        compute: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> Baked:
        """A tensor that is computed from the parameters of `start()` until `bake`, and a parameter from then on."""
        self._bakes.append(Baked(self, name, shape, start, compute))
        return self._bakes[-1]

    def bake(self) -> dict[str, Tensor]:
        """Drop what only trains, keeping its results. Returns the whole state before, from which training can go on;
        empty when there was nothing to drop."""
        if self.baked or not self._bakes:
            return {}
        before = self.state()
        for baked in self._bakes:
            baked.bake()
        self.baked = True
        return before

    def touch(self) -> None:
        """Say that parameters were changed behind torch's back (through the optimizer's buffer)."""
        self.revision += 1

    def add_delta(self, module_name: str, delta: LinearDelta) -> None:
        """Sit on a linear layer; only tokens of this slot feel it."""
        self.host.wrap_linear(module_name).deltas.setdefault(self.number, []).append(delta)
        self.deltas.setdefault(module_name, []).append(delta)

    def add_block(self, block: Block, layer: int, delta: BlockDelta) -> None:
        """Add to the output of a decoder layer's attention or MLP block."""
        found = self.host.wrap_block(block, layer)
        found.deltas.setdefault(self.number, []).append(delta)
        self.blocks.setdefault(found.name, []).append(delta)

    def add_prefix(self, prefix: Prefix) -> None:
        """Put keys and values in front of every sequence of the slot."""
        if self.prefix is not None:
            raise ConfigError("two techniques of one list both want to add a prefix")
        self.prefix = prefix

    def add_virtual_tokens(self, tokens: VirtualTokens) -> None:
        """Give the slot its own rows past the vocabulary; they lead every sequence of the slot."""
        if self.virtual_ids:
            raise ConfigError("two techniques of one list both want to add virtual tokens")
        self.host.wrap_embedding().tables[self.number] = tokens
        self.virtual_ids = tuple(range(VIRTUAL, VIRTUAL + tokens.num))

    def own(self, patterns: Sequence[str] | None) -> None:
        """Train the base's own weights (all, or those whose names match); the host then serves this slot alone."""
        names = [name for name, _ in self.host.model.named_parameters()]
        chosen = match_names(names, patterns, "parameter") if patterns else names
        self.host.claim(self)
        for name in chosen:
            parameter = self.host.model.get_parameter(name)
            parameter.requires_grad_(True)
            self.parameters[name] = parameter

    def state(self) -> dict[str, Tensor]:
        """The slot's parameters by name, detached and on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state back. Raises ConfigError unless names and shapes agree exactly."""
        missing, unknown = self.parameters.keys() - state.keys(), state.keys() - self.parameters.keys()
        if missing or unknown:
            raise ConfigError(
                f"these weights are for something else: {len(missing)} tensors are missing "
                f"({', '.join(sorted(missing)[:3])}), {len(unknown)} match nothing ({', '.join(sorted(unknown)[:3])})"
            )
        for name, parameter in self.parameters.items():
            if parameter.shape != state[name].shape:
                raise ConfigError(f"{name} has shape {tuple(state[name].shape)}, not {tuple(parameter.shape)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])


class SlotHost:
    """Holds the model, its wrappers and its slots, and the plan of the pass that is running."""

    def __init__(self, model: nn.Module, placement: Placement, tokenizer: Tokenizer) -> None:
        first = next(model.parameters())
        self.model = model
        self.tokenizer = tokenizer
        self.placement = placement
        self.device = first.device
        self.dtype = first.dtype
        self.slots: dict[int, Slot] = {}
        self._next = BASE_SLOT + 1
        self.plan: Plan | None = None
        self._owner: Slot | None = None
        self._linears: dict[str, SlotLinear] = {}
        self._blocks: dict[str, SlotBlock] = {}
        self._embedding: SlotEmbedding | None = None
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.slot_host = self  # type: ignore[assignment]  # how `attend` finds the plan

    def attach(self, techniques: Sequence[Any], seed: int = 0, *, baked: bool = False) -> Slot:
        """A new slot with the given techniques composed; seeded parameters. Raises ConflictError beside `full`.

        `baked`: as it is after training, to load an artifact into. Slot numbers are never reused, so nothing that is
        keyed by them can meet a stranger.
        """
        if self._owner is not None:
            raise ConflictError(
                "this loaded base is owned by a full fine-tune, whose weights have replaced the base's",
                hint="load the base again for other techniques",
            )
        slot = Slot(self, self._next, seed, baked=baked)
        self._next += 1
        self.slots[slot.number] = slot
        try:
            for technique in techniques:
                technique.attach(slot)
        except BaseException:
            self._disown(slot)
            self.detach(slot)
            raise
        return slot

    def detach(self, slot: Slot) -> None:
        """Remove the slot; wrappers that nobody needs any more go with it. A `full` slot keeps the host for itself."""
        for module_name in slot.deltas:
            wrapper = self._linears[module_name]
            wrapper.deltas.pop(slot.number, None)
            if not wrapper.deltas:
                self._replace(module_name, wrapper.base)
                del self._linears[module_name]
        for name in slot.blocks:
            block = self._blocks[name]
            block.deltas.pop(slot.number, None)
            if not block.deltas:
                block.remove()
                del self._blocks[name]
        if self._embedding is not None:
            self._embedding.tables.pop(slot.number, None)
            if not self._embedding.tables:
                self._replace(self.placement.embedding(self.model), self._embedding.base)
                self._embedding = None
        self.slots.pop(slot.number, None)

    @contextmanager
    def run(self, plan: Plan) -> Iterator[None]:
        """The plan of everything inside, forward and backward. Passes do not nest."""
        assert self.plan is None, "a pass is already running on this base"
        self.plan = plan
        try:
            yield
        finally:
            self.plan = None
            plan.derived.clear()

    def running(self) -> Plan:
        """The plan of the running pass."""
        if self.plan is None:
            raise RuntimeError("the base runs inside `host.run(plan)` only")
        return self.plan

    def prefix_of(self, slot: int) -> Prefix | None:
        """The prefix of this slot, if it has one."""
        return self.slots[slot].prefix if slot in self.slots else None

    def claim(self, slot: Slot) -> None:
        """Let `slot` own the base's weights. Raises ConflictError when other slots depend on them."""
        others = [number for number in self.slots if number != slot.number]
        if others or slot.parameters:
            raise ConflictError(ALONE)
        self._owner = slot
        slot.owns_base = True

    def _disown(self, slot: Slot) -> None:
        """Undo `claim` for a slot that never came to train: the weights are still the base's."""
        if self._owner is slot:
            self._owner = None
            for parameter in slot.parameters.values():
                parameter.requires_grad_(False)

    def linear_names(self) -> list[str]:
        """Names of the linear layers a technique may target: those of the decoder layers, not the head."""
        prefix = self.placement.layers(self.model) + "."
        return [
            name
            for name, module in self.model.named_modules()
            if name.startswith(prefix) and is_linear(module) and not name.endswith(".base")
        ]

    def wrap_linear(self, name: str) -> SlotLinear:
        """The wrapper of a linear layer, made on first need."""
        if name not in self._linears:
            module = self.model.get_submodule(name)
            assert is_linear(module), f"{name} is not a linear layer"
            self._linears[name] = SlotLinear(module, name, self)
            self._replace(name, self._linears[name])
        return self._linears[name]

    def wrap_block(self, block: Block, layer: int) -> SlotBlock:
        """What stands on a block, made on first need."""
        entry, leave = self.placement.block(self.model, block, layer)
        name = f"{self.placement.layers(self.model)}.{layer}.{block}"
        if name not in self._blocks:
            modules = self.model.get_submodule(entry), self.model.get_submodule(leave)
            self._blocks[name] = SlotBlock(name, *modules, self)
        return self._blocks[name]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.model.get_submodule(self.placement.layers(self.model)))  # type: ignore[arg-type]

    def wrap_embedding(self) -> SlotEmbedding:
        """The wrapper of the input embedding, made on first need."""
        if self._embedding is None:
            name = self.placement.embedding(self.model)
            self._embedding = SlotEmbedding(self.model.get_submodule(name), self)
            self._replace(name, self._embedding)
        return self._embedding

    def embedding_shape(self) -> tuple[int, int]:
        """(vocabulary, hidden): how many words have a text, and the width a virtual token must have."""
        module = self.model.get_submodule(self.placement.embedding(self.model))
        return min(self.tokenizer.vocab_size, int(module.num_embeddings)), int(module.embedding_dim)  # type: ignore[arg-type]

    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings as the model sees them, over at most 4,096 words."""
        vocabulary, _ = self.embedding_shape()
        sample = self.embed(range(0, vocabulary, -(-vocabulary // 4096)))
        return float(sample.float().pow(2).mean().sqrt())

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """(n, hidden) of words, by calling the embedding: Gemma 3 scales inside it."""
        module = self.model.get_submodule(self.placement.embedding(self.model))
        plain = module.base if isinstance(module, SlotEmbedding) else module
        with torch.no_grad():
            vectors: Tensor = plain(torch.tensor(list(token_ids), device=self.device))
        return vectors

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


def layer_of(name: str) -> int:
    """The number of the decoder layer in a module's name: the first number between dots."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def match_names(names: Sequence[str], patterns: Sequence[str], what: str) -> list[str]:
    """The names that some pattern matches, in order. A pattern is a glob over the whole name or over its dotted end.

    `q_proj` matches `model.layers.0.self_attn.q_proj`; `layers.[0-3].*` restricts to layers. Raises ConfigError for a
    pattern that matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}")}
        if not hits:
            ends = sorted({n.rpartition(".")[2] if what != "parameter" else n for n in names})
            raise ConfigError(f"target {pattern!r} matches no {what} of this base", hint=nearest(pattern, ends[:40]))
        chosen |= hits
    return [name for name in names if name in chosen]
