"""How fast this machine trains, measured in about a second on one decoder layer with random weights.

The layer is the base's own, with the technique on it, at the run's own row lengths, precision and device: its time
holds the matrix products and all the small operations between them. Layers of one kind take the same time.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailor.data.packing import Segment
from tailor.models.base import Base
from tailor.models.loss_head import Head, chunk_rows, token_logprobs
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.training.estimate import Speed
from tailor.training.optimizer import FlatAdamW

SECONDS = 0.1
"""How long one thing is measured, warm-up aside, and REPEATS times."""

REPEATS = 3

SLOW = 0.6
"""Seconds after which fewer repeats will do: the machine is busy, or the rows are long."""

ENOUGH = 0.05
"""A pass of this many seconds tells enough: the measured part of the rows grows from FEW tokens until it takes that."""

FEW = 64
GROWTH = 4

OPTIMIZED = 1 << 22
"""Parameters of the measured optimizer step: 64 MiB of state, more than caches hold. Longer ones take in proportion."""

MATRIX = 1 << 26
"""Elements of the largest measured word matrix; larger ones take in proportion to their vocabulary."""


class Kind(NamedTuple):
    """Layers that take the same time: shapes, what is trained in them, and whether gradients flow to what is below."""

    shapes: tuple[torch.Size, ...]
    trained: tuple[tuple[str, torch.Size], ...]
    flows: bool


def measure_speed(base: Base, slot: Slot, lengths: Sequence[int], targets: int, device: torch.device) -> Speed:
    """Seconds per token, counted token, micro-batch and step, with rows of `lengths` and `targets` counted in a pass.

    `base` is weightless and `slot` on it; layers of it are given weights, so it is of no use afterwards.
    """
    decoder = _Decoder(base, slot, device)
    lengths = decoder.enough(lengths)
    empty, empty_forward = (decoder.seconds(None, lengths, backward=backward) for backward in (True, False))
    layers = layers_forward = 0.0
    for kind, number in Counter(decoder.kinds).items():
        place = decoder.kinds.index(kind)
        layers += number * max(0.0, decoder.seconds(place, lengths, backward=True) - empty)
        layers_forward += number * max(0.0, decoder.seconds(place, lengths, backward=False) - empty_forward)
    head, head_forward = _head(base, slot, targets, device)
    return Speed(
        layers=layers / sum(lengths),
        layers_forward=layers_forward / sum(lengths),
        head=head,
        head_forward=head_forward,
        per_pass=empty + _embedding(base, slot, sum(lengths), device),
        per_step=_optimizer_step(slot, device),
    )


def layer_kinds(base: Base, slot: Slot) -> list[Kind]:
    """The kind of every decoder layer, the lowest first."""
    stack = base.host.placement.layers(base.model)
    layers: nn.ModuleList = base.model.get_submodule(stack)  # type: ignore[assignment]
    embedding = base.model.get_input_embeddings().weight  # type: ignore[operator]
    flows = bool(slot.virtual_ids) or any(p is embedding for p in slot.parameters.values())
    kinds = []
    for number, layer in enumerate(layers):
        prefix = f"{stack}.{number}."
        own = {name.removeprefix(prefix): p.shape for name, p in slot.parameters.items() if name.startswith(prefix)}
        kinds.append(Kind(tuple(p.shape for p in layer.parameters()), tuple(own.items()), flows))
        touched = slot.prefix is not None or any(name.startswith(prefix) for name in (*slot.deltas, *slot.blocks))
        flows = flows or bool(own) or touched
    return kinds


class _Decoder:
    """The base's decoder with none or one of its layers."""

    def __init__(self, base: Base, slot: Slot, device: torch.device) -> None:
        self.base, self.slot, self.device = base, slot, device
        self.name = base.host.placement.layers(base.model)
        self.layers: nn.ModuleList = base.model.get_submodule(self.name)  # type: ignore[assignment]
        self.kinds = layer_kinds(base, slot)
        base.model.set_submodule(self.name, nn.ModuleList())
        embedding: nn.Module = base.model.get_input_embeddings()  # type: ignore[operator]
        for module in base.model.base_model.modules():  # type: ignore[union-attr]
            if module not in set(embedding.modules()):
                _fill(module, device)

    def enough(self, lengths: Sequence[int]) -> list[int]:
        """As many of the rows as tell enough, at least the beginning of one."""
        wanted = FEW
        while True:
            few = list(_cut(lengths, wanted))
            if few == list(lengths) or self._once(len(self.kinds) - 1, few, backward=True)() > ENOUGH:
                return few
            wanted *= GROWTH

    def seconds(self, place: int | None, lengths: Sequence[int], *, backward: bool) -> float:
        """Of one pass through the layer at `place`, or through what stands around the layers."""
        return _median(self._once(place, lengths, backward=backward))

    def _once(self, place: int | None, lengths: Sequence[int], *, backward: bool) -> Callable[[], float]:
        flows = self.kinds[place if place is not None else -1].flows or place is None
        if place is not None:
            self._fill_layer(place)
        stack = nn.ModuleList([] if place is None else [self.layers[place]])
        self.base.model.set_submodule(self.name, stack)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        segments = [Segment(end - n, end, self.slot.number) for n, end in zip(lengths, ends, strict=True)]
        plan = Plan.of(segments, training=backward)
        width = self.base.host.embedding_shape()[1]
        embeds = _random((1, ends[-1], width), self.base.dtype, self.device).requires_grad_(flows)
        positions = torch.cat([torch.arange(n, device=self.device) for n in lengths])[None]

        def once() -> float:
            embeds.grad = None
            started = time.perf_counter()
            with torch.set_grad_enabled(backward), self.base.host.run(plan):
                output = self.base.model.base_model(  # type: ignore[operator]
                    inputs_embeds=embeds, position_ids=positions, use_cache=False
                ).last_hidden_state
                if output.requires_grad:
                    output.backward(output.detach())
            _wait(self.device)
            return time.perf_counter() - started

        return once

    def _fill_layer(self, place: int) -> None:
        for module in self.layers[place].modules():
            _fill(module, self.device)
        for name, parameter in self.slot.parameters.items():
            shared = not self.slot.owns_base and not name.startswith(f"{self.name}.")
            if shared or name.startswith(f"{self.name}.{place}."):
                _give(parameter, self.device)
                if parameter.dtype == torch.promote_types(parameter.dtype, torch.float32):
                    parameter.grad = torch.zeros_like(parameter)


def _cut(lengths: Sequence[int], tokens: int) -> Iterator[int]:
    for length in lengths:
        if tokens > 0:
            yield min(length, tokens)
        tokens -= length


def _fill(module: nn.Module, device: torch.device) -> None:
    """Values for the module's own parameters and buffers. Times do not depend on them, unless they vanish."""
    for parameter in module._parameters.values():
        if parameter is not None:
            _give(parameter, device)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.full(buffer.shape, 0.01, device=device).to(buffer.dtype)


def _give(parameter: Tensor, device: torch.device) -> None:
    if parameter.is_meta:
        value = _random(tuple(parameter.shape), parameter.dtype, device)
        torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers of a weight's size; a block of them over and over, which is as good here and quicker."""
    block = torch.randn(1 << 16, device=device).mul_(0.02).to(dtype)
    size = torch.Size(shape).numel()
    return block.repeat(-(-size // block.numel()))[:size].view(*shape)


def _head(base: Base, slot: Slot, targets: int, device: torch.device) -> tuple[float, float]:
    """Seconds per counted token of the loss head: forward and backward, and forward alone."""
    head = base.head
    vocabulary, hidden = head.weight.shape
    rows = min(vocabulary, max(1, MATRIX // hidden))
    trained = any(p is head.weight for p in slot.parameters.values())
    weight = _random((rows, hidden), head.weight.dtype, device).requires_grad_(trained)
    measured = Head(weight, None, head.scale, head.softcap)

    def once(count: int, backward: bool) -> float:
        states = _random((count, hidden), head.weight.dtype, device).requires_grad_(backward)
        wanted = torch.zeros(count, dtype=torch.long, device=device)
        _wait(device)
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            logprobs = token_logprobs(states, measured, wanted)
            if backward:
                logprobs.sum().backward()
        _wait(device)
        return time.perf_counter() - started

    most = max(1, min(chunk_rows(head.weight), targets))
    count = min(FEW, most)
    while count < most and once(count, True) < ENOUGH:
        count = min(most, GROWTH * count)
    both, forward = (_median(partial(once, count, backward)) for backward in (True, False))
    return both / count * vocabulary / rows, forward / count * vocabulary / rows


def _embedding(base: Base, slot: Slot, tokens: int, device: torch.device) -> float:
    """Seconds per pass of a trained embedding: its gradient is as large as the whole matrix."""
    meta: Tensor = base.model.get_input_embeddings().weight  # type: ignore[operator]
    if not any(p is meta for p in slot.parameters.values()):
        return 0.0
    rows = min(meta.shape[0], max(1, MATRIX // meta.shape[1]))
    weight = _random((rows, meta.shape[1]), meta.dtype, device).requires_grad_()
    ids = torch.arange(tokens, device=device) % rows

    def once() -> float:
        started = time.perf_counter()
        F.embedding(ids, weight).sum().backward()
        _wait(device)
        return time.perf_counter() - started

    return _median(once) * meta.shape[0] / rows


def _optimizer_step(slot: Slot, device: torch.device) -> float:
    """Seconds of clearing, measuring and applying the gradients."""
    total = slot.num_parameters
    dtype = next(iter(slot.parameters.values())).dtype
    measured = min(total, OPTIMIZED)
    parameter = nn.Parameter(_random((measured,), dtype, device))
    optimizer = FlatAdamW({"measured": parameter}, 0.0, (0.9, 0.999))

    def once() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        optimizer.grad_norm()
        optimizer.step(1e-6, 1.0)
        _wait(device)
        return time.perf_counter() - started

    seconds = _median(once)
    optimizer.close()
    return seconds * total / measured


def _median(once: Callable[[], float]) -> float:
    """The middle one of several measurements, after one to warm up."""
    once()
    found: list[float] = []
    while sum(found) < SECONDS or (len(found) < REPEATS and sum(found) < SLOW):
        found.append(once())
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    """Let everything that was asked of a GPU come to an end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
