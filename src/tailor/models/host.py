"""The host: one loaded model, its wrappers, its slots, and the plan of the pass that is running."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailor.data.packing import Segment
from tailor.errors import ConfigError, ConflictError
from tailor.models.block import SlotBlock
from tailor.models.embedding import SlotEmbedding
from tailor.models.kv_cache import KVCache
from tailor.models.linear import SlotLinear, is_linear
from tailor.models.placement import Block, Placement
from tailor.models.plan import Plan
from tailor.models.prefix import Prefix
from tailor.models.slots import ALONE, BASE_SLOT, Slot
from tailor.text.tokenizer import Tokenizer


class SlotHost:
    """Holds the model, its `weights`, its wrappers and its slots, and the plan of the pass that is running."""

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
        self.weights = tuple(model.parameters())
        for parameter in self.weights:
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
                slot.attaching = technique
                technique.attach(slot)
        except BaseException:
            self._disown(slot)
            self.detach(slot)
            raise
        return slot

    def detach(self, slot: Slot) -> None:
        """Remove the slot; wrappers that nobody needs any more go with it. A `full` slot keeps the host for itself."""
        freed = list(slot.deltas)
        for name in slot.blocks:
            block = self._blocks[name]
            block.deltas.pop(slot.number, None)
            if not block.deltas:
                block.remove()
                freed += block.linears
                del self._blocks[name]
        held = {module_name for block in self._blocks.values() for module_name in block.linears}
        for module_name in dict.fromkeys(freed):
            wrapper = self._linears[module_name]
            wrapper.deltas.pop(slot.number, None)
            if not wrapper.deltas and module_name not in held:
                self._replace(module_name, wrapper.base)
                del self._linears[module_name]
        if self._embedding is not None:
            self._embedding.tables.pop(slot.number, None)
            self._embedding.words.pop(slot.number, None)
            if not (self._embedding.tables or self._embedding.words):
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

    @property
    def owner(self) -> Slot | None:
        """The slot whose training has replaced the base's weights, detached or not; None while they are the base's."""
        return self._owner

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
        name = f"{self.placement.layers(self.model)}.{layer}.{block}"
        if name not in self._blocks:
            ends = self.placement.block(self.model, block, layer)
            # OPT's MLP is two linear layers: their wrappers, which may come and go, are what the model calls
            linears = [end for end in dict.fromkeys(ends) if is_linear(self.model.get_submodule(end))]
            for linear in linears:
                self.wrap_linear(linear)
            entry, leave = (self.model.get_submodule(end) for end in ends)
            self._blocks[name] = SlotBlock(name, entry, leave, self, linears)
        return self._blocks[name]

    def linear_named(self, name: str) -> SlotLinear | None:
        """The wrapper of a linear layer, if some slot changes it."""
        return self._linears.get(name)

    def block_named(self, name: str) -> SlotBlock | None:
        """What stands on a block, by the name of its layer and `attention` or `mlp`, if some slot adds to it."""
        return self._blocks.get(name)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.model.get_submodule(self.placement.layers(self.model)))  # type: ignore[arg-type]

    def layer_numbers(self, chosen: Sequence[int] | None) -> list[int]:
        """The chosen decoder layers in order, all for None. Raises ConfigError for one that is not there."""
        if chosen is None:
            return list(range(self.num_layers))
        if absent := sorted(set(chosen) - set(range(self.num_layers))):
            last = self.num_layers - 1
            raise ConfigError(f"target_layers: there is no layer {absent[0]}; layers are 0 to {last}")
        return sorted(set(chosen))

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(L, G, D): decoder layers, key/value heads, head size.

        As the attention modules have them: a config may carry numbers that its architecture does not read.
        """
        block = self.model.get_submodule(self.placement.block(self.model, "attention", 0)[0])
        module = next(m for m in block.modules() if hasattr(m, "layer_idx"))
        size = getattr(module, "head_dim", None) or module.head_size
        groups = self.model.config.num_attention_heads // getattr(module, "num_key_value_groups", 1)  # type: ignore[union-attr, operator]
        return self.num_layers, int(groups), int(size)  # type: ignore[arg-type]

    @torch.no_grad()
    def keys_values(self, token_ids: Sequence[int]) -> Tensor:
        """(L, 2, G, S, D) keys and values that the plain base computes for a sequence, in a pass of its own.

        Without numbers on the meta device.
        """
        cache, num = KVCache(), len(token_ids)
        if self.device.type == "meta":
            layers, groups, size = self.kv_shape
            return torch.empty(layers, 2, groups, num, size, dtype=self.dtype, device=self.device)
        positions = torch.arange(num, device=self.device)
        with self.run(Plan.of([Segment(0, num, BASE_SLOT)], caches=[cache])):
            decoder: nn.Module = self.model.base_model  # type: ignore[assignment]
            decoder(inputs_embeds=self.embed(token_ids)[None], position_ids=positions[None], use_cache=False)
        return cache.layers()

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

    def word_weights(self) -> tuple[Tensor, Tensor]:
        """(V, H) weights of the embedding and of the head, the same tensor where they are tied."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        return embedding.weight, head.weight  # type: ignore[return-value]

    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings as the model sees them, over at most 4,096 words.

        1 on the meta device, where there are no numbers.
        """
        if self.device.type == "meta":
            return 1.0
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
