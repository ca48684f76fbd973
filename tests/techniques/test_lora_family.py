"""rsLoRA, DoRA, PiSSA, LoRA+, patterns and starts: each held to its paper's formula, worked out here in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import technique_cases as cases
from tailor.artifacts.artifact import attach, save, start_from
from tailor.artifacts.files import merged_weights
from tailor.data.packing import pack
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.linear import linear_sizes, weight_of
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.techniques import low_rank
from tailor.techniques.lora import LoRA
from tailor.training.trainer import Trainer
from tiny_models import tiny_base

IDS = [5, 6, 7, 70, 99, 4]
EXACT = {"atol": 1e-12, "rtol": 0.0}
TARGET = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}


def alone(technique: LoRA, model_type: str = "llama", *, shaken: bool = True, seed: int = 1) -> tuple[Base, Slot]:
    base = tiny_base(model_type, torch.float64)
    slot = base.host.attach([technique], seed=seed)
    if shaken:
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in slot.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return base, slot


def factors(slot: Slot, name: str) -> tuple[Tensor, Tensor]:
    kind = "lora" if f"{name}.lora_A.weight" in slot.parameters else "pissa"
    a, b = (slot.parameters[f"{name}.{kind}_{side}.weight"].detach() for side in "AB")
    return a, b


def stored(base: Base, name: str) -> Tensor:
    """The base's weight as (O, I)."""
    return weight_of(base.model.get_submodule(name)).detach()


def new_weight(base: Base, slot: Slot, name: str) -> Tensor:
    """W' of the slot as (O, I)."""
    new = merged_weights(base, slot)[f"{name}.weight"]
    return new.t() if base.host.wrap_linear(name).transposed else new


# ------------------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("model_type", TARGET)
@pytest.mark.parametrize(
    ("technique", "scale"),
    [(LoRA(rank=4, alpha=6.0), 1.5), (LoRA(rank=4, alpha=6.0, rslora=True), 3.0)],
    ids=["alpha over rank", "alpha over root of rank"],
)
def test_the_scale(technique: LoRA, scale: float, model_type: str) -> None:
    base, slot = alone(technique, model_type)
    name = TARGET[model_type]
    a, b = factors(slot, name)
    torch.testing.assert_close(new_weight(base, slot, name), stored(base, name) + scale * b @ a, **EXACT)


def naive_dora(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """Equation 5 of arXiv:2402.09353 with the norm detached, as section 4.3 says."""
    direction = weight + scale * b @ a
    return (magnitude / direction.norm(dim=1).detach())[:, None] * direction


@pytest.mark.parametrize("init", ["random", "pissa"])
@pytest.mark.parametrize("model_type", TARGET)
def test_dora_is_equation_5(model_type: str, init: Any) -> None:
    base, slot = alone(LoRA(rank=3, alpha=6.0, dora=True, init=init), model_type)
    slot.bake()
    name = TARGET[model_type]
    magnitude = slot.parameters[f"{name}.lora_magnitude_vector"].detach()
    expected = naive_dora(stored(base, name), *factors(slot, name), magnitude, 2.0)
    torch.testing.assert_close(new_weight(base, slot, name), expected, **EXACT)


@pytest.mark.parametrize("model_type", TARGET)
def test_dora_starts_with_the_norms_of_the_weight(model_type: str) -> None:
    base, slot = alone(LoRA(rank=3, dora=True), model_type, shaken=False)
    name = TARGET[model_type]
    norms = stored(base, name).norm(dim=1)
    torch.testing.assert_close(slot.parameters[f"{name}.lora_magnitude_vector"].detach(), norms, **EXACT)


@pytest.mark.parametrize("model_type", TARGET)
def test_doras_gradient_is_that_of_the_detached_norm(model_type: str) -> None:
    """Against autograd through the naive formula, on one layer with its own input."""
    base, slot = alone(LoRA(rank=3, alpha=6.0, dora=True), model_type)
    name = TARGET[model_type]
    wrapped = base.host.wrap_linear(name)
    placed = cases.place(base, [slot], 2)
    batch = pack(placed, 10_000)[0]
    x = torch.randn(batch.num_tokens, wrapped.in_features, dtype=torch.float64, requires_grad=True)
    out = torch.randn(batch.num_tokens, wrapped.out_features, dtype=torch.float64)
    own = [slot.parameters[f"{name}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
    with base.host.run(Plan.of_batch(batch)):
        y = wrapped(x[None])[0]
        found = torch.autograd.grad((y * out).sum(), [x, *own])
    a, b, magnitude = own
    naive = nn.functional.linear(x, naive_dora(stored(base, name), a, b, magnitude, 2.0), wrapped.bias)
    torch.testing.assert_close(y, naive, **EXACT)
    expected = torch.autograd.grad((naive * out).sum(), [x, a, b, magnitude])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_a_norm_is_computed_anew_when_something_changed() -> None:
    base, slot = alone(LoRA(rank=3, dora=True))
    before = base.logits(IDS, slot.number)
    assert torch.equal(base.logits(IDS, slot.number), before)
    start = slot.state()
    with torch.no_grad():
        slot.parameters[f"{TARGET['llama']}.lora_A.weight"].mul_(2)
    assert not torch.equal(base.logits(IDS, slot.number), before)
    slot.load(start)
    assert torch.equal(base.logits(IDS, slot.number), before)


def test_a_row_of_zeros_stays_one() -> None:
    """PEFT divides by its norm and answers NaN."""
    base = tiny_base("llama", torch.float64)
    with torch.no_grad():
        base.model.get_parameter(f"{TARGET['llama']}.weight")[3] = 0
    plain = base.logits(IDS)
    slot = base.host.attach([LoRA(rank=2, dora=True)])
    torch.testing.assert_close(base.logits(IDS, slot.number), plain, **EXACT)
    run = cases.slot_run(base, slot, 1, num_steps=3)
    trainer = Trainer(base, [run])
    assert all(math.isfinite(trainer.step()[0].loss) for _ in range(3))
    assert all(tensor.isfinite().all() for tensor in slot.state().values())


def test_norms_of_narrow_weights_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in fp32: as if the weight had been widened first."""
    monkeypatch.setattr(low_rank, "PART", 100)
    weight, a, b = torch.randn(37, 16).bfloat16(), torch.randn(3, 16), torch.randn(37, 3)
    squared = low_rank.squared_row_norms(weight)
    found = low_rank.dora_terms(low_rank.Terms(a, b, 0.5), weight, squared, torch.ones(37)).output_scale
    assert found is not None
    torch.testing.assert_close(1 / found, (weight.float() + 0.5 * b @ a).norm(dim=1), atol=1e-5, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ PiSSA


@pytest.mark.parametrize("model_type", TARGET)
def test_pissa_starts_from_the_truncated_decomposition(model_type: str) -> None:
    base, slot = alone(LoRA(rank=3, alpha=6.0, init="pissa"), model_type, shaken=False)
    name = TARGET[model_type]
    a, b = factors(slot, name)
    u, s, vh = torch.linalg.svd(stored(base, name), full_matrices=False)
    assert (len(a), b.shape[1]) == (3, 3)
    torch.testing.assert_close(2.0 * b @ a, (u[:, :3] * s[:3]) @ vh[:3], **EXACT)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), **EXACT)  # both have √S
    torch.testing.assert_close(b.norm(dim=0) ** 2 * 2.0, s[:3], **EXACT)


@pytest.mark.parametrize("model_type", TARGET)
def test_pissa_leaves_the_base_where_it_is(model_type: str) -> None:
    """In its own precision, exactly; afterwards the change is c (B A − B₀ A₀)."""
    base = tiny_base(model_type)
    slot = base.host.attach([LoRA(rank=3, alpha=6.0, init="pissa")])
    assert torch.equal(base.logits(IDS, slot.number), base.logits(IDS))
    name = TARGET[model_type]
    base, slot = alone(LoRA(rank=3, alpha=6.0, init="pissa"), model_type, shaken=False)
    a0, b0 = (factor.clone() for factor in factors(slot, name))
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.mul_(1.5)
    expected = stored(base, name) + 2.0 * (1.5**2 - 1) * b0 @ a0
    torch.testing.assert_close(new_weight(base, slot, name), expected, **EXACT)
    trained = base.logits(IDS, slot.number)
    slot.bake()
    a, b = factors(slot, name)
    assert (len(a), b.shape[1]) == (6, 6)
    torch.testing.assert_close(stored(base, name) + 2.0 * b @ a, expected, **EXACT)
    torch.testing.assert_close(base.logits(IDS, slot.number), trained, atol=1e-10, rtol=0)


def test_pissa_starts_alike_whatever_the_seed() -> None:
    """What goes on from a saved A and B must find the same A₀ and B₀."""
    starts = [alone(LoRA(rank=3, init="pissa"), shaken=False, seed=seed)[1].state() for seed in (1, 2)]
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


@pytest.mark.parametrize("inits", [("pissa", "random"), ("random", "pissa")])
def test_pissas_training_goes_on_as_pissa_only(inits: tuple[Any, Any], own_home: Path) -> None:
    """A and B of one are no A and B of the other, though they have the same shapes."""
    base = tiny_base()
    made, other = (LoRA(rank=2, init=init) for init in inits)
    slot = base.host.attach([made])
    artifact = save("made", base, slot, [made], {}, training_state=slot.bake())
    start_from(further := base.host.attach([made], seed=1), artifact)
    torch.testing.assert_close(base.logits(IDS, further.number), base.logits(IDS, slot.number), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="these weights are for something else"):
        start_from(base.host.attach([other]), artifact)


def test_large_weights_are_decomposed_by_power_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT", 8)
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    s = 0.8 ** torch.arange(40, dtype=torch.float64)
    a, b = low_rank.leading((u * s) @ v.t(), 4)
    torch.testing.assert_close(b @ a, (u[:, :4] * s[:4]) @ v.t()[:4], atol=1e-9, rtol=0)


def test_more_singular_vectors_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"takes singular vectors, and model.layers.0.* has 16 only"):
        tiny_base().host.attach([LoRA(rank=17, init="pissa", target_modules=("k_proj",))])


# ------------------------------------------------------------------------------------------------ LoRA+


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_moves_b_further(dora: bool) -> None:
    """AdamW's first step is the learning rate times the gradient's sign, wherever the gradient is not tiny."""
    base, slot = alone(LoRA(rank=2, dora=dora, lora_plus_ratio=5.0))
    before = slot.state()
    settings = {"num_steps": 1, "learning_rate": 1e-3, "schedule": "constant", "warmup_ratio": 0.0, "weight_decay": 0.0}
    Trainer(base, [cases.slot_run(base, slot, 1, **settings)]).step()
    for name, after in slot.state().items():
        moved = (after - before[name]).abs().max()
        expected = 5e-3 if ".lora_B." in name else 1e-3
        assert float(moved) == pytest.approx(expected, rel=1e-3), name


# ------------------------------------------------------------------------------------------------ starts


@pytest.mark.parametrize(("side", "init"), [("a", i) for i in ("gaussian", "xavier", "normal")] + [("b", "xavier")])
def test_random_starts_have_their_deviation(side: str, init: str) -> None:
    base = tiny_base()
    other = {"b": {"init_a": "zero"}}.get(side, {})
    slot = base.host.attach([LoRA(rank=24, **{f"init_{side}": init}, **other)])
    for name in base.host.linear_names():
        size_in, size_out = linear_sizes(base.model.get_submodule(name))
        width = size_in if side == "a" else size_out
        deviation = {"gaussian": 1 / 24, "xavier": math.sqrt(2 / (24 + width)), "normal": 0.2}[init]
        factor = slot.parameters[f"{name}.lora_{side.upper()}.weight"].detach()
        assert float(factor.std()) == pytest.approx(deviation, rel=0.15)
        assert abs(float(factor.mean())) < 0.15 * deviation


def test_kaiming_is_the_uniform_start_of_the_authors() -> None:
    start = low_rank.started("kaiming", (64, 100), torch.Generator().manual_seed(0))
    assert 0.098 < float(start.abs().max()) <= 0.1  # √(6 / ((1 + 5) · 100))
    assert float(start.std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.05)


def test_two_random_starts_are_not_the_base() -> None:
    base, slot = alone(LoRA(rank=2, init_a="xavier", init_b="normal"), shaken=False)
    assert float((base.logits(IDS, slot.number) - base.logits(IDS)).abs().max()) > 1e-3
    base, slot = alone(LoRA(rank=2, init_a="zero", init_b="normal"), shaken=False)
    assert torch.equal(base.logits(IDS, slot.number), base.logits(IDS))


# ------------------------------------------------------------------------------------------------ patterns and targets


def test_patterns_decide_rank_and_alpha_and_the_first_one_wins() -> None:
    technique = LoRA(
        rank=2, alpha=4.0, rank_pattern={"layers.1.*": 3, "down_proj": 5}, alpha_pattern={"*.down_proj": 10.0}
    )
    base, slot = alone(technique)
    for name in base.host.linear_names():
        down = name.endswith("down_proj")
        rank = 3 if ".1." in name else 5 if down else 2
        a, b = factors(slot, name)
        assert (len(a), b.shape[1]) == (rank, rank)
        scale = (10.0 if down else 4.0) / rank
        torch.testing.assert_close(new_weight(base, slot, name), stored(base, name) + scale * b @ a, **EXACT)


def test_excluded_modules_are_left_alone() -> None:
    base = tiny_base()
    technique = LoRA(rank=2, target_modules=("q_proj", "mlp.*"), exclude_modules=("layers.1.*", "up_proj"))
    slot = base.host.attach([technique])
    parts = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    expected = {f"model.layers.{layer}.{part}" for layer in (0, 2) for part in parts}
    assert set(slot.deltas) == expected


@pytest.mark.parametrize(
    ("model_type", "ends"),
    [("llama", {"q_proj", "k_proj", "v_proj"}), ("gpt2", {"c_attn"}), ("phi3", {"qkv_proj"})],
)
def test_query_key_value(model_type: str, ends: set[str]) -> None:
    slot = tiny_base(model_type).host.attach([LoRA(rank=2, target_modules="query-key-value")])
    assert {name.rpartition(".")[2] for name in slot.deltas} == ends


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"donw_proj": 4}}, "rank_pattern: 'donw_proj' matches none of this LoRA's targets"),
        ({"alpha_pattern": {"q_porj": 4}}, "alpha_pattern: 'q_porj' matches none"),
        ({"target_modules": ("q_proj",), "rank_pattern": {"v_proj": 4}}, "rank_pattern: 'v_proj' matches none"),
        ({"rank_pattern": {"*": 4, "q_proj": 2}}, "'q_proj' has no effect, patterns before it take every layer"),
        ({"exclude_modules": ("lm_head",)}, "exclude_modules: 'lm_head' matches none"),
        ({"exclude_modules": ("*",)}, "this LoRA has no target"),
        ({"target_modules": ()}, "this LoRA has no target"),
        ({"target_modules": ("x_proj",)}, "matches no linear layer"),
    ],
)
def test_patterns_without_effect_are_errors(settings: dict[str, Any], message: str) -> None:
    base = tiny_base()
    with pytest.raises(ConfigError, match=message):
        base.host.attach([LoRA(**settings)])
    assert not base.host.slots


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_a": "zero", "init_b": "zero"}, "both zero"),
        ({"init_a": "zero"}, "both zero"),
        ({"init": "pissa", "init_a": "xavier"}, "no effect with init: pissa"),
        ({"init": "pissa", "init_b": "normal"}, "no effect with init: pissa"),
        ({"init": "pissa", "lora_plus_ratio": 4}, "lora_plus_ratio is for a start where one"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern"),
    ],
)
def test_settings_that_cannot_take_effect_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        LoRA(**settings)


# ------------------------------------------------------------------------------------------------ on disk


PARTS = {
    "two of different targets": [
        LoRA(rank=2, target_modules=("q_proj",)),
        LoRA(rank=3, alpha=5.0, target_modules=("down_proj",)),
    ],
    "two kinds": [
        LoRA(rank=2, target_modules=("q_proj",), dora=True),
        LoRA(rank=3, target_modules=("down_proj", "v_proj"), init="pissa", rank_pattern={"v_proj": 2}),
    ],
}


@pytest.mark.parametrize("techniques", PARTS.values(), ids=PARTS)
def test_two_loras_in_one_list_are_saved_and_loaded(techniques: list[LoRA], own_home: Path) -> None:
    base = tiny_base()
    slot = base.host.attach(techniques, seed=1)
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    slot.bake()
    artifact = save("both", base, slot, techniques, {})
    folders = sorted(path.name for path in artifact.folder.iterdir() if path.is_dir())
    assert folders == ["part-0-lora", "part-1-lora"]
    found = attach(base, artifact)
    assert torch.equal(base.logits(IDS, found.number), base.logits(IDS, slot.number))
    assert float((base.logits(IDS, found.number) - base.logits(IDS)).abs().max()) > 1e-2


@pytest.mark.parametrize("inits", [("random", "random"), ("pissa", "random"), ("random", "pissa")])
def test_two_loras_of_one_target_are_refused(inits: tuple[Any, Any]) -> None:
    first, second = inits
    with pytest.raises(ConfigError, match="two techniques of one list both want to add"):
        tiny_base().host.attach([LoRA(rank=2, init=first), LoRA(rank=2, init=second, target_modules=("q_proj",))])
