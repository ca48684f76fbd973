"""Decoding steps the short way give what the model's own modules give, or are not taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tailor.data.packing import Segment
from tailor.errors import ConfigError
from tailor.inference.backend import SamplingParams
from tailor.inference.engine import Engine, EngineSettings
from tailor.inference.scheduler import Running
from tailor.models import decode_step
from tailor.models.base import Base
from tailor.models.linear import LinearDelta, Terms
from tailor.models.packed import Int8Linear, PackedLinear, has_int8, packs
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.techniques.adapter import Adapter
from tailor.techniques.full import Full
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tiny_models import tiny_base

OF_THE_FORM = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
OTHERS = ("gemma", "gemma2", "granite", "gpt2", "mixtral", "olmo2", "phi3")
TECHNIQUES: list[Any] = [
    LoRA(rank=2),
    LoRA(rank=3, dora=True),
    IA3(),
    Adapter(bottleneck_size=4),
    PrefixTuning(num_virtual_tokens=3),
    PromptTuning(num_virtual_tokens=2),
]
NUM_NEW = 10
PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [20, 21, 22, 23, 24, 25, 26, 27, 28])


class Biases:
    """A bias for the keys and one for the MLP's gate, and a scale of the keys' own bias too."""

    def attach(self, slot: Slot) -> None:
        for layer in range(slot.host.num_layers):
            for name in (f"model.layers.{layer}.self_attn.k_proj", f"model.layers.{layer}.mlp.gate_proj"):
                size = slot.host.model.get_submodule(name).out_features
                bias = slot.new_parameter(f"{name}.bias", torch.zeros(int(size)))  # type: ignore[arg-type]
                scale = slot.new_parameter(f"{name}.scale", torch.ones(int(size)))  # type: ignore[arg-type]
                slot.add_delta(name, LinearDelta.of(Terms(output_scale=scale, scales_bias=True, bias=bias)))


def attached(base: Base, techniques: Sequence[Any]) -> list[Slot]:
    """Slots that do something."""
    slots = []
    for seed, technique in enumerate(techniques):
        slot = base.host.attach([technique], seed=seed)
        slot.bake()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in slot.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        slots.append(slot)
    return slots


def answer(base: Base, slots: Sequence[Slot | None]) -> list[Running]:
    """Greedy answers to PROMPTS, of the slots in turn, all in one batch."""
    batch = []
    for k in range(max(len(slots), len(PROMPTS))):
        slot = slots[k % len(slots)]
        ids = [*(slot.virtual_ids if slot else ()), *PROMPTS[k % len(PROMPTS)]]
        number = slot.number if slot else 0
        batch.append(Running(ids, number, SamplingParams(max_new_tokens=NUM_NEW + k, ignore_stop=True)))
    Engine(base, ()).run(batch)
    return batch


def check(base: Base, batch: Sequence[Running], atol: float = 1e-9) -> None:
    """Every token's logprob is that of the whole sequence computed at once, and no other token's is greater."""
    for sequence in batch:
        ids = [*sequence.prompt_ids, *sequence.token_ids]
        logprobs = base.logits(ids[:-1], sequence.slot)[len(sequence.prompt_ids) - 1 :].log_softmax(dim=1)
        chosen = logprobs.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sequence.logprobs, dtype=chosen.dtype), chosen, atol=atol, rtol=0)
        torch.testing.assert_close(logprobs.amax(dim=1), chosen, atol=atol, rtol=0)


@pytest.mark.parametrize("model_type", OF_THE_FORM)
def test_a_mixed_batch_gets_the_numbers_of_full_recompute(model_type: str) -> None:
    base = tiny_base(model_type, torch.float64)
    batch = answer(base, [None, *attached(base, TECHNIQUES)])
    assert base.stepper.step is not None
    check(base, batch)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_forms_take_the_long_way(model_type: str) -> None:
    base = tiny_base(model_type, torch.float64)
    batch = answer(base, [None])
    assert base.stepper.step is None
    assert base.stepper.refused
    check(base, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "changes"), [("gemma", {}), ("granite", {}), ("llama", {"hidden_act": "gelu"})])
def test_what_differs_little_is_told_too(model_type: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    base = tiny_base(model_type, dtype, **changes)
    with torch.no_grad():
        for parameter in base.model.parameters():
            parameter.mul_(0.05)
    answer(base, [None])
    assert base.stepper.step is None
    assert base.stepper.refused


def test_biases_of_joined_layers_stand_where_their_layers_do() -> None:
    base = tiny_base("llama", torch.float64, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    batch = answer(base, [None, *attached(base, [Biases(), IA3(), LoRA(rank=2)])])
    assert base.stepper.step is not None
    check(base, batch)


def test_a_scaled_input_of_one_of_joined_layers_takes_the_long_way() -> None:
    base = tiny_base("llama", torch.float64)
    slots = attached(base, [IA3(target_modules=("q_proj",), feedforward_modules=("q_proj",)), LoRA(rank=2)])
    answer(base, [None])
    assert base.stepper.step is not None
    with_it, without = answer(base, [None, *slots]), answer(base, [None, slots[1]])
    check(base, with_it)
    check(base, without)
    step, calls = base.stepper.step, []
    of = step.changes.of
    step.changes.of = lambda plan: calls.append(of(plan)) or calls[-1]  # type: ignore[assignment]
    answer(base, [None, slots[1]])
    assert None not in calls  # the other one does not hold this one up


def test_new_weights_are_seen() -> None:
    base = tiny_base("llama", torch.float64)
    slot = base.host.attach([Full()])
    before = answer(base, [slot])
    first = base.stepper.step
    assert first is not None
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = answer(base, [slot])
    assert base.stepper.step not in (None, first)
    check(base, after)
    assert [s.token_ids for s in before] != [s.token_ids for s in after]


def test_banks_follow_parameters_and_are_shared_while_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", torch.float64)
    slots = attached(base, [LoRA(rank=2), LoRA(rank=2), IA3()])
    answer(base, [None])
    assert base.stepper.step is not None
    changes, made = base.stepper.step.changes, []
    stacked = changes._stacked
    monkeypatch.setattr(changes, "_stacked", lambda numbers: (made.append(numbers), stacked(numbers))[1])
    answer(base, [None, *slots])
    answer(base, [slots[1], None])  # those who leave need no new banks, nor does another order
    answer(base, [slots[2], slots[0]])
    assert made == [tuple(slot.number for slot in slots)]
    with torch.no_grad():
        for parameter in slots[0].parameters.values():
            parameter.mul_(-1)
    check(base, answer(base, [None, *slots]))
    assert len(made) == 2


def test_numbers_that_are_none_stay_with_their_slot() -> None:
    base = tiny_base("llama", torch.float64)
    broken, sound = attached(base, [LoRA(rank=2), LoRA(rank=2)])
    answer(base, [None])
    assert base.stepper.step is not None
    sampling = SamplingParams(max_new_tokens=NUM_NEW, ignore_stop=True)
    healthy, other = (Running(PROMPTS[0], slot.number, sampling) for slot in (sound, broken))
    engine = Engine(base, ())
    engine.add(healthy)
    engine.add(other)
    for _ in range(3):
        engine.step()
    with torch.no_grad():
        next(iter(broken.parameters.values())).fill_(torch.nan)
    while not engine.idle:
        engine.step()
    assert other.error is not None
    check(base, [healthy])


def test_without_memory_for_a_copy_the_modules_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama", torch.float64)
    weights = sum(parameter.nbytes for parameter in base.host.weights)
    monkeypatch.setattr(decode_step, "memory", lambda: (2 * weights, 4 * weights))
    check(base, answer(base, [None]))
    assert base.stepper.step is None
    monkeypatch.setattr(decode_step, "memory", lambda: (2 * weights + 1, 4 * weights))
    check(base, answer(base, [None]))
    assert base.stepper.step is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_joined_layers_give_what_each_gives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(48, 32, dtype=dtype), nn.Linear(48, 7, bias=False, dtype=dtype)]
    x = torch.randn(5, 48, dtype=dtype)
    joined = PackedLinear(layers)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        torch.testing.assert_close(joined(x), torch.cat([f(x) for f in layers], dim=1), atol=8 * eps, rtol=4 * eps)
    assert joined.sizes == (32, 7)
    assert not packs(torch.float64)


def test_a_half_precision_base_answers_the_short_way() -> None:
    base = tiny_base("llama", torch.bfloat16)
    batch = answer(base, [None, *attached(base, TECHNIQUES)])
    assert base.stepper.step is not None
    for sequence in batch:
        ids = [*sequence.prompt_ids, *sequence.token_ids]
        logits = base.logits(ids[:-1], sequence.slot)[len(sequence.prompt_ids) - 1 :]
        chosen = logits.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        assert float((logits.amax(dim=1) - chosen).max()) < 0.2 * float(logits.std())


needs_int8 = pytest.mark.skipif(not has_int8(torch.float32), reason="no products of integers on this processor")


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Levels from -127 to 127 and the scale of each row, in float64."""
    scale = rows.double().abs().amax(dim=1, keepdim=True) / 127
    return (rows.double() / scale).round(), scale


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_integers_are_the_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(96, 40, dtype=dtype), nn.Linear(96, 9, bias=False, dtype=dtype)]
    x = 3 * torch.randn(6, 96, dtype=dtype)
    with torch.no_grad():
        found = Int8Linear(layers)(torch.cat([x, torch.zeros(1, 96, dtype=dtype)]))
        bias = torch.cat([layers[0].bias, torch.zeros(9, dtype=dtype)])
        dense = torch.cat([layer.weight for layer in layers])
        (a, of_rows), (b, of_outputs) = rounded(x), rounded(dense)
        expected = (a @ b.t()) * of_rows * of_outputs.t() + bias.double()
        limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(found[:6].double(), expected, atol=limit, rtol=limit)
        torch.testing.assert_close(found[6], bias)  # a row of zeros is no division by zero
        assert torch.equal(Int8Linear(layers)(x[:1]), found[:1])  # whoever else is there


@needs_int8
def test_decoding_in_8_bits_is_near_and_customizations_stay_exact() -> None:
    base = tiny_base("llama", torch.float32)
    slots = [None, *attached(base, TECHNIQUES)]
    engine = Engine(base, (), EngineSettings(int8=True))
    step = base.stepper.step
    assert step is not None
    assert all(isinstance(product, Int8Linear) for layer in step.layers for product in layer.products)
    assert isinstance(step.head, Int8Linear)
    sampling = SamplingParams(max_new_tokens=NUM_NEW, ignore_stop=True)
    leads = [(slot.number, slot.virtual_ids) if slot else (0, ()) for slot in slots]
    batch = [Running([*virtual, *PROMPTS[1]], number, sampling) for number, virtual in leads]
    engine.run(batch)
    for sequence in batch:
        ids = [*sequence.prompt_ids, *sequence.token_ids]
        exact = base.logits(ids[:-1], sequence.slot)[len(sequence.prompt_ids) - 1 :].log_softmax(dim=1)
        chosen = exact.gather(1, torch.tensor(sequence.token_ids)[:, None])[:, 0]
        off = (torch.tensor(sequence.logprobs) - chosen).abs()
        assert float(off[0]) < 1e-4  # the prompt's own pass is in full precision
        assert 0 < float(off[1:].max()) < 0.5
    check(base, answer(base, slots), 1e-4)  # another engine, without int8
    again = Running([*PROMPTS[1]], 0, sampling)
    engine.run([again])
    assert base.stepper.step is not None
    assert isinstance(base.stepper.step.head, Int8Linear)


@pytest.mark.parametrize(("model_type", "dtype"), [("gemma", torch.float32), ("llama", torch.float64)])
def test_int8_without_effect_is_an_error(model_type: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="int8"):
        Engine(tiny_base(model_type, dtype), (), EngineSettings(int8=True))


def test_two_adapters_on_a_block_see_the_same_with_and_without_gradients() -> None:
    base = tiny_base("llama", torch.float64)
    pair = [
        Adapter(bottleneck_size=3, init_up="xavier"),
        Adapter(bottleneck_size=2, init_up="xavier", weight_tying=True),
    ]
    slot = base.host.attach(pair)
    plan = Plan.of([Segment(0, 6, slot.number)])
    ids = torch.arange(5, 11)
    found = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), base.host.run(plan):
            found.append(base.hidden(plan, ids, torch.arange(6)).detach())
    torch.testing.assert_close(found[1], found[0])
