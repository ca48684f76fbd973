"""A pass on the meta device holds and computes what the same pass does on the CPU, for every kind of architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tailor.data.examples import Example
from tailor.data.packing import Batch, Placed, pack
from tailor.models.base import Base, wrap_model
from tailor.models.loss_head import token_logprobs
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.techniques import Technique
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.training.trace import trace_pass, weightless_base
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

TECHNIQUES: dict[str, Technique] = {
    "lora": LoRA(rank=4),
    "upper lora": LoRA(rank=4, target_layers=(2,)),
    "dora": LoRA(rank=4, dora=True),
    "pissa": LoRA(rank=4, init="pissa"),
    "full": Full(),
    "prompt_tuning": PromptTuning(num_virtual_tokens=4),
    "p_tuning": PTuning(num_virtual_tokens=4, condition="fox"),
    "prefix_tuning": PrefixTuning(num_virtual_tokens=4, reparametrisation=True, encoder_hidden=16),
}
LENGTHS = (30, 44, 26)
SIZES = {"hidden_size": 64, "intermediate_size": 96}
GPT2_SIZES = {"n_embd": 64}


def saved(folder: Path, model_type: str, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    """A tiny model, in memory and as a folder."""
    model = tiny_model(model_type, dtype, **(GPT2_SIZES if model_type == "gpt2" else SIZES))
    model.save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return model, str(folder)


def batch_for(slot: Slot) -> Batch:
    examples = []
    for number, length in enumerate(LENGTHS):
        words = [5 + (7 * k + number) % 300 for k in range(length)]
        mask = [0] * (len(slot.virtual_ids) + length - 8) + [1] * 8
        examples.append(Placed(Example([*slot.virtual_ids, *words], mask), slot.number))
    return pack(examples, 1000)[0]


class Held:
    """The storages that a real pass keeps for backward, weights aside."""

    def __init__(self, base: Base, slot: Slot) -> None:
        own = [*base.model.parameters(), *base.model.buffers(), *slot.parameters.values()]
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.sizes: dict[int, int] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.sizes[storage._cdata] = storage.nbytes()
        return tensor


def real_pass(base: Base, slot: Slot, batch: Batch) -> tuple[int, int]:
    """(bytes kept by the decoder, operations of matrix products) on the CPU."""
    held, plan = Held(base, slot), Plan.of_batch(batch)
    counter = FlopCounterMode(display=False)
    with base.host.run(plan), counter:
        with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda tensor: tensor):
            hidden = base.hidden(plan, batch.input_ids, batch.position_ids)
            held.keep(hidden)
        kept = sum(held.sizes.values())
        token_logprobs(hidden[batch.loss_mask], base.head, batch.targets[batch.loss_mask]).sum().backward()
    return kept, counter.get_total_flops()


@pytest.mark.parametrize(
    ("model_type", "technique"),
    [*(("llama", name) for name in TECHNIQUES), ("gemma2", "lora"), ("gpt2", "full"), ("opt", "prompt_tuning")],
)
def test_activations_are_those_of_a_real_pass(tmp_path: Path, model_type: str, technique: str) -> None:
    model, name = saved(tmp_path, model_type)
    real = wrap_model(model, tiny_tokenizer(), torch.device("cpu"))
    real_slot = real.host.attach([TECHNIQUES[technique]])
    base = weightless_base(name, torch.float32, torch.device("cpu"))
    slot = base.host.attach([TECHNIQUES[technique]])
    batch = batch_for(real_slot)
    kept, _ = real_pass(real, real_slot, batch)
    found = trace_pass(base, slot, batch)
    assert found.activations == pytest.approx(kept, rel=0.03)  # ids, positions and scalars are not counted
    assert found.heap == found.peak >= found.activations + found.logits
    # logits, their softmax, their gradient; the hidden states themselves are let go
    assert found.logits >= 3 * 4 * found.targets * 320 - 4 * 64 * found.tokens
    assert (found.tokens, found.targets) == (batch.num_tokens, int(batch.loss_mask.sum()))


@pytest.mark.parametrize("technique", ["full", "prompt_tuning"])
def test_operations_are_those_of_a_real_pass(tmp_path: Path, technique: str) -> None:
    model, name = saved(tmp_path, "llama")
    real = wrap_model(model, tiny_tokenizer(), torch.device("cpu"))
    real_slot = real.host.attach([TECHNIQUES[technique]])
    base = weightless_base(name, torch.float32, torch.device("cpu"))
    batch = batch_for(real_slot)
    _, flops = real_pass(real, real_slot, batch)
    found = trace_pass(base, base.host.attach([TECHNIQUES[technique]]), batch)
    # torch's counter has no formula for the CPU's fused attention: 7 halved products of t × t × 64 per row and layer
    attention = sum(3 * 7 * 64 * segment.length**2 for segment in batch.segments)
    assert found.flops == flops + attention


def test_lora_adds_its_own_products(tmp_path: Path) -> None:
    _, name = saved(tmp_path, "llama")
    flops = {}
    for rank in (1, 5):
        base = weightless_base(name, torch.float32, torch.device("cpu"))
        slot = base.host.attach([LoRA(rank=rank, target_modules=("q_proj",))])
        flops[rank] = trace_pass(base, slot, batch_for(slot)).forward_flops
    # two products of rank × 64 per token and layer, two operations each
    assert flops[5] - flops[1] == 4 * (64 + 64) * 2 * sum(LENGTHS) * 3


def test_nothing_is_differentiated_below_the_lowest_trained_layer(tmp_path: Path) -> None:
    _, name = saved(tmp_path, "llama")
    found = []
    for layers in ((0,), (2,)):
        base = weightless_base(name, torch.float32, torch.device("cpu"))
        slot = base.host.attach([LoRA(rank=4, target_layers=layers)])
        found.append(trace_pass(base, slot, batch_for(slot)))
    assert found[1].activations < found[0].activations / 2
    assert found[1].flops < found[0].flops
    assert found[1].forward_flops == found[0].forward_flops


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_is_traced_without_memory(tmp_path: Path, model_type: str) -> None:
    _, name = saved(tmp_path, model_type)
    for technique, dtype in ((LoRA(rank=4), torch.float32), (Full(), torch.bfloat16)):
        base = weightless_base(name, dtype, torch.device("cpu"))
        slot = base.host.attach([technique])
        found = trace_pass(base, slot, batch_for(slot))
        assert 0 < found.activations < found.peak
        assert 0 < found.forward_flops < found.flops
        assert all(p.is_meta for p in (*base.model.parameters(), *slot.parameters.values()))
        assert all(p.grad is None for p in slot.parameters.values())


def test_narrow_tensors_take_half_and_dropout_takes_its_masks(tmp_path: Path) -> None:
    _, name = saved(tmp_path, "llama")
    found = {}
    for key, dtype, dropout in (("wide", torch.float32, 0.0), ("narrow", torch.bfloat16, 0.0), ("drop", None, 0.5)):
        base = weightless_base(name, dtype or torch.float32, torch.device("cpu"))
        slot = base.host.attach([LoRA(rank=4, target_modules=("q_proj", "down_proj"), dropout=dropout)])
        found[key] = trace_pass(base, slot, batch_for(slot)).activations
    assert 0.4 < found["narrow"] / found["wide"] < 0.75  # norms compute in fp32
    # a mask and a masked input of 64 and 96 numbers per token and layer
    assert found["drop"] - found["wide"] == 2 * (64 + 96) * 4 * sum(LENGTHS) * 3
