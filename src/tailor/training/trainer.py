"""The one step: draw, pack, forward, one backward, one update per slot. For any number of slots on one base.

A slot trained beside others gets the updates it would get alone: its rows attend to themselves only, its loss is
divided by its own count, and its gradient, clipping, schedule, optimizer and stopping are its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tailor.data.examples import Bundle
from tailor.data.packing import Batch, Placed, pack
from tailor.errors import TailorError
from tailor.models.base import Base
from tailor.models.dropout import stable_seed
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.objectives.objective import Objective, scored_by_slot
from tailor.training.heap import keep_freed_memory
from tailor.training.optimizer import FlatAdamW, Schedule, grad_norms, learning_rate_at
from tailor.training.settings import Resolved, TrainSettings, relative_rates


@dataclass
class SlotRun:
    """One slot's training: what it learns from, how, and how far it is."""

    name: str
    slot: Slot
    objective: Objective
    train: Sequence[Bundle]
    validation: Sequence[Bundle]
    settings: TrainSettings
    resolved: Resolved
    step: int = 0
    num_tokens: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    stale: int = 0
    stopped: str | None = None
    lowest_layer: int = field(init=False)
    optimizer: FlatAdamW = field(init=False)
    _orders: dict[int, Tensor] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        slot, settings = self.slot, self.settings
        self.lowest_layer = slot.lowest_layer
        rates = relative_rates(slot)
        self.optimizer = FlatAdamW(slot.parameters, settings.weight_decay, settings.betas, rates, slot.touch)

    @property
    def active(self) -> bool:
        """Whether it still takes steps."""
        return self.stopped is None and self.step < self.resolved.num_steps

    def draw(self) -> list[Placed]:
        """The rows of the next step: shuffled epochs one after the other, whatever the batch size."""
        size, rows = self.resolved.batch_size, len(self.train)
        places = range(self.step * size, (self.step + 1) * size)
        epochs = {p // rows for p in places}
        self._orders = {
            e: self._orders[e] if e in self._orders else _order(rows, self.settings.seed, e) for e in sorted(epochs)
        }
        return place([self.train[int(self._orders[p // rows][p % rows])] for p in places], self.slot.number)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did to one slot. `tokens_per_second` counts the tokens of all rows of all slots in the pass.

    `stopped` says why no step follows this one, when it is not the last.
    """

    name: str
    step: int
    num_steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    seconds: float
    validation_loss: float | None = None
    stopped: str | None = None


Listener = Callable[[StepReport], None]


class Trainer:
    """Trains the runs side by side until each is done. `step()` may be called by hand; `tokens_per_batch` is shared."""

    def __init__(self, base: Base, runs: Sequence[SlotRun], listener: Listener | None = None) -> None:
        self.base = base
        self.runs = list(runs)
        self.listener = listener
        self.tokens_per_batch = min(run.settings.tokens_per_batch for run in runs)
        self.num_layers = base.host.num_layers
        if base.device.type == "cpu":
            keep_freed_memory()

    @property
    def done(self) -> bool:
        """Whether every run has finished or stopped."""
        return not any(run.active for run in self.runs)

    def leave(self, run: SlotRun) -> None:
        """Let go of a run that is done: what it held is freed while the others go on."""
        self.runs = [other for other in self.runs if other is not run]

    def step(self) -> list[StepReport]:
        """One optimizer step of every active run, with validation where it is due."""
        started = time.perf_counter()
        active = [run for run in self.runs if run.active]
        draws = {run.slot.number: run.draw() for run in active}
        losses = self._accumulate(active, draws)
        norms = grad_norms([run.optimizer for run in active])
        drawn = {number: sum(len(p.example.token_ids) for p in placed) for number, placed in draws.items()}
        reports = []
        for run, norm in zip(active, norms, strict=True):
            loss = float(losses[run.slot.number])
            self._update(run, loss, norm)
            run.num_tokens += drawn[run.slot.number]
            rate = learning_rate_at(run.step, *self._rate(run))
            run.step += 1
            speed = sum(drawn.values()) / (time.perf_counter() - started)
            validated = self._validate(run)
            elapsed = time.perf_counter() - started
            of_all = run.resolved.num_steps
            reports.append(
                StepReport(run.name, run.step, of_all, loss, norm, rate, speed, elapsed, validated, run.stopped)
            )
        for report in reports if self.listener else []:
            assert self.listener is not None
            self.listener(report)
        return reports

    def _accumulate(self, active: Sequence[SlotRun], draws: dict[int, list[Placed]]) -> dict[int, Tensor]:
        """Gradients of all active slots over the step's micro-batches; each slot's mean loss."""
        objectives = {run.slot.number: run.objective for run in active}
        counts = {
            number: max(1, objectives[number].count([p.example for p in placed])) for number, placed in draws.items()
        }
        losses = {number: torch.zeros((), dtype=torch.float64) for number in draws}
        for run in active:
            run.optimizer.zero_grad()
        steps = {run.slot.number: run.step for run in active}
        for batch in self._batches(active, draws):
            plan = Plan.of_batch(batch, steps=steps, training=True)
            with self.base.host.run(plan):
                scored = scored_by_slot(batch, self.base.batch_logprobs(batch, plan))
                parts = {n: objectives[n].loss(s) / counts[n] for n, s in scored.items()}
                torch.stack(list(parts.values())).sum().backward()
            summed = torch.stack([part.detach() for part in parts.values()]).cpu().double()  # one wait for all
            for number, part in zip(parts, summed, strict=True):
                losses[number] += part
        return losses

    def _batches(self, active: Sequence[SlotRun], draws: dict[int, list[Placed]]) -> Iterator[Batch]:
        """The micro-batches of a step: those of slots that need little of the backward pass apart from the others'."""
        tokens = {number: sum(len(p.example.token_ids) for p in placed) for number, placed in draws.items()}
        apart = {run.slot.number for run in active if run.slot.has_dropout}
        for numbers in by_depth({run.slot.number: run.lowest_layer for run in active}, tokens, self.num_layers):
            placed = [item for number in numbers for item in draws[number]]
            yield from pack(placed, self.tokens_per_batch, share_prefixes=True, apart=apart)

    def _update(self, run: SlotRun, loss: float, norm: float) -> None:
        """Clip and step one slot. A loss or gradient that is not finite stops this slot and no other."""
        if not (math.isfinite(norm) and math.isfinite(loss)):
            run.stopped = "diverged"
            return
        limit = run.settings.max_grad_norm
        clip = 1.0 if limit is None or norm <= limit else limit / norm
        run.optimizer.step(learning_rate_at(run.step, *self._rate(run)), clip)

    def _rate(self, run: SlotRun) -> tuple[float, int, int, Schedule]:
        r = run.resolved
        return r.learning_rate, r.num_steps, r.warmup_steps, run.settings.schedule

    def _validate(self, run: SlotRun) -> float | None:
        """Validation loss when due; keeps the best state, counts the stale ones, stops the run when patience ends."""
        due = run.step % run.resolved.eval_every == 0 or run.step == run.resolved.num_steps
        if not run.validation or not due or run.stopped:
            return None
        loss = mean_loss(self.base, run.slot, run.objective, run.validation, self.tokens_per_batch)
        if loss < run.best_loss:
            run.best_loss, run.best_step, run.stale = loss, run.step, 0
            run.best_state = run.slot.state()
        else:
            run.stale += 1
            patience = run.settings.patience
            if patience is not None and run.stale >= patience and run.step < run.resolved.num_steps:
                run.stopped = "early stopping"
        return loss


BACKWARD_WORTH_A_PASS = 160
"""Tokens whose whole backward pass takes as long as one more pass takes by itself (docs/log.md)."""


def by_depth(lowest: Mapping[int, int], tokens: Mapping[int, int], num_layers: int) -> list[list[int]]:
    """Slots in groups that get passes of their own: the backward pass of a batch goes as deep as its lowest slot needs.

    `lowest` is the lowest layer that each slot changes, `tokens` what it brings. From the highest down, a group ends
    where one more slot would take its tokens down by more layers than a pass of their own is worth.
    """
    groups: list[list[int]] = []
    held, reached = 0, 0
    for number in sorted(lowest, key=lambda number: -lowest[number]):
        if not groups or held * (reached - lowest[number]) > BACKWARD_WORTH_A_PASS * num_layers:
            groups.append([])
            held = 0
        groups[-1].append(number)
        held += tokens[number]
        reached = lowest[number]
    return groups


def finish(run: SlotRun) -> dict[str, Tensor]:
    """Put the best validated weights in place and drop what only trains; returns the state before that was dropped.

    Raises TailorError when the run diverged before any validation.
    """
    if run.stopped == "diverged" and not run.best_state:
        raise TailorError(
            f"{run.name}: the loss or its gradient became infinite or NaN at step {run.step}; nothing was trained",
            hint=f"lower train.learning_rate (it was {run.resolved.learning_rate:g})",
        )
    run.optimizer.close()
    if run.best_state:
        run.slot.load(run.best_state)
    return run.slot.bake()


def place(bundles: Sequence[Bundle], slot: int) -> list[Placed]:
    """The sequences of some rows, bound for a slot; those of one row get a group of their own and stay together."""
    grouped = [
        replace(example, group=number) if len(bundle) > 1 else example
        for number, bundle in enumerate(bundles)
        for example in bundle
    ]
    return [Placed(example, slot, index) for index, example in enumerate(grouped)]


VALIDATED_TOGETHER = 1024
"""Rows packed at a time: packing needs their tokens in memory, and there may be millions."""


def mean_loss(base: Base, slot: Slot, objective: Objective, bundles: Sequence[Bundle], tokens_per_batch: int) -> float:
    """The objective's loss per counted unit over the rows, without gradients."""
    total, count = 0.0, 0
    for start in range(0, len(bundles), VALIDATED_TOGETHER):
        placed = place(bundles[start : start + VALIDATED_TOGETHER], slot.number)
        for batch in pack(placed, tokens_per_batch, share_prefixes=True):
            scored = scored_by_slot(batch, base.score(batch))
            total += sum(float(objective.loss(part)) for part in scored.values())
        count += objective.count([item.example for item in placed])
    return total / max(1, count)


def _order(rows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(stable_seed(f"order/{seed}/{epoch}"))
    return torch.randperm(rows, generator=generator)
