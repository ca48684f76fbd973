"""Plan: what a tuning run takes in memory, time and disk, and whether it fits, before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tailor.config import load_recipe
from tailor.data.dataset import Dataset, load_dataset
from tailor.errors import ConfigError, ResourceError, TailorError
from tailor.evaluation.drawing.quantities import size
from tailor.machine import memory as main_memory
from tailor.models.base import dtype_name
from tailor.models.files import EMBEDDED
from tailor.recipes.plan_estimate import Sketch, TuneEstimate, estimate_tune, longest, sketch_tune
from tailor.recipes.tune_settings import TuneRecipe
from tailor.runs import home
from tailor.techniques.soft_prompt import templates_of
from tailor.training.estimate import PROCESS
from tailor.training.progress import peak_memory
from tailor.training.settings import Resolved
from tailor.training.speed import measure_speed
from tailor.training.trace import weightless_base

MEMORY_ERROR = 0.10
SECONDS_ERROR = 0.50
"""How far estimates are off: 13 of 14 memories and three in four of the times by no more; times are mostly too long.

benchmarks/plan_error.py, its result of the newest date.
"""

TIGHT = 0.85
"""Share of the free memory from which on a run that fits is called tight."""

SMALLEST_PASS = 64
"""The fewest tokens per batch that are suggested."""


@dataclass(frozen=True)
class Suggestion:
    """Overrides with which the run fits, by the same estimate."""

    overrides: tuple[str, ...]
    why: str
    bytes: int


@dataclass(frozen=True)
class Room:
    """Free bytes, None where the system does not say. `memory` is the computing device's, `host` the processor's."""

    memory: int | None
    host: int | None
    disk: int


@dataclass(frozen=True)
class RunPlan:
    """What a run takes and what there is. `seconds` is None when the speed was not measured.

    `misfit` says in words what does not fit; None when everything does.
    """

    sketch: Sketch
    estimate: TuneEstimate
    room: Room
    seconds: float | None
    misfit: str | None
    suggestions: tuple[Suggestion, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """`fits`, `tight`, `does not fit`, or `unknown` where the system does not tell its memory."""
        if self.misfit is not None:
            return "does not fit"
        if self.room.memory is None:
            return "unknown"
        return "tight" if self.estimate.peak.bytes > TIGHT * self.room.memory else "fits"

    @property
    def flops(self) -> float:
        """Operations of the whole run, training and validation."""
        work, heaviest = self.estimate.work, self.estimate.heaviest
        return work.flops(heaviest) if work is not None and heaviest is not None else 0.0

    def check(self) -> None:
        """Raise ResourceError, with the suggestions, when the run does not fit."""
        if self.misfit is None:
            return
        told = "; or ".join(f"{' '.join(s.overrides)} ({size(s.bytes)}: {s.why})" for s in self.suggestions)
        raise ResourceError(self.misfit, hint=told or "choose a smaller base, or a machine with more memory")

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON. Sizes are bytes, times seconds."""
        sketch, estimate, resolved, work = self.sketch, self.estimate, self.sketch.resolved, self.estimate.work
        return {
            "verdict": self.verdict,
            "misfit": self.misfit,
            "base": {
                "name": sketch.recipe.base.name,
                "num_parameters": sketch.base.num_parameters,
                "device": str(sketch.device),
                "dtype": dtype_name(sketch.base.dtype),
            },
            "techniques": [technique.type for technique in sketch.recipe.technique],
            "num_parameters": sketch.slot.num_parameters,
            "rows": {"train": sketch.num_train, "validation": sketch.num_validation, "sampled": sketch.sampled},
            "training": None if resolved is None else _schedule(resolved),
            "memory": {
                "peak": estimate.peak.bytes,
                "peak_moment": estimate.peak.name,
                "free": self.room.memory,
                "error": MEMORY_ERROR,
                "moments": [{**asdict(moment), "bytes": moment.bytes} for moment in estimate.moments],
                "host": estimate.host if estimate.needs.on_gpu else None,
                "host_free": self.room.host if estimate.needs.on_gpu else None,
            },
            "disk": {**asdict(estimate.disk), "peak": estimate.disk.peak, "free": self.room.disk},
            "work": None if work is None else {**asdict(work), "num_tokens": work.num_tokens},
            "heaviest_pass": None if estimate.heaviest is None else asdict(estimate.heaviest),
            "flops": self.flops,
            "seconds": self.seconds,
            "seconds_error": SECONDS_ERROR,
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
            "notes": list(self.notes),
        }


def _schedule(resolved: Resolved) -> dict[str, int]:
    """Steps and rows. The learning rate may be relative to word embeddings, which were not read."""
    return {name: value for name, value in asdict(resolved).items() if name != "learning_rate"}


def plan(
    recipe: TuneRecipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    memory: int | None = None,
    measure: bool = True,
) -> RunPlan:
    """What `tune` of this recipe takes. No weights are loaded; of the base, configuration and tokenizer are read.

    `memory`: free bytes of the device, to plan for another machine. With `measure`, the speed of this machine is
    measured (about a second) when the run fits. Raises the errors that `tune` would raise for the recipe and its rows;
    that it does not fit is no error here but in `check()`.
    """
    if not isinstance(recipe, TuneRecipe):
        recipe = load_recipe(recipe, TuneRecipe, overrides).recipe
    elif overrides:
        raise ConfigError("overrides go with the path of a recipe; change a TuneRecipe with model_copy(update=…)")
    dataset = load_dataset(recipe.data, recipe.train.seed, templates=templates_of(recipe.technique))
    sketch = sketch_tune(recipe, dataset)
    estimate = estimate_tune(sketch)
    room = _room(sketch.device, memory)
    misfit = _misfit(estimate, room)
    suggestions = tuple(_suggestions(sketch, dataset, room)) if misfit else ()
    seconds = _seconds(sketch, estimate) if measure and not misfit and _can_measure(sketch, estimate) else None
    notes = _notes(sketch, dataset)
    if memory is not None and seconds is not None:
        notes += ("the time is this machine's",)
    return RunPlan(sketch, estimate, room, seconds, misfit, suggestions, notes)


def _room(device: torch.device, memory: int | None) -> Room:
    """What is free, with the part of this process that the run would need again itself."""
    found = main_memory()
    own = min(PROCESS, peak_memory())
    host = None if found is None else found[0] + own
    free = host
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    folder = home()
    while not folder.exists():
        folder = folder.parent
    return Room(free if memory is None else memory, host, shutil.disk_usage(folder).free)


def _misfit(estimate: TuneEstimate, room: Room) -> str | None:
    peak = estimate.peak
    if room.memory is not None and peak.bytes > room.memory:
        return f"it would take about {size(peak.bytes)} of memory (in {peak.name}), and {size(room.memory)} are free"
    if estimate.needs.on_gpu and room.host is not None and estimate.host > room.host:
        return f"it would take about {size(estimate.host)} of main memory, and {size(room.host)} are free"
    if estimate.disk.peak > room.disk:
        return (
            f"it would write about {size(estimate.disk.peak)}, and {size(room.disk)} are free on the disk of {home()}"
        )
    return None


def _suggestions(sketch: Sketch, dataset: Dataset, room: Room) -> list[Suggestion]:
    """Every single change with which the run fits, with the estimate's error to spare; else the first combination."""
    recipe = sketch.recipe
    if room.memory is not None:
        room = replace(room, memory=round(room.memory / (1 + MEMORY_ERROR)))
    changes = list(_changes(sketch))
    found = [_fitting(recipe, (), "fewer tokens in a pass, the same result", dataset, room)]
    found += [_fitting(recipe, overrides, why, dataset, room) for overrides, why in changes]
    for number in range(2, len(changes) + 1):
        if not any(found):
            overrides = tuple(part for change, _ in changes[:number] for part in change)
            found.append(_fitting(recipe, overrides, "; ".join(why for _, why in changes[:number]), dataset, room))
    if not any(found) and recipe.base.name not in EMBEDDED:
        found += [_fitting(recipe, (f"base.name={name}",), "a smaller base", dataset, room) for name in EMBEDDED]
    return [suggestion for suggestion in found if suggestion is not None]


def _changes(sketch: Sketch) -> Iterator[tuple[tuple[str, ...], str]]:
    """Overrides that may save memory, and why."""
    recipe = sketch.recipe
    if any(not technique.traits.frozen_base for technique in sketch.techniques):
        own_rate = ("train.learning_rate=null",) if recipe.train.learning_rate is not None else ()
        yield ("technique=lora", *own_rate), "gradients and optimizer of small matrices only"
    if sketch.base.dtype.itemsize > torch.bfloat16.itemsize:
        yield ("base.dtype=bfloat16",), "half the bytes of weights and activations"
    truncation = ("data.truncation=drop",) if recipe.data.truncation == "error" else ()
    yield (f"data.max_seq_len={longest(sketch.train) // 2}", *truncation), "without the longest rows"


def _fitting(
    recipe: TuneRecipe, overrides: tuple[str, ...], why: str, dataset: Dataset, room: Room
) -> Suggestion | None:
    """The changed run as it is, or with the most tokens per batch with which it fits, or with its longest rows dropped.

    None when it never fits, or when the changed recipe is refused.
    """
    try:
        changed = load_recipe(None, TuneRecipe, overrides, recipe.model_dump(mode="json")).recipe
        sketch = sketch_tune(changed, dataset)
        tokens = changed.train.tokens_per_batch
        while True:
            own = () if tokens == changed.train.tokens_per_batch else (f"train.tokens_per_batch={tokens}",)
            if (overrides or own) and _misfit(estimate := estimate_tune(sketch, tokens), room) is None:
                return Suggestion((*overrides, *own), why, estimate.peak.bytes)
            if tokens // 2 < max(SMALLEST_PASS, longest(sketch.train)):
                return None
            tokens //= 2
    except TailorError:
        return None


def _can_measure(sketch: Sketch, estimate: TuneEstimate) -> bool:
    """Whether this machine has room for one layer, also when the plan is for another."""
    here = _room(sketch.device, None).memory
    return here is None or 2 * estimate.needs.weights < here


def _seconds(sketch: Sketch, estimate: TuneEstimate) -> float:
    """Training with validation, at the speed that one layer has here now."""
    if estimate.work is None or estimate.typical is None:
        return 0.0
    base = weightless_base(sketch.recipe.base.name, sketch.base.dtype, sketch.device)
    slot = base.host.attach(sketch.techniques, seed=sketch.recipe.train.seed)
    lengths = [segment.length for segment in estimate.typical.segments]
    targets = int(estimate.typical.loss_mask.sum())
    return measure_speed(base, slot, lengths, targets, sketch.device).seconds(estimate.work)


def _notes(sketch: Sketch, dataset: Dataset) -> tuple[str, ...]:
    notes = [*sketch.recipe.notes, *dataset.notes]
    if sketch.sampled:
        notes.append(
            f"{len(sketch.train):,} of {len(dataset.train):,} rows were tokenised; the others are taken to be alike"
        )
    if sketch.recipe.train.patience is not None and sketch.resolved is not None:
        notes.append("early stopping may end the run sooner")
    if sketch.recipe.base.quantize is not None:
        notes.append("memory is planned for weights as they are: quantised to nf4 they take less, and passes longer")
    return tuple(notes)
