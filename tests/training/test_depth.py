"""Rows whose lowest trained layer is high do not pay for the others: what is differentiated, counted in tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import technique_cases as cases
from tailor.models.base import Base
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.training import trainer as trainer_module
from tailor.training.trainer import SlotRun, Trainer, by_depth
from tiny_models import tiny_base

LAYERS = 6
LOW, HIGH = LoRA(rank=2), LoRA(rank=2, target_layers=(4, 5))


@contextmanager
def differentiated(base: Base) -> Iterator[Counter[int]]:
    """Tokens of which the backward pass takes a gradient at the output of each decoder layer's MLP; -1: the words."""
    found: Counter[int] = Counter()

    def count(place: int, output: Any) -> None:
        if torch.is_grad_enabled() and output.requires_grad:
            output.register_hook(lambda grad: found.update({place: grad.shape[1]}))

    stack = base.model.get_submodule(base.host.placement.layers(base.model))
    hooks = [
        layer.mlp.register_forward_hook(lambda module, args, output, place=place: count(place, output))
        for place, layer in enumerate(stack)
    ]
    words = base.model.get_input_embeddings()
    hooks.append(words.register_forward_hook(lambda module, args, output: count(-1, output)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def run_of(base: Base, technique: Any, name: str, task: int) -> SlotRun:
    return cases.slot_run(base, base.host.attach([technique], seed=task), task, name, num_steps=2)


def counted(techniques: Sequence[Any]) -> tuple[Counter[int], list[int], list[float]]:
    """Differentiated tokens per layer of one step, the tokens each slot brought, and the losses."""
    base = tiny_base(dtype=torch.float64, num_hidden_layers=LAYERS)
    runs = [run_of(base, technique, f"run {k}", k + 1) for k, technique in enumerate(techniques)]
    with differentiated(base) as found:
        reports = Trainer(base, runs).step()
    return found, [run.num_tokens for run in runs], [report.loss for report in reports]


def test_nothing_below_the_lowest_needed_layer_is_differentiated() -> None:
    found, (tokens,), _ = counted([HIGH])
    assert found == dict.fromkeys((4, 5), tokens)
    found, (tokens,), _ = counted([LOW])
    assert found == dict.fromkeys(range(LAYERS), tokens)
    found, _, _ = counted([PromptTuning(num_virtual_tokens=3)])
    assert set(found) == {-1, *range(LAYERS)}


@pytest.mark.parametrize("order", [1, -1])
def test_high_slots_do_not_pay_for_low_ones(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "BACKWARD_WORTH_A_PASS", 1)
    found, tokens, losses = counted([LOW, HIGH][::order])
    low, high = tokens[::order]
    assert found == {layer: low + (high if layer >= 4 else 0) for layer in range(LAYERS)}
    monkeypatch.setattr(trainer_module, "BACKWARD_WORTH_A_PASS", 10_000)
    found, _, together = counted([LOW, HIGH][::order])
    assert found == dict.fromkeys(range(LAYERS), low + high), "a pass of its own is not worth it"
    assert losses == pytest.approx(together, abs=1e-12)


@pytest.mark.parametrize(
    ("lowest", "tokens", "expected"),
    [
        ({1: 0}, {1: 10_000}, [[1]]),
        ({1: 0, 2: 0}, {1: 10_000, 2: 10_000}, [[1, 2]]),
        # 10 layers, 100 tokens a pass: 150 tokens times 8 layers are worth more than 100 times 10
        ({1: 0, 2: 8}, {1: 10, 2: 150}, [[2], [1]]),
        ({1: 0, 2: 8}, {1: 10_000, 2: 120}, [[2, 1]]),  # what the low one brings does not matter
        ({1: 8, 2: 0, 3: 8}, {1: 75, 2: 10, 3: 75}, [[1, 3], [2]]),
        # 120 · 2 layers is not worth it; with the next ones' 300 tokens 420 · 6 is
        ({1: 8, 2: 6, 3: 0}, {1: 120, 2: 300, 3: 9}, [[1, 2], [3]]),
        ({1: 9, 2: 5, 3: 0}, {1: 900, 2: 900, 3: 9}, [[1], [2], [3]]),
        ({1: -1, 2: 0}, {1: 9, 2: 1001}, [[2], [1]]),
    ],
)
def test_the_rule(
    lowest: dict[int, int], tokens: dict[int, int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "BACKWARD_WORTH_A_PASS", 100)
    assert by_depth(lowest, tokens, 10) == expected
