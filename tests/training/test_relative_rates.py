"""Learning rates in a combination: every technique's parameters keep their own default's ratio to the slot's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import technique_cases as cases
from tailor.models.base import Base
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tailor.training.settings import relative_rates
from tailor.training.trainer import SlotRun, Trainer
from tiny_models import tiny_base

SOFT, LORA = PromptTuning(num_virtual_tokens=3), LoRA(rank=2)


def default(base: Base, technique: Any) -> float:
    defaults = technique.traits.defaults
    return float(defaults.learning_rate * (base.host.embedding_rms() if defaults.per_embedding_rms else 1.0))


def run_of(base: Base, *techniques: Any, **settings: Any) -> SlotRun:
    return cases.slot_run(base, base.host.attach(techniques, seed=1), 1, **settings)


def test_one_technique_keeps_the_multiples_it_asked_for() -> None:
    base = tiny_base()
    assert relative_rates(base.host.attach([LORA])) == {}
    assert relative_rates(base.host.attach([Prompting(shots=0, system="Hi."), SOFT])) == {}
    plus = base.host.attach([LoRA(rank=2, lora_plus_ratio=4.0)])
    assert relative_rates(plus) == plus.rates
    assert set(plus.rates.values()) == {4.0}


@pytest.mark.parametrize("order", [1, -1])
def test_the_last_one_sets_the_rate_and_the_others_keep_their_ratio(order: int) -> None:
    base = tiny_base()
    plus = LoRA(rank=2, lora_plus_ratio=4.0)
    slot = base.host.attach([SOFT, plus][::order])
    ratio = default(base, SOFT) / default(base, plus)
    rates = relative_rates(slot)
    for name, owner in slot.owners.items():
        own = 4.0 if "lora_B" in name else 1.0
        expected = own * (1.0 if owner is [SOFT, plus][::order][-1] else ratio**order)
        assert rates.get(name, 1.0) == pytest.approx(expected, rel=1e-12)
    assert ratio > 100


def test_two_of_a_kind_have_one_rate() -> None:
    base = tiny_base()
    slot = base.host.attach([LoRA(rank=2, target_modules=("q_proj",)), LoRA(rank=3, target_modules=("v_proj",))])
    assert relative_rates(slot) == {}


def test_each_parameter_moves_by_its_own_rate() -> None:
    """AdamW's first step moves every number that has a gradient by its learning rate."""
    base = tiny_base(dtype=torch.float64)
    run = run_of(base, SOFT, LORA, learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, max_grad_norm=None)
    before = run.slot.state()
    Trainer(base, [run]).step()
    ratio = default(base, SOFT) / default(base, LORA)
    for name, tensor in run.slot.state().items():
        moved = float((tensor - before[name]).abs().max())
        if moved:  # LoRA's A has no gradient while B is zero
            rate = 1e-3 * (ratio if run.slot.owners[name] is SOFT else 1.0)
            assert moved == pytest.approx(rate, rel=1e-3)
    assert any(not tensor.equal(before[name]) for name, tensor in run.slot.state().items() if "lora_B" in name)
