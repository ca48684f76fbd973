"""Bottleneck adapters against the formula written out with hooks on the stock model; starts; what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import technique_cases as cases
from tailor.artifacts import artifact as artifacts
from tailor.data.packing import Segment, pack
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.linear import SlotLinear
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.techniques.adapter import Adapter
from tailor.techniques.lora import LoRA
from tailor.training.speed import layer_kinds
from tailor.training.trainer import Trainer
from tiny_models import ARCHITECTURES, tiny_base, tiny_model

IDS = [1, 4, 70, 71, 99, 6, 5, 200, 33]
# transformers computes RMSNorm and softmax in fp32 even in a float64 model, so packed and stock passes round apart
CLOSE = {"atol": 1e-5, "rtol": 0.0}

# decoder layers, and in them the modules whose input and output are those of the attention and of the MLP
LAYERS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention"}
MLP = {"opt": ("fc1", "fc2")}


def shaken(slot: Slot) -> Slot:
    """Away from its start, far enough that every part of the formula shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter))
    return slot


def attached(base: Base, **settings: Any) -> Slot:
    return base.host.attach([Adapter(**{"bottleneck_size": 3, **settings})], seed=2)


# ------------------------------------------------------------------------------------------------ the formula


def spread_out(x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """LayerNorm, written out."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own["norm.weight"] + own["norm.bias"]


BENDS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
    "identity": lambda x: x,
}


def added(x: Tensor, own: Mapping[str, Tensor], technique: Adapter) -> Tensor:
    """scale · up(act(down(norm(x)))), by matrix products alone."""
    if technique.norm == "pre":
        x = spread_out(x, own)
    x = x @ own["down.weight"].T + own.get("down.bias", torch.zeros(1))
    x = BENDS[technique.activation](x) @ own["up.weight"].T + own.get("up.bias", torch.zeros(1))
    return technique.scale * (spread_out(x, own) if technique.norm == "post" else x)


def naive_logits(model_type: str, technique: Adapter, state: Mapping[str, Tensor]) -> Tensor:
    """The stock model, float64, with the formula hooked around its blocks."""
    model = tiny_model(model_type, torch.float64)
    stack = LAYERS.get(model_type, "model.layers")
    for number, layer in enumerate(model.get_submodule(stack)):
        if technique.target_layers is not None and number not in technique.target_layers:
            continue
        for block in technique.blocks:
            name = ATTENTION.get(model_type, "self_attn")
            entry, leave = (name, name) if block == "attention" else MLP.get(model_type, ("mlp", "mlp"))
            place = f"{block}.adapter." if technique.weight_tying else f"{stack}.{number}.{block}.adapter."
            own = {key.removeprefix(place): tensor for key, tensor in state.items() if key.startswith(place)}
            hook(layer.get_submodule(entry), layer.get_submodule(leave), own, technique)
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]  # type: ignore[no-any-return]


def hook(entry: nn.Module, leave: nn.Module, own: Mapping[str, Tensor], technique: Adapter) -> None:
    kept: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept[:] = [args[0] if args else kwargs["hidden_states"]]

    def change(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + added(kept[0] if technique.form == "parallel" else hidden, own, technique)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    entry.register_forward_pre_hook(enter, with_kwargs=True)
    leave.register_forward_hook(change)


SETTINGS: dict[str, dict[str, Any]] = {
    "NeMo's": {},
    "parallel": {"form": "parallel", "norm": "none", "activation": "relu", "scale": 4.0, "bias": True},
    "parallel, normed": {"form": "parallel", "norm": "pre", "activation": "tanh"},
    "post": {"norm": "post", "activation": "gelu", "bias": True},
    "post, scaled": {"norm": "post", "scale": 0.5, "activation": "swish"},
    "bare": {"norm": "none", "activation": "identity"},
    "attention alone": {"blocks": ("attention",), "target_layers": (0, 2)},
    "mlp alone": {"blocks": ("mlp",), "form": "parallel", "target_layers": (1,)},
    "tied": {"weight_tying": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_formula_with_hooks_on_the_stock_model_agrees(model_type: str, settings: dict[str, Any]) -> None:
    check_formula(model_type, settings)


@pytest.mark.parametrize("form", ["sequential", "parallel"])
@pytest.mark.parametrize("model_type", [name for name in ARCHITECTURES if name not in ("llama", "gpt2")])
def test_it_stands_where_it_should_in_every_architecture(model_type: str, form: str) -> None:
    check_formula(model_type, {"form": form})


def check_formula(model_type: str, settings: dict[str, Any]) -> None:
    base = tiny_base(model_type, torch.float64)
    technique = Adapter(**{"bottleneck_size": 3, **settings})
    slot = shaken(base.host.attach([technique], seed=2))
    found = base.logits(IDS, slot.number)
    torch.testing.assert_close(found, naive_logits(model_type, technique, slot.state()), **CLOSE)
    assert float((found - base.logits(IDS)).abs().max()) > 1e-2


def test_sizes() -> None:
    """Two blocks of three layers; hidden 32, bottleneck 3."""
    base = tiny_base()
    assert attached(base).num_parameters == 6 * (2 * 3 * 32 + 2 * 32)
    assert attached(base, norm="none").num_parameters == 6 * 2 * 3 * 32
    assert attached(base, norm="none", bias=True).num_parameters == 6 * (2 * 3 * 32 + 3 + 32)
    assert attached(base, blocks=("mlp",), target_layers=(2,), norm="none").num_parameters == 2 * 3 * 32
    tied = attached(base, weight_tying=True, norm="none")
    assert tied.num_parameters == 2 * 2 * 3 * 32
    assert tied.num_operations() == 6 * 2 * 3 * 32, "shared weights work in every layer"


def test_the_lowest_layer_is_the_lowest_that_is_changed() -> None:
    assert attached(tiny_base(), target_layers=(2, 1)).lowest_layer == 1


# ------------------------------------------------------------------------------------------------ starts


def test_starts_have_the_spread_they_say() -> None:
    base = tiny_base(hidden_size=64, num_attention_heads=4)
    kinds = {"xavier": math.sqrt(2 / (64 + 512)), "normal": 0.2, "kaiming": 1 / math.sqrt(3 * 64)}
    for init, deviation in kinds.items():
        state = attached(base, bottleneck_size=512, init_down=init, bias=True).state()
        down = state["model.layers.0.mlp.adapter.down.weight"]
        assert down.shape == (512, 64)
        assert float(down.std()) == pytest.approx(deviation, rel=0.03)
        assert abs(float(down.mean())) < 0.03 * deviation
        assert not state["model.layers.0.mlp.adapter.up.weight"].any()
        assert not any(tensor.any() for name, tensor in state.items() if name.endswith("bias"))
    up = attached(base, bottleneck_size=512, init_up="normal").state()["model.layers.1.attention.adapter.up.weight"]
    assert float(up.std()) == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"norm": "none", "bias": True},
        {"norm": "post"},
        {"norm": "post", "bias": True, "form": "parallel"},
        {"init_down": "zero", "init_up": "xavier"},
        {"weight_tying": True, "norm": "post"},
    ],
)
def test_it_starts_as_the_base_and_then_everything_learns(settings: dict[str, Any]) -> None:
    base = tiny_base()
    slot = attached(base, **settings)
    torch.testing.assert_close(base.logits(IDS, slot.number), base.logits(IDS), atol=1e-6, rtol=0)
    start = slot.state()
    trainer = Trainer(base, [cases.slot_run(base, slot, 1)])
    while not trainer.done:
        assert trainer.step()[0].grad_norm < 100
    assert not [name for name, p in slot.parameters.items() if torch.equal(p.detach(), start[name])]


def test_a_post_norm_starts_with_a_gain_of_zero_over_layers_that_are_not() -> None:
    state = attached(tiny_base(), norm="post").state()
    assert not state["model.layers.0.mlp.adapter.norm.weight"].any()
    assert state["model.layers.0.mlp.adapter.up.weight"].all()


@pytest.mark.parametrize("settings", [{"init_up": "xavier"}, {"init_up": "normal", "norm": "post"}])
def test_other_starts_are_not_the_base(settings: dict[str, Any]) -> None:
    base = tiny_base()
    slot = attached(base, **settings)
    assert float((base.logits(IDS, slot.number) - base.logits(IDS)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_down": "zero"}, "cannot both be zero"),
        ({"init_down": "zero", "init_up": "xavier", "activation": "relu"}, "would never learn"),
        ({"init_down": "zero", "init_up": "xavier", "norm": "post"}, "spread of 0"),
        ({"blocks": ()}, "attention, mlp, or both"),
        ({"blocks": ("mlp", "mlp")}, "attention, mlp, or both"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Adapter(**settings)


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_is_not_there_is_an_error(layer: int) -> None:
    base = tiny_base()
    with pytest.raises(ConfigError, match=rf"there is no layer {layer}; layers are 0 to 2"):
        attached(base, target_layers=(0, layer))
    assert not base.host.slots


# ------------------------------------------------------------------------------------------------ dropout, files


def test_dropout_is_on_what_is_added_and_in_training_only() -> None:
    """With one layer's MLP, what a training pass adds is what another adds, times 0 or 1 / (1 - p)."""
    seen: list[Tensor] = []
    base = tiny_base()
    slot = shaken(attached(base, dropout=0.25, blocks=("mlp",), target_layers=(2,)))
    handle = base.model.model.layers[2].mlp.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    plain = [Plan.of([Segment(0, len(IDS), number)], training=False) for number in (0, slot.number)]
    noisy = [
        Plan.of([Segment(0, len(IDS), slot.number)], training=True, steps={slot.number: step}) for step in (1, 2, 1)
    ]
    ids, positions = torch.tensor(IDS), torch.arange(len(IDS))
    for plan in (*plain, *noisy):
        with base.host.run(plan):
            base.hidden(plan, ids, positions)
    handle.remove()
    before, after, first, second, again = seen
    ratios = ((first - before) / (after - before)).flatten()
    kept = ratios.abs() > 0.5
    assert 0.15 < 1 - float(kept.float().mean()) < 0.35
    torch.testing.assert_close(ratios[kept], torch.full_like(ratios[kept], 4 / 3), atol=1e-2, rtol=0)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_it_cannot_be_merged_nor_exported_for_peft(own_home: Any) -> None:
    base = tiny_base()
    technique = Adapter(bottleneck_size=2)
    slot = shaken(base.host.attach([technique]))
    artifacts.save("mine", base, slot, [technique], {})
    with pytest.raises(ConfigError, match="adapter cannot be merged"):
        artifacts.write_merged(base, slot, [technique], own_home)
    assert technique.beyond_peft() == "PEFT has no bottleneck adapters"
    expected = base.logits(IDS, slot.number)
    other = tiny_base()
    assert torch.equal(other.logits(IDS, artifacts.attach(other, artifacts.find("mine")).number), expected)


# ------------------------------------------------------------------------------------------------ company


@pytest.mark.parametrize("lora_first", [True, False])
def test_opt_whose_mlp_is_two_linear_layers_that_others_wrap_too(lora_first: bool) -> None:
    """Attached in any order, detached in any order: each answers as it does alone, and nothing stays behind."""
    techniques = {"lora": LoRA(rank=2, target_modules=("fc1", "fc2")), "adapter": Adapter(bottleneck_size=2)}
    order = sorted(techniques, reverse=lora_first)
    alone = {}
    for name in order:
        base = tiny_base("opt")
        alone[name] = base.logits(IDS, shaken(base.host.attach([techniques[name]], seed=4)).number)
    base = tiny_base("opt")
    slots = {name: shaken(base.host.attach([techniques[name]], seed=4)) for name in order}
    both = shaken(base.host.attach(list(techniques.values()), seed=4))
    for name, slot in slots.items():
        torch.testing.assert_close(base.logits(IDS, slot.number), alone[name], **CLOSE)
    combined = base.logits(IDS, both.number)
    for name in order:
        base.host.detach(slots.pop(name))
        torch.testing.assert_close(base.logits(IDS, both.number), combined, **CLOSE)
        for other, slot in slots.items():
            torch.testing.assert_close(base.logits(IDS, slot.number), alone[other], **CLOSE)
    base.host.detach(both)
    assert not any(isinstance(module, SlotLinear) for module in base.model.modules())
    assert torch.equal(base.logits(IDS), tiny_base("opt").logits(IDS))


def test_rows_of_others_are_not_touched() -> None:
    """Not even where a pass has no row of it."""
    base = tiny_base()
    batch = pack(cases.place(base, [None]), 10_000)[0]
    before = cases.logits_by_row(base, batch)
    slot = shaken(attached(base))
    rows = cases.place(base, [None, slot])
    for row, logits in cases.logits_by_row(base, pack(rows, 10_000)[0]).items():
        if row in before:
            torch.testing.assert_close(logits, before[row], **CLOSE)
    assert all(torch.equal(logits, before[row]) for row, logits in cases.logits_by_row(base, batch).items())


def test_the_estimate_knows_that_tied_weights_work_in_every_layer() -> None:
    base = tiny_base()
    kinds = layer_kinds(base, attached(base, weight_tying=True))
    assert [kind.flows for kind in kinds] == [False, True, True]
