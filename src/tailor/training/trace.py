"""One training pass on torch's meta device: which tensors it holds, when, and how many operations it takes.

The pass runs the model's own code on tensors that have a shape and no memory, so it knows every architecture and every
technique without a formula for any of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from tailor.data.packing import Batch, Segment
from tailor.models import attention
from tailor.models.attention import ATTENTION
from tailor.models.base import Base
from tailor.models.embedding import SlotEmbedding
from tailor.models.files import resolve
from tailor.models.fused import fuse
from tailor.models.loss_head import token_logprobs
from tailor.models.placement import read_config
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.text.tokenizer import VIRTUAL, load_tokenizer
from tailor.training.estimate import HEAP_LIMIT, Pass

META = torch.device("meta")
aten = torch.ops.aten


def weightless_base(name: str, dtype: torch.dtype, device: torch.device) -> Base:
    """The base with its tokenizer and slots as it is on `device`, but without weights: tensors are on the meta device.

    Takes no memory and downloads no weights. Raises NotFoundError, AuthError, and ConfigError for refused bases.
    """
    from transformers import AutoModelForCausalLM

    folder = resolve(name, weights=False)
    config = read_config(folder)
    attention.register()
    with META:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    model.eval()
    model.set_attn_implementation(ATTENTION)
    if device.type == "cpu":
        fuse(model)
    return Base(name, folder, model, load_tokenizer(folder), META, "")


def trace_pass(base: Base, slot: Slot, batch: Batch) -> Pass:
    """What one forward and backward pass over `batch` holds and computes. `base` is weightless, `slot` is on it."""
    plan = Plan.of([_in_slot(segment, slot.number) for segment in batch.segments])
    targets = torch.zeros(int(batch.loss_mask.sum()), dtype=torch.long, device=META)
    ids = torch.zeros(batch.num_tokens, dtype=torch.long, device=META)
    hooks = [*_prepare_gradients(slot), *_feed_virtual_tokens(base, slot, batch)]
    ledger = _Ledger([*base.model.parameters(), *base.model.buffers(), *_own(slot)])
    try:
        with base.host.run(plan), _FusedAttention(ledger), ledger:
            hidden = base.hidden(plan, ids, ids)
            kept = ledger.highest = ledger.live
            counted = hidden[targets]
            if counted.requires_grad:
                counted.register_hook(ledger.end_of_head)
            logprobs = token_logprobs(counted, base.head_of(slot.number), targets)
            del hidden, counted
            forward_flops = ledger.flops
            logprobs.sum().backward()
            del logprobs
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in slot.parameters.values():
            parameter.grad = None
    dropped = _dropout_bytes(base, slot, batch.num_tokens)
    return Pass(
        tokens=batch.num_tokens,
        targets=len(targets),
        activations=kept + dropped,
        logits=(ledger.head or ledger.highest) - kept,
        peak=ledger.peak + dropped,
        heap=ledger.heap_at_peak + dropped,
        forward_flops=forward_flops,
        flops=ledger.flops,
    )


def _in_slot(segment: Segment, slot: int) -> Segment:
    return Segment(segment.start, segment.end, slot, segment.parent, segment.position0)


def _own(slot: Slot) -> list[Tensor]:
    gradients = [p.grad for p in slot.parameters.values() if p.grad is not None]
    return [*slot.parameters.values(), *gradients]


def _prepare_gradients(slot: Slot) -> list[RemovableHandle]:
    """Gradients go where FlatAdamW keeps them: into its buffer, which is there already, or through a hook of its."""
    hooks = []
    for parameter in slot.parameters.values():
        if parameter.dtype == torch.promote_types(parameter.dtype, torch.float32):
            parameter.grad = torch.empty_like(parameter)
        else:
            hooks.append(parameter.register_post_accumulate_grad_hook(_forget))
    return hooks


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _feed_virtual_tokens(base: Base, slot: Slot, batch: Batch) -> list[RemovableHandle]:
    """On the meta device no id is known to be virtual, so the rows are put in here, as SlotEmbedding puts them."""
    if not slot.virtual_ids:
        return []
    places = torch.zeros(int((batch.input_ids >= VIRTUAL).sum()), dtype=torch.long, device=META)

    def put(module: nn.Module, inputs: tuple[Tensor, ...], words: Tensor) -> Tensor:
        assert isinstance(module, SlotEmbedding)
        rows = module.tables[slot.number][0].rows()[places].to(words.dtype)
        return words[0].index_put((places,), rows)[None]

    return [base.host.wrap_embedding().register_forward_hook(put)]


def _dropout_bytes(base: Base, slot: Slot, tokens: int) -> int:
    """The mask of every dropout and its input times the mask: drawn by a generator, which the meta device lacks."""
    inputs = [base.host.wrap_linear(n).in_features for n, every in slot.deltas.items() for d in every if d.dropout]
    outputs = [int(base.config.hidden_size) for every in slot.blocks.values() for d in every if d.dropout]
    return 2 * tokens * sum(inputs + outputs) * base.dtype.itemsize


class _Ledger(TorchDispatchMode):
    """Counts the bytes of every storage made inside while it lives, and the operations of matrix products.

    `heap_at_peak` is the part of the peak in tensors below HEAP_LIMIT, `highest` the peak since it was last set, and
    `head` what that was when the loss head's backward ended.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.heap_at_peak = self.highest = self.head = self.flops = 0
        self._heap = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return 0  # "is any token virtual?", "is the row longer than the context?": no
        result = _grouped(func, args) if func is aten._grouped_mm.default else func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._free, key, size)
        self.live += size
        self._heap += size * (size < HEAP_LIMIT)
        self.highest = max(self.highest, self.live)
        if self.live > self.peak:
            self.peak, self.heap_at_peak = self.live, self._heap

    def end_of_head(self, grad: Tensor) -> None:
        """Called by autograd when the gradient of the head's input is there."""
        self.head = self.highest

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
        self._heap -= size * (size < HEAP_LIMIT)


def _grouped(func: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    """Experts' grouped product: on the meta device torch insists on bfloat16."""
    result: Tensor = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:])
    return result.to(args[0].dtype)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Two per multiply-add, by torch's own formulas; in-place addmm and the experts' product have none there."""
    packet = func._overloadpacket
    if packet is aten.addmm_:
        return 2 * int(args[1].shape[0]) * int(args[1].shape[1]) * int(args[2].shape[1])
    if packet is aten._grouped_mm:
        return 2 * int(args[0].numel()) * int(args[1].shape[-1])
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch picks the attention that writes all scores down; real devices have a fused one."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*args[:3], (kwargs or {}).get("attn_mask"), self.ledger)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """What fused kernels allocate: q (1, H, t, D), k and v (1, G, s, D) → output like q, kept with one fp32 per row.

    A mask (t, s) is kept too, in the type of q.

    Operations as FlashAttention-2 counts them (arXiv:2307.08691 section 4.1): two products forward, five backward,
    half of each for the causal mask.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, ledger: _Ledger) -> Tensor:
        output = query.new_empty(query.shape)
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums, None if mask is None else mask.to(query.dtype))
        ctx.ledger, ctx.product = ledger, query.numel() * key.shape[2]
        ledger.flops += 2 * ctx.product
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.ledger.flops += 5 * ctx.product
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
