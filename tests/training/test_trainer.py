"""The trainer against a loop written out with the stock model; drawing, clipping, stopping, divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import technique_cases as cases
from tailor.data.examples import Example
from tailor.errors import ConfigError, TailorError
from tailor.models.base import Base
from tailor.objectives.sft import SFT
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.technique import Defaults
from tailor.training.optimizer import learning_rate_at
from tailor.training.settings import Resolved, TrainSettings, resolve_settings
from tailor.training.trainer import SlotRun, StepReport, Trainer, finish, mean_loss
from tiny_models import tiny_base, tiny_model

DEFAULTS = Defaults(learning_rate=0.5, num_epochs=4, min_steps=10, max_steps=100)


def lora_run(base: Base, **settings: Any) -> SlotRun:
    return cases.slot_run(base, base.host.attach([LoRA(rank=2, alpha=4)], seed=1), 1, **settings)


# ------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("max_grad_norm", [None, 0.3])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_full_training_equals_a_plain_loop_over_the_stock_model(
    model_type: str, max_grad_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row through transformers' own forward pass, cross-entropy, AdamW and clipping, in float64."""
    base = tiny_base(model_type, torch.float64)
    run = cases.slot_run(
        base,
        base.host.attach([Full()]),
        1,
        num_steps=4,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
        warmup_ratio=0.5,
    )
    draws = [run_at.example for step in range(4) for run_at in draw_at(run, step)]
    trainer = Trainer(base, [run])
    reports = [trainer.step()[0] for _ in range(4)]

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # Gemma's norms would round to fp32, ours do not
    stock = tiny_model(model_type, torch.float64)
    adamw = torch.optim.AdamW(stock.parameters(), lr=1.0, weight_decay=0.1, betas=run.settings.betas)
    for step, report in enumerate(reports):
        rows = draws[3 * step : 3 * step + 3]
        adamw.zero_grad()
        losses = [
            torch.nn.functional.cross_entropy(
                stock(input_ids=torch.tensor([row.token_ids]), use_cache=False).logits[0, :-1],
                torch.tensor([t if m else -100 for t, m in zip(row.token_ids, row.loss_mask, strict=True)][1:]),
                reduction="sum",
            )
            for row in rows
        ]
        loss = torch.stack(losses).sum() / sum(row.num_targets for row in rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), max_grad_norm or math.inf)
        adamw.param_groups[0]["lr"] = learning_rate_at(step, 0.01, 4, 2, "cosine")
        adamw.step()
        # RMSNorm runs in fp32 inside a float64 model, and AdamW divides by the gradient's size
        assert report.loss == pytest.approx(float(loss.detach()), abs=1e-6)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-5)


def draw_at(run: SlotRun, step: int) -> list[Any]:
    now, run.step = run.step, step
    drawn = run.draw()
    run.step = now
    return drawn


def test_rows_are_drawn_in_shuffled_epochs_whatever_the_batch_size() -> None:
    base = tiny_base()
    orders = []
    for size in (1, 2, 5):
        run = lora_run(base, num_rows=5, batch_size=size, num_steps=20)
        drawn = [item for step in range(10 // size) for item in draw_at(run, step)]
        orders.append([run.train.index((item.example,)) for item in drawn])
        assert [item.index for item in draw_at(run, 3)] == list(range(size))
        assert {item.slot for item in drawn} == {run.slot.number}
    assert orders[0] == orders[1] == orders[2]
    epochs = orders[0][:5], orders[0][5:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(5))
    assert epochs[0] != epochs[1]


def test_the_report_says_what_was_done() -> None:
    base = tiny_base()
    told: list[StepReport] = []
    run = lora_run(base, num_steps=4, warmup_ratio=0.5, schedule="linear", validation=2, eval_every=3)
    trainer = Trainer(base, [run], told.append)
    returned = []
    while not trainer.done:
        returned += trainer.step()
    assert told == returned
    assert [r.step for r in told] == [1, 2, 3, 4]
    assert [r.num_steps for r in told] == [4] * 4
    assert [r.learning_rate for r in told] == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert [r.validation_loss is None for r in told] == [True, True, False, False], "when due, and at the end"
    assert all(r.tokens_per_second > 0 for r in told)
    assert run.num_tokens == sum(len(i.example.token_ids) for step in range(4) for i in draw_at(run, step))
    assert trainer.step() == []


def test_clipping_scales_the_whole_gradient_of_a_slot() -> None:
    """AdamW forgets a constant factor, so clipping shows in the second moment of later, smaller gradients."""
    states = {}
    for limit in (None, 1e-3, 1e9):
        base = tiny_base("llama", torch.float64)
        run = lora_run(base, max_grad_norm=limit, num_steps=2)
        trainer = Trainer(base, [run])
        norm = trainer.step()[0].grad_norm
        states[limit] = run.optimizer.state()["0/exp_avg"]
        assert norm > 1e-3, "the norm is told as it was before clipping"
    assert torch.equal(states[None], states[1e9])
    torch.testing.assert_close(states[1e-3], states[None] * (1e-3 / norm), atol=1e-15, rtol=1e-9)


def test_the_mean_loss_is_per_token_not_per_row() -> None:
    base = tiny_base()
    slot = base.host.attach([LoRA(rank=2)])
    rows = cases.examples(base, slot, 3, 5)
    total = sum(-float(base.score(batch).sum()) for batch in cases.pack([cases.Placed(r) for r in rows], 10_000))
    assert mean_loss(base, slot, SFT(), [(r,) for r in rows], 50) == pytest.approx(
        total / sum(r.num_targets for r in rows), abs=1e-5
    )


def test_full_training_in_bf16_keeps_fp32_copies() -> None:
    base = tiny_base("llama", torch.bfloat16)
    slot = base.host.attach([Full()])
    run = cases.slot_run(base, slot, 1, num_steps=15, learning_rate=2e-3, schedule="constant", batch_size=6)
    before = mean_loss(base, slot, SFT(), run.train, 4096)
    trainer = Trainer(base, [run])
    while not trainer.done:
        trainer.step()
    assert mean_loss(base, slot, SFT(), run.train, 4096) < before - 0.2
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert run.optimizer.state()["0/parameters"].dtype == torch.float32


def test_lora_on_a_bf16_base_is_trained_in_fp32() -> None:
    base = tiny_base("llama", torch.bfloat16)
    run = lora_run(base, num_steps=15, learning_rate=2e-2, schedule="constant", batch_size=6)
    before = mean_loss(base, run.slot, SFT(), run.train, 4096)
    trainer = Trainer(base, [run])
    while not trainer.done:
        trainer.step()
    assert {p.dtype for p in run.slot.parameters.values()} == {torch.float32}
    assert mean_loss(base, run.slot, SFT(), run.train, 4096) < before - 0.05


# ------------------------------------------------------------------------------------------------ when it ends


def test_early_stopping_keeps_the_best_weights() -> None:
    base = tiny_base()
    run = lora_run(base, num_steps=40, learning_rate=0.05, schedule="constant", validation=77, eval_every=1, patience=3)
    trainer = Trainer(base, [run])
    losses, states = [], []
    while not trainer.done:
        losses.append(trainer.step()[0].validation_loss)
        states.append(run.slot.state())
    assert run.stopped == "early stopping"
    best = min(range(len(losses)), key=lambda k: losses[k] or 0.0)
    assert len(losses) == best + 1 + 3 < 40
    assert (run.best_step, run.best_loss) == (best + 1, losses[best])
    finish(run)
    assert all(torch.equal(t, states[best][n]) for n, t in run.slot.state().items())
    assert mean_loss(base, run.slot, SFT(), run.validation, run.settings.tokens_per_batch) == losses[best]


def test_without_patience_it_goes_on() -> None:
    base = tiny_base()
    run = lora_run(base, num_steps=20, learning_rate=1.0, validation=77, eval_every=1, patience=None)
    trainer = Trainer(base, [run])
    while not trainer.done:
        trainer.step()
    assert (run.step, run.stopped) == (20, None)
    assert run.stale > 1


def test_without_validation_the_last_weights_stay() -> None:
    base = tiny_base()
    run = lora_run(base)
    trainer = Trainer(base, [run])
    while not trainer.done:
        trainer.step()
    last = run.slot.state()
    finish(run)
    assert all(torch.equal(t, last[n]) for n, t in run.slot.state().items())


@pytest.mark.parametrize("validation", [None, 2])
def test_divergence_stops_before_the_weights_are_touched(validation: int | None) -> None:
    base = tiny_base()
    run = lora_run(base, num_steps=30, validation=validation, eval_every=1, patience=None)
    trainer = Trainer(base, [run])
    trainer.step(), trainer.step()
    good = run.slot.state()
    poisoned = SFT.model_construct()
    object.__setattr__(poisoned, "loss", lambda scored: scored.logprobs.sum() * math.nan)
    run.objective = poisoned
    report = trainer.step()[0]
    assert math.isnan(report.loss)
    assert run.stopped == "diverged"
    assert trainer.done
    assert all(torch.equal(t, good[n]) for n, t in run.slot.state().items())
    if validation is None:
        with pytest.raises(TailorError, match="infinite or NaN at step 3") as caught:
            finish(run)
        assert caught.value.hint == "lower train.learning_rate (it was 0.01)"
    else:
        finish(run)
        assert all(t.isfinite().all() for t in run.slot.state().values())


def test_a_learning_rate_that_is_far_too_high_is_noticed() -> None:
    base = tiny_base()
    run = lora_run(base, num_steps=30, learning_rate=1e30, schedule="constant")
    trainer = Trainer(base, [run])
    while not trainer.done:
        trainer.step()
    with pytest.raises(TailorError, match="infinite or NaN"):
        finish(run)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("given", "rows", "expected"),
    [
        ({}, 100, Resolved(0.5, 50, 8, 5, 5, 5)),
        ({}, 8, Resolved(0.5, 10, 8, 1, 1, 1)),  # never more rows in a step than there are; min_steps
        ({}, 9999, Resolved(0.5, 100, 16, 10, 10, 10)),  # max_steps
        ({"num_steps": 7, "learning_rate": 0.1, "batch_size": 4}, 100, Resolved(0.1, 7, 4, 1, 1, 1)),
        ({"num_epochs": 2.5, "batch_size": 10, "warmup_ratio": 0.2}, 100, Resolved(0.5, 25, 10, 5, 2, 2)),
        ({"num_epochs": 0.01}, 100, Resolved(0.5, 1, 8, 0, 1, 1)),
        ({"num_steps": 50, "eval_every": 20, "checkpoint_every": 7}, 20_000, Resolved(0.5, 50, 32, 5, 20, 7)),
    ],
)
def test_what_is_not_given_is_filled_in(given: dict[str, Any], rows: int, expected: Resolved) -> None:
    assert resolve_settings(TrainSettings(**given), DEFAULTS, rows, 1.0) == expected


def test_rates_relative_to_the_embeddings() -> None:
    relative = Defaults(learning_rate=2.0, num_epochs=1, min_steps=1, max_steps=9, per_embedding_rms=True)
    assert resolve_settings(TrainSettings(), relative, 10, 0.03).learning_rate == pytest.approx(0.06)
    assert resolve_settings(TrainSettings(), DEFAULTS, 10, 0.03).learning_rate == 0.5
    assert resolve_settings(TrainSettings(learning_rate=0.1), relative, 10, 0.03).learning_rate == 0.1, "as given"


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="both given"):
        resolve_settings(TrainSettings(num_epochs=1, num_steps=5), DEFAULTS, 10, 1.0)


def test_defaults_by_hand() -> None:
    # 4 passes over 20 rows are 80 rows: 5 steps of 16, held at 10; of 4: 20 steps
    assert DEFAULTS.num_steps(20, 16) == 10
    assert DEFAULTS.num_steps(20, 4) == 20
    assert DEFAULTS.num_steps(21, 4) == 21
    assert Defaults(0.1, 1, 1, 9).num_steps(17, 16) == 2, "rounded up: no row is left out"


def test_an_example_knows_its_targets() -> None:
    assert Example([1, 2, 3], [0, 1, 1]).num_targets == 2


def test_the_sequences_of_one_row_are_drawn_together_and_share_a_group() -> None:
    base = tiny_base()
    slot = base.host.attach([LoRA(rank=2)])
    rows = cases.examples(base, slot, 1, 8)
    pairs = [(rows[2 * k], rows[2 * k + 1]) for k in range(4)]
    run = SlotRun("pairs", slot, SFT(), pairs, [], TrainSettings(), Resolved(0.1, 2, 2, 0, 1, 1))
    drawn = run.draw()
    assert [item.index for item in drawn] == [0, 1, 2, 3]
    assert [item.example.group for item in drawn] == [0, 0, 1, 1]
    texts = [tuple(item.example.token_ids) for item in drawn]
    whole = {(tuple(first.token_ids), tuple(second.token_ids)) for first, second in pairs}
    assert {(texts[0], texts[1]), (texts[2], texts[3])} <= whole
