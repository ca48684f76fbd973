"""The floor of a training step's time: its own matrix products, run back to back, with nothing between them.

Notation: T packed tokens of a micro-batch, t those of one row, N counted tokens, H hidden size, V vocabulary, r rank.

In the list are each linear layer forward (T·I·O) and backward through its input (T·O·I; not where nothing below is
trained), the gradients of the weights that train (LoRA: of A and B; full: of every weight, the head's included), the
head at the N counted tokens only, and attention as its two products forward and four backward, row by row, over the
half of the keys that causality leaves. Nothing is recomputed, and one buffer serves all products of a shape, so the
weights come from the caches: the floor is on the low side.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from train_worker import RANK, WARMUP, Channel, Job, num_tokens, read_steps

if TYPE_CHECKING:
    from torch import Tensor


class Product(NamedTuple):
    """(m, k) times (k, n), `batch` of them in one call; an operand may be stored the other way round."""

    m: int
    k: int
    n: int
    left_turned: bool = False
    right_turned: bool = False
    batch: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.k * self.n * self.batch


def forward(tokens: int, size_in: int, size_out: int) -> Product:
    """x Wᵀ, W stored (out, in)."""
    return Product(tokens, size_in, size_out, right_turned=True)


def through(tokens: int, size_in: int, size_out: int) -> Product:
    """The gradient of x: g W."""
    return Product(tokens, size_out, size_in)


def of_weight(tokens: int, size_in: int, size_out: int) -> Product:
    """The gradient of W: gᵀ x."""
    return Product(size_out, tokens, size_in, left_turned=True)


def linear(tokens: int, size_in: int, size_out: int, technique: str, flows: bool) -> Iterator[Product]:
    """One linear layer; `flows` says whether something below it trains."""
    products = [forward, *([through] if flows else []), *([of_weight] if technique == "full" else [])]
    yield from (product(tokens, size_in, size_out) for product in products)
    if technique == "lora":
        yield from (forward(tokens, size_in, RANK), forward(tokens, RANK, size_out))
        yield from (
            of_weight(tokens, RANK, size_out),
            through(tokens, RANK, size_out),
            of_weight(tokens, size_in, RANK),
        )
        if flows:
            yield through(tokens, size_in, RANK)


def attention(length: int, heads: int, size: int) -> list[Product]:
    """One row's attention: scores and values forward; gradients of values, weights, queries and keys backward."""
    keys = -(-length // 2)
    inward = Product(length, size, keys, right_turned=True, batch=heads)
    outward = Product(length, keys, size, batch=heads)
    turned = Product(keys, length, size, left_turned=True, batch=heads)
    return [inward, outward, turned, inward, outward, turned]


def products(shape: Mapping[str, int], technique: str, lengths: Sequence[int], counted: int) -> list[Product]:
    """Of one micro-batch with rows of these lengths, virtual tokens included."""
    tokens, hidden, inner = sum(lengths), shape["hidden_size"], shape["intermediate_size"]
    heads, size = shape["num_attention_heads"], shape["head_dim"]
    wide, narrow = heads * size, shape["num_key_value_heads"] * size
    found: list[Product] = []
    for layer in range(shape["num_hidden_layers"]):
        flows = layer > 0 or technique in ("full", "prompt_tuning")
        for size_out in (wide, narrow, narrow):
            found += linear(tokens, hidden, size_out, technique, flows)
        for length in lengths:
            found += attention(length, heads, size)
        for size_in, size_out in ((wide, hidden), (hidden, inner), (hidden, inner), (inner, hidden)):
            found += linear(tokens, size_in, size_out, technique, True)
    head = linear(counted, hidden, shape["vocab_size"], "full" if technique == "full" else "", True)
    return [*found, *head]


def micro_batches(job: Job, technique: str) -> list[list[tuple[list[int], int]]]:
    """(row lengths, counted tokens) of the micro-batches of every step, packed as the trainer packs them."""
    from tailor.data.examples import Example
    from tailor.data.packing import pack
    from tailor.training.settings import TrainSettings
    from tailor.training.trainer import place

    virtual = job.num_virtual_tokens if technique == "prompt_tuning" else 0
    steps = []
    for step in read_steps(job):
        examples = [(Example([0] * virtual + r["token_ids"], [0] * virtual + r["loss_mask"]),) for r in step]
        batches = pack(place(examples, 1), TrainSettings().tokens_per_batch)
        steps.append([([s.length for s in batch.segments], int(batch.loss_mask.sum())) for batch in batches])
    return steps


def model_shape(job: Job) -> Mapping[str, int]:
    """The workload's sizes, or those of the embedded base."""
    if job.workload.shape is not None:
        return job.workload.shape
    import transformers

    from tailor.models.files import EMBEDDED

    config: Mapping[str, Any] = transformers.AutoConfig.from_pretrained(str(EMBEDDED["tailor-nano"])).to_dict()
    return config


def measure(job: Job, channel: Channel) -> None:
    """For every technique the parent names: the next repetition's products of that technique."""
    import torch

    from tailor.models.base import DTYPES

    dtype, shape = DTYPES[job.workload.dtype], model_shape(job)
    steps = read_steps(job)
    done: dict[str, int] = {}
    channel.say(ready=True)
    while technique := channel.told():
        first = done.get(technique, WARMUP)
        done[technique] = first + job.workload.steps
        part = slice(first, done[technique])
        seconds, flops = 0.0, 0
        for batches in micro_batches(job, technique)[part]:
            for lengths, counted in batches:
                wanted = products(shape, technique, lengths, counted)
                with torch.no_grad():
                    seconds += run(wanted, dtype)
                flops += sum(product.flops for product in wanted)
        channel.say(seconds=seconds, tokens=sum(map(num_tokens, steps[part])), flops=flops)


def run(wanted: Sequence[Product], dtype: Any) -> float:
    """Seconds of the products in their order, each kind tried once before."""
    import torch

    operands = {product: _operands(product, dtype) for product in set(wanted)}
    for left, right, out in operands.values():
        torch.bmm(left, right, out=out) if out.dim() == 3 else torch.mm(left, right, out=out)
    started = time.perf_counter()
    for product in wanted:
        left, right, out = operands[product]
        torch.bmm(left, right, out=out) if out.dim() == 3 else torch.mm(left, right, out=out)
    return time.perf_counter() - started


def _operands(product: Product, dtype: Any) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    m, k, n, left_turned, right_turned, number = product
    batch = () if number == 1 else (number,)
    left = torch.randn(*batch, *((k, m) if left_turned else (m, k))).to(dtype)
    right = torch.randn(*batch, *((n, k) if right_turned else (k, n))).to(dtype)
    return (
        left.transpose(-1, -2) if left_turned else left,
        right.transpose(-1, -2) if right_turned else right,
        torch.empty(*batch, m, n, dtype=dtype),
    )
