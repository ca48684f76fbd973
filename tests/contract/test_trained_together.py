"""A slot trained beside others gets the updates it would get alone: losses, weights, stopping, divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import technique_cases as cases
from tailor.errors import TailorError
from tailor.models.base import Base
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.training.settings import relative_rates
from tailor.training.trainer import SlotRun, StepReport, Trainer, finish
from tiny_models import tiny_base

SUBJECTS = [s for s in cases.TRAINED if all(cases.traits(name).mixes for name in s)]
"""What is trained and may share a pass: every technique, its other settings, and pairs."""

BESIDE = [(s, "lora") for s in SUBJECTS] + [(s, "prompt_tuning") for s in SUBJECTS if len(s) == 1]


@dataclass(frozen=True)
class Part:
    """One of several slots in training: technique (or several, composed), data, settings."""

    technique: Any
    task: int
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, base: Base, name: str) -> SlotRun:
        techniques = self.technique if isinstance(self.technique, tuple) else (self.technique,)
        slot = base.host.attach(techniques, seed=self.task)
        return cases.slot_run(base, slot, self.task, name, **self.settings)


def parts(num_steps: int) -> dict[str, Part]:
    """Two LoRAs with dropout and a prompt tuning on different data; one stops early, one is short, one diverges."""
    same = {"num_steps": num_steps}
    return {
        "lora": Part(LoRA(rank=2, alpha=4, dropout=0.3), 1, same | {"learning_rate": 0.01}),
        "tuning": Part(PromptTuning(num_virtual_tokens=4), 2, same | {"learning_rate": 0.1, "batch_size": 2}),
        "small": Part(
            LoRA(rank=3, alpha=3, dropout=0.1, target_modules="query-value"),
            3,
            {"num_steps": max(2, num_steps // 2), "learning_rate": 0.003, "schedule": "linear", "weight_decay": 0.1},
        ),
        "stops": Part(
            LoRA(rank=2, alpha=8),
            4,
            # validated on another task after every step: it gets worse there soon
            same | {"learning_rate": 0.03, "schedule": "constant", "validation": 99, "eval_every": 1, "patience": 1},
        ),
        "diverges": Part(LoRA(rank=2, alpha=4), 5, same | {"learning_rate": 1e200, "schedule": "constant"}),
    }


def train(runs: list[SlotRun], base: Base) -> dict[str, list[StepReport]]:
    reports: dict[str, list[StepReport]] = {run.name: [] for run in runs}
    trainer = Trainer(base, runs, listener=lambda report: reports[report.name].append(report))
    while not trainer.done:
        trainer.step()
    return reports


Outcome = tuple[list[StepReport], dict[str, Tensor], SlotRun]


def together(chosen: dict[str, Part], dtype: torch.dtype) -> dict[str, Outcome]:
    base = tiny_base("llama", dtype)
    runs = [part.run(base, name) for name, part in chosen.items()]
    reports = train(runs, base)
    return {run.name: (reports[run.name], run.slot.state(), run) for run in runs}


def alone(chosen: dict[str, Part], dtype: torch.dtype) -> dict[str, Outcome]:
    return {name: together({name: part}, dtype)[name] for name, part in chosen.items()}


def same_losses(found: list[StepReport], expected: list[StepReport], tolerance: float) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=tolerance, nan_ok=True)
        assert ours.learning_rate == theirs.learning_rate
        assert (ours.validation_loss is None) == (theirs.validation_loss is None)
        if ours.validation_loss is not None:
            assert ours.validation_loss == pytest.approx(theirs.validation_loss, abs=tolerance)


@pytest.mark.parametrize("order", [1, -1])
def test_float64_ten_steps(order: int) -> None:
    chosen = parts(10)
    apart = alone(chosen, torch.float64)
    for name, (reports, state, run) in together(dict(list(chosen.items())[::order]), torch.float64).items():
        same_losses(reports, apart[name][0], 1e-9)
        assert run.stopped == apart[name][2].stopped
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, apart[name][1][key], atol=1e-9, rtol=0, equal_nan=True)


def test_each_part_does_what_it_is_here_for() -> None:
    outcomes = together(parts(10), torch.float64)
    stopped = {name: run.stopped for name, (_, _, run) in outcomes.items()}
    assert stopped == {"lora": None, "tuning": None, "small": None, "stops": "early stopping", "diverges": "diverged"}
    lengths = {name: len(reports) for name, (reports, _, _) in outcomes.items()}
    assert lengths["lora"] == lengths["tuning"] == 10
    assert lengths["small"] == 5
    assert 1 < lengths["stops"] < 10
    assert 1 < lengths["diverges"] < 10
    with pytest.raises(TailorError, match="diverges: the loss or its gradient became infinite or NaN at step"):
        finish(outcomes["diverges"][2])


def test_fp32_twenty_steps() -> None:
    chosen = parts(20)
    apart = alone(chosen, torch.float32)
    for name, (reports, _, run) in together(chosen, torch.float32).items():
        same_losses(reports, apart[name][0], 1e-4)
        assert run.stopped == apart[name][2].stopped


@pytest.mark.parametrize(
    ("subject", "second"), BESIDE, ids=lambda part: part if isinstance(part, str) else cases.label(part)
)
def test_every_technique_beside_another(subject: cases.Subject, second: str) -> None:
    """Rates per parameter (LoRA+, combinations) and what is baked at the end included."""
    chosen = {
        "first": Part(
            tuple(map(cases.instance, subject)), 1, {"num_steps": 4, "learning_rate": 0.01, "max_grad_norm": 0.1}
        ),
        "second": Part(cases.CASES[second], 2, {"num_steps": 3, "learning_rate": 0.02}),
    }
    apart = alone(chosen, torch.float64)
    for name, (reports, state, run) in together(chosen, torch.float64).items():
        same_losses(reports, apart[name][0], 1e-9)
        # AdamW's steps, and rounding with them, grow with the rate
        scale = max([1.0, *relative_rates(run.slot).values()])
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, apart[name][1][key], atol=1e-9 * scale, rtol=0)
        for each in (run, apart[name][2]):
            finish(each)
        for key, tensor in run.slot.state().items():
            torch.testing.assert_close(tensor, apart[name][2].slot.state()[key], atol=1e-8 * scale, rtol=0)


@pytest.mark.parametrize("tokens_per_batch", [16, 100, 10_000])
def test_together_and_in_micro_batches(tokens_per_batch: int) -> None:
    chosen = {
        n: Part(p.technique, p.task, p.settings | {"tokens_per_batch": tokens_per_batch}) for n, p in parts(4).items()
    }
    apart = alone(parts(4), torch.float64)
    for name, (reports, _, _) in together(chosen, torch.float64).items():
        same_losses(reports, apart[name][0], 1e-9)


def test_a_slot_that_is_ahead_keeps_its_own_steps() -> None:
    """A resumed slot joins one that begins: its dropout and learning rate are those of its own step."""

    def start(base: Base) -> SlotRun:
        return Part(LoRA(rank=2, alpha=4, dropout=0.3), 1, {"num_steps": 6, "learning_rate": 0.01}).run(base, "ahead")

    base = tiny_base("llama", torch.float64)
    straight = train([run := start(base)], base)["ahead"]
    expected = run.slot.state()
    base = tiny_base("llama", torch.float64)
    late = Part(LoRA(rank=2, alpha=4, dropout=0.3), 2, {"num_steps": 6, "learning_rate": 0.01}).run(base, "late")
    ahead = start(base)
    first = Trainer(base, [ahead])
    reports = [first.step()[0] for _ in range(3)]
    both: dict[str, list[StepReport]] = train([late, ahead], base)
    same_losses(reports + both["ahead"], straight, 1e-9)
    for key, tensor in ahead.slot.state().items():
        torch.testing.assert_close(tensor, expected[key], atol=1e-9, rtol=0)


def test_the_same_twice_is_the_same() -> None:
    """No hidden state: two runs in one process agree to the bit."""
    first, second = (together(parts(5), torch.float32) for _ in range(2))
    for name, (reports, state, _) in first.items():
        assert [r.loss for r in reports] == pytest.approx([r.loss for r in second[name][0]], abs=0.0, nan_ok=True)
        assert all(torch.equal(t.nan_to_num(), second[name][1][k].nan_to_num()) for k, t in state.items())


def test_seeds_are_the_slots_own() -> None:
    """Another seed gives another start, another order and other masks; the same seed the same, whoever is beside."""
    make: Callable[[int], Part] = lambda seed: Part(LoRA(rank=2, dropout=0.3), 1, {"seed": seed, "batch_size": 2})  # noqa: E731
    losses = [[r.loss for r in together({"x": make(seed)}, torch.float64)["x"][0]] for seed in (0, 0, 1)]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
