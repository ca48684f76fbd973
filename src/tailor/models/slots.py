"""Slots: many customizations attached to one loaded, frozen base, sharing its passes.

Attaching only adds; techniques wrap modules from outside and the model's own code never hears of them. Slot 0 is the
plain base. What a slot adds is found through the running `Plan`, which names the tokens of every slot.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailor.errors import ConfigError, ConflictError, nearest
from tailor.metrics.votes import Votes
from tailor.models.block import BlockDelta
from tailor.models.derived import Baked, Derived, T
from tailor.models.dropout import stable_seed
from tailor.models.embedding import VirtualTokens
from tailor.models.linear import LinearDelta
from tailor.models.new_tokens import NewRows
from tailor.models.nf4 import nf4_layers
from tailor.models.placement import Block
from tailor.models.prefix import Prefix
from tailor.text.messages import Message
from tailor.text.render import Renderer, make_renderer
from tailor.text.template import TaskPrompt, Template
from tailor.text.tokenizer import VIRTUAL, Tokenizer

if TYPE_CHECKING:
    from tailor.models.host import SlotHost

    pass

BASE_SLOT = 0
"""The slot number of rows that belong to no customization."""

ALONE = "full fine-tuning changes the base itself and runs alone: no other slot or technique"

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""What torch counts up with every change of a tensor in place."""

Compose = Callable[[tuple[Message, ...]], tuple[Message, ...]]


class Slot:
    """One customization attached right now: its parameters, its virtual tokens, its rewriting of the prompt.

    Techniques fill it in `attach` through `new_parameter` and `add_delta`, `add_block`, `add_virtual_tokens`,
    `add_prefix`, `own` and `compose`. `owners` tells whose a parameter is, `rates` multiples of the learning rate.
    `baked`: what only trains (encoders) is not there; `num_dropped` is how many parameters that were. `revision` counts
    changes of the parameters that torch does not see. `prompts` has the virtual ids of every task, with its template;
    a slot of one task may leave it unnamed (""). `renderer` is its own where it has words of its own.
    """

    def __init__(self, host: SlotHost, number: int, seed: int, *, baked: bool = False) -> None:
        self.host = host
        self.number = number
        self.seed = seed
        self.baked = baked
        self.revision = 0
        self.parameters: dict[str, nn.Parameter] = {}
        self.owners: dict[str, Any] = {}
        self.attaching: Any = None
        self.rates: dict[str, float] = {}
        self.num_dropped = 0
        self.deltas: dict[str, list[LinearDelta]] = {}
        self.blocks: dict[str, list[BlockDelta]] = {}
        self.prefix: Prefix | None = None
        self._bakes: list[Baked] = []
        self._taken: set[str] = set()
        self.virtual_tokens: dict[str, VirtualTokens] = {}
        self.prompts: dict[str, TaskPrompt] = {}
        self.new_rows: NewRows | None = None
        self.renderer: Renderer | None = None
        self.compose: Compose | None = None
        self.answer_pattern: str | None = None
        self.votes: Votes | None = None
        self.owns_base = False
        self._seen = (-1, -1)
        self._epoch = 0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def has_dropout(self) -> bool:
        """Whether its passes in training are noisy: then no two sequences may share what is drawn for one."""
        every: list[Sequence[LinearDelta | BlockDelta]] = [*self.deltas.values(), *self.blocks.values()]
        return any(delta.dropout for deltas in every for delta in deltas)

    @property
    def num_prefix(self) -> int:
        """Positions of the context that its prefix takes."""
        return self.prefix.num if self.prefix else 0

    def num_operations(self) -> int:
        """Multiplications per token that its linear layers and blocks add to the base's."""
        every: list[Sequence[LinearDelta | BlockDelta]] = [*self.deltas.values(), *self.blocks.values()]
        return sum(delta.num_operations() for deltas in every for delta in deltas)

    @property
    def lowest_layer(self) -> int:
        """The lowest decoder layer that it changes; below it nothing needs a gradient. -1: the embedding."""
        if self.virtual_ids or self.new_rows or self.owns_base:
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
        self._take(name)
        # a copy: what the technique keeps of `value` must not move with it
        parameter = nn.Parameter(self.constant(value).clone(memory_format=torch.contiguous_format))
        self.parameters[name] = parameter
        self.owners[name] = self.attaching
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
        rate: float = 1.0,
    ) -> Baked:
        """A tensor that is computed from the parameters of `start()` until `bake`, and a parameter from then on.

        `rate` multiplies their learning rate.
        """
        if not self.baked:
            self._take(name)
        self._bakes.append(Baked(self, name, shape, start, compute, rate))
        return self._bakes[-1]

    def _take(self, name: str) -> None:
        """Keep a name for one parameter, be it one that is there after `bake` only."""
        if name in self._taken:
            raise ConfigError(f"two techniques of one list both want to add {name}", hint="give each its own targets")
        self._taken.add(name)

    def bake(self) -> dict[str, Tensor]:
        """Drop what only trains, keeping its results. Returns the whole state before, from which training can go on;
        empty when there was nothing to drop."""
        if self.baked or not self._bakes:
            return {}
        before, trained = self.state(), self.num_parameters
        for baked in self._bakes:
            self._taken.discard(baked.name)
            baked.bake()
        self.touch()
        self.baked = True
        self.num_dropped = trained - self.num_parameters
        return before

    @property
    def epoch(self) -> int:
        """Counts up whenever a parameter has changed: what was computed from them is kept under it."""
        now = (self.revision, sum(map(version_of, self.parameters.values())))
        if now != self._seen:
            self._seen = now
            self._epoch += 1
        return self._epoch

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

    def add_virtual_tokens(self, tokens: VirtualTokens, *, task: str = "", template: Template | None = None) -> None:
        """Give the slot rows of its own past the vocabulary, for all its sequences or (several times) for one task.

        They lead a sequence, or stand at the template's markers.
        """
        if task in self.prompts or (self.prompts and "" in (task, *self.prompts)):
            raise ConfigError("two techniques of one list both want to add virtual tokens")
        first = VIRTUAL + len(self.virtual_ids)
        self.host.wrap_embedding().tables.setdefault(self.number, []).append(tokens)
        self.virtual_tokens[task] = tokens
        self.prompts[task] = TaskPrompt(tuple(range(first, first + tokens.num)), template)

    def add_words(self, tokenizer: Tokenizer, rows: NewRows) -> None:
        """Give the slot words of its own: the base's tokenizer with them added, and their rows."""
        if self.new_rows is not None:
            raise ConfigError("two techniques of one list both want to add words", hint="name all words in one")
        self.host.wrap_embedding().words[self.number] = rows
        self.new_rows, self.renderer = rows, make_renderer(tokenizer)

    @property
    def virtual_ids(self) -> tuple[int, ...]:
        """Its virtual tokens, those of all tasks."""
        return tuple(range(VIRTUAL, VIRTUAL + sum(tokens.num for tokens in self.virtual_tokens.values())))

    def own(self, patterns: Sequence[str] | None) -> None:
        """Train the base's own weights (all, or those whose names match); the host then serves this slot alone.

        Raises ConfigError on a quantised base.
        """
        if nf4_layers(self.host.model):
            raise ConfigError(
                "full fine-tuning needs the base's own weights; this base keeps them in 4 bits (quantize: nf4)",
                hint="leave quantize out, or use a technique that trains beside the base (lora is QLoRA then)",
            )
        names = [name for name, _ in self.host.model.named_parameters()]
        chosen = match_names(names, patterns, "parameter") if patterns else names
        self.host.claim(self)
        for name in chosen:
            parameter = self.host.model.get_parameter(name)
            parameter.requires_grad_(True)
            self.parameters[name] = parameter

    def state(self, of: Any = None) -> dict[str, Tensor]:
        """The slot's parameters by name, detached and on the CPU; with `of` those of one of its techniques."""
        names = [name for name in self.parameters if of is None or self.owners.get(name) == of]
        return {name: self.parameters[name].detach().cpu().clone() for name in names}

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
        self.touch()


def layer_of(name: str) -> int:
    """The number of the decoder layer in a module's name: the first number between dots."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def matches(name: str, pattern: str) -> bool:
    """Whether a glob fits the whole name or its dotted end."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def match_names(names: Sequence[str], patterns: Sequence[str], what: str) -> list[str]:
    """The names that some pattern matches, in order. A pattern is a glob over the whole name or over its dotted end.

    `q_proj` matches `model.layers.0.self_attn.q_proj`; `layers.[0-3].*` restricts to layers. Raises ConfigError for a
    pattern that matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if matches(name, pattern)}
        if not hits:
            ends = sorted({n.rpartition(".")[2] if what != "parameter" else n for n in names})
            raise ConfigError(f"target {pattern!r} matches no {what} of this base", hint=nearest(pattern, ends[:40]))
        chosen |= hits
    return [name for name in names if name in chosen]
