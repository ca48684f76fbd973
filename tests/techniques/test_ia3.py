"""IA3 against the paper's formula hooked into the stock model; fused projections; merging, baking, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import technique_cases as cases
from tailor.artifacts import artifact as artifacts
from tailor.artifacts.files import merged_weights
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.training.trainer import Trainer, finish
from tiny_models import ARCHITECTURES, tiny_base, tiny_model

IDS = [1, 4, 70, 71, 99, 6, 5, 200, 33]
CLOSE = {"atol": 1e-5, "rtol": 0.0}
MIXTURES = {"mixtral", "qwen3_moe"}
FUSED = {"gpt2": "attn.c_attn", "gpt_neox": "attention.query_key_value", "phi3": "self_attn.qkv_proj"}
OUT_OF_MLP = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2", "starcoder2": "mlp.c_proj"}
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
# hidden 32 and 4 heads of 8; two heads of keys and values, but for those that know no groups
NUM_KEYS = {"gpt2": 32, "gpt_neox": 32, "opt": 32}


def shaken(slot: Slot) -> Slot:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return slot


def attached(base: Base, **settings: Any) -> Slot:
    return base.host.attach([IA3(**settings)], seed=2)


# ------------------------------------------------------------------------------------------------ the formula


def scale_input(module: nn.Module, vector: Tensor) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * vector,))


def scale_output(module: nn.Module, vector: Tensor) -> None:
    module.register_forward_hook(lambda module, args, output: output * vector)


def scale_fused(model_type: str, module: nn.Module, keys: Tensor, values: Tensor) -> None:
    """As the model's own attention takes its keys and values out of the fused output."""

    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if model_type == "gpt_neox":
            heads = output.view(*output.shape[:-1], 4, 24)
            query, key, value = heads.chunk(3, dim=-1)
            together = [query, key * keys.view(4, 8), value * values.view(4, 8)]
            return torch.cat(together, dim=-1).reshape(output.shape)
        query, key, value = output.split([32, len(keys), len(values)], dim=-1)
        return torch.cat([query, key * keys, value * values], dim=-1)

    module.register_forward_hook(change)


def naive_logits(model_type: str, state: Mapping[str, Tensor], layers: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    model = tiny_model(model_type, torch.float64)
    stack = LAYERS.get(model_type, "model.layers")
    for number in layers:
        layer, stem = model.get_submodule(f"{stack}.{number}"), f"{stack}.{number}."
        if model_type in FUSED:
            name = FUSED[model_type]
            vectors = state[f"{stem}{name}.l_k"], state[f"{stem}{name}.l_v"]
            scale_fused(model_type, layer.get_submodule(name), *vectors)
        else:
            for name in ("self_attn.k_proj", "self_attn.v_proj"):
                scale_output(layer.get_submodule(name), state[f"{stem}{name}.ia3_l"])
        if model_type not in MIXTURES:
            name = OUT_OF_MLP.get(model_type, "mlp.down_proj")
            scale_input(layer.get_submodule(name), state[f"{stem}{name}.ia3_l"])
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_formula_hooked_into_the_stock_model_agrees(model_type: str) -> None:
    base = tiny_base(model_type, torch.float64)
    slot = shaken(attached(base))
    found = base.logits(IDS, slot.number)
    torch.testing.assert_close(found, naive_logits(model_type, slot.state()), **CLOSE)
    assert float((found - base.logits(IDS)).abs().max()) > 1e-2


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_some_layers(model_type: str) -> None:
    base = tiny_base(model_type, torch.float64)
    slot = shaken(attached(base, target_layers=(2, 0)))
    torch.testing.assert_close(base.logits(IDS, slot.number), naive_logits(model_type, slot.state(), (0, 2)), **CLOSE)
    assert attached(base, target_layers=(1,)).lowest_layer == 1


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_it_is_as_small_as_the_paper_says_and_starts_at_one(model_type: str) -> None:
    """d_k + d_v + d_ff per layer; the queries of a fused projection cost nothing."""
    slot = attached(tiny_base(model_type))
    inner = 0 if model_type in MIXTURES else 128 if model_type == "gpt2" else 48
    assert slot.num_parameters == 3 * (2 * NUM_KEYS.get(model_type, 16) + inner)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in slot.state().values())


def test_named_modules_are_scaled_whole() -> None:
    """PEFT's meaning of its two lists; here on a fused projection, queries included, and on a layer's input."""
    base = tiny_base("gpt2", torch.float64)
    slot = shaken(attached(base, target_modules=("c_attn", "mlp.c_fc"), feedforward_modules=("c_fc",)))
    model = tiny_model("gpt2", torch.float64)
    for number, layer in enumerate(model.transformer.h):
        state = {name.removeprefix(f"transformer.h.{number}."): tensor for name, tensor in slot.state().items()}
        scale_output(layer.attn.c_attn, state["attn.c_attn.ia3_l"])
        scale_input(layer.mlp.c_fc, state["mlp.c_fc.ia3_l"])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(base.logits(IDS, slot.number), expected, **CLOSE)


# ------------------------------------------------------------------------------------------------ merging, baking


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3", "opt", "mixtral"])
def test_merged_weights_answer_the_same_and_spare_the_queries(model_type: str) -> None:
    base = tiny_base(model_type)
    slot = shaken(attached(base))
    changed = merged_weights(base, slot)
    model = tiny_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(changed, strict=False)
    with torch.no_grad():
        merged = model(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(merged, base.logits(IDS, slot.number), **CLOSE)
    for number in range(3 if model_type in FUSED else 0):
        name = f"{LAYERS.get(model_type, 'model.layers')}.{number}.{FUSED[model_type]}.weight"
        old, new = (w.t() if model_type == "gpt2" else w for w in (before[name], changed[name]))
        same = (old == new).all(dim=1)
        queries = [k % 24 < 8 for k in range(96)] if model_type == "gpt_neox" else [k < 32 for k in range(len(old))]
        assert same.tolist() == queries


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_biases_are_scaled_too(model_type: str) -> None:
    """A token whose projection is nothing but bias has its keys and values scaled as well."""
    base = tiny_base(model_type)
    slot = shaken(attached(base))
    changed, old = merged_weights(base, slot), base.model.state_dict()
    name = "transformer.h.1.attn.c_attn" if model_type == "gpt2" else "model.layers.1.self_attn.v_proj"
    values = slot.state()[f"{name}.l_v" if model_type == "gpt2" else f"{name}.ia3_l"]
    bias = old[f"{name}.base.bias"][-len(values) :]
    torch.testing.assert_close(changed[f"{name}.bias"][-len(values) :], values * bias, atol=1e-7, rtol=0)


@pytest.mark.parametrize("model_type", FUSED)
def test_a_fused_scale_is_baked_kept_and_trained_on(model_type: str, own_home: Path) -> None:
    """What serves is PEFT's one vector per projection; what trains on is l_k and l_v, and the queries stay."""
    base = tiny_base(model_type)
    technique = IA3()
    slot = attached(base)
    run = cases.slot_run(base, slot, 1, learning_rate=0.1)
    trainer = Trainer(base, [run])
    while not trainer.done:
        trainer.step()
    trained, expected = slot.state(), base.logits(IDS, slot.number)
    training_state = finish(run)
    assert training_state.keys() == trained.keys()
    assert torch.equal(base.logits(IDS, slot.number), expected)
    assert all(name.endswith(".ia3_l") for name in slot.parameters)
    made = artifacts.save("fused", base, slot, [technique], {}, training_state=training_state)
    again = tiny_base(model_type)
    assert torch.equal(again.logits(IDS, artifacts.attach(again, made).number), expected)
    further = attached(again)
    artifacts.start_from(further, made)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in further.state().items())
    torch.testing.assert_close(again.logits(IDS, further.number), expected, **CLOSE)


def test_beside_lora_on_the_same_layers() -> None:
    """The scale is on the base's product; what LoRA adds stands beside it, merged or not."""
    base = tiny_base("qwen2")
    slot = shaken(base.host.attach([IA3(), LoRA(rank=2)], seed=3))
    model = tiny_model("qwen2")
    model.load_state_dict(merged_weights(base, slot), strict=False)
    with torch.no_grad():
        merged = model(input_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(merged, base.logits(IDS, slot.number), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ refusals


def test_experts_are_left_out_and_refused_by_name() -> None:
    base = tiny_base("mixtral")
    assert {name.rpartition(".")[2] for name in IA3().targets(attached(base))} == {"k_proj", "v_proj"}
    wanted = ("v_proj", "down_proj")
    with pytest.raises(ConfigError, match=r"'down_proj' matches no linear layer.*'mixtral' belong to its experts"):
        attached(base, target_modules=wanted, feedforward_modules=("down_proj",))


def test_lists_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="give both"):
        IA3(feedforward_modules=("down_proj",))
    with pytest.raises(ConfigError, match=r"names model\.layers\.0\.mlp\.down_proj, which target_modules does not"):
        attached(tiny_base(), target_modules=("v_proj",), feedforward_modules=("down_proj",))


def test_two_of_one_fused_projection_are_refused() -> None:
    """Their parameters are called differently until they are baked."""
    with pytest.raises(ConfigError, match="two techniques of one list both want to add"):
        tiny_base("gpt_neox").host.attach([IA3(), IA3(target_modules=("query_key_value",))])


def test_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'vproj' matches no linear layer"):
        attached(tiny_base(), target_modules=("vproj",))
    with pytest.raises(ConfigError, match="no layer 3; layers are 0 to 2"):
        attached(tiny_base(), target_layers=(3,))
