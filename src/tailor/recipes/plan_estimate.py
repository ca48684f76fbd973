"""What a tuning run takes, from its recipe, a sample of its rows and a base without weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tailor.data.dataset import Dataset
from tailor.data.examples import Bundle, Rendering
from tailor.data.packing import Batch, pack
from tailor.data.records import Record
from tailor.evaluation.parity import MAX_TWIN_PARAMETERS
from tailor.models.base import Base, pick_device, pick_dtype
from tailor.models.files import weight_files
from tailor.models.slots import Slot
from tailor.objectives import check_consumed, find_objective
from tailor.objectives.objective import Objective
from tailor.recipes.tune_prepare import bundles_of
from tailor.recipes.tune_settings import TuneRecipe
from tailor.recipes.verify import rendering_for
from tailor.techniques import Technique
from tailor.techniques.technique import training_defaults
from tailor.training.estimate import Moment, Needs, Pass, Trained, Work, highest, host_bytes, moments
from tailor.training.settings import Resolved, resolve_settings
from tailor.training.trace import trace_pass, weightless_base
from tailor.training.trainer import place

SAMPLED_TRAIN = 2000
SAMPLED_VALIDATION = 500
"""Rows that are tokenised; the others are taken to be like them."""

DRAWN_STEPS = 2000
"""Optimizer steps whose rows are drawn to find the longest micro-batch."""

PACKED_STEPS = 32
"""Steps that are packed, for the mean numbers of micro-batches and tokens."""

SAME_PRECISION = 0.1
"""Stored weights whose size differs by less than this share from the loaded ones need no conversion."""


@dataclass(frozen=True)
class Sketch:
    """A run without weights: what `tailor tune` prepares, on the meta device, for a sample of the rows.

    `num_train` and `num_validation` are rows that will be used, as far as the sample tells.
    """

    recipe: TuneRecipe
    device: torch.device
    base: Base
    slot: Slot
    techniques: tuple[Technique, ...]
    train: list[Bundle]
    validation: list[Bundle]
    num_train: int
    num_validation: int
    resolved: Resolved | None
    sampled: bool

    @property
    def copies(self) -> bool:
        """Whether verification at the end makes copies of the base."""
        return self.recipe.output.verify and self.base.num_parameters < MAX_TWIN_PARAMETERS


@dataclass(frozen=True)
class Disk:
    """Bytes written. `download` are weights that are not here yet; `temporary` is gone when the run ends."""

    download: int
    checkpoint: int
    artifact: int
    temporary: int

    @property
    def peak(self) -> int:
        """Most at one time."""
        return self.download + self.checkpoint + self.artifact + self.temporary


@dataclass(frozen=True)
class TuneEstimate:
    """What a run takes. `heaviest` is the longest micro-batch, `typical` the one most tokens are trained in."""

    needs: Needs
    moments: tuple[Moment, ...]
    host: int
    work: Work | None
    heaviest: Pass | None
    typical: Batch | None
    disk: Disk

    @property
    def peak(self) -> Moment:
        """The moment of the highest memory on the device that computes."""
        return highest(self.moments)


def sketch_tune(recipe: TuneRecipe, dataset: Dataset) -> Sketch:
    """Prepare a run as `tune` does, without the base's weights.

    Raises the errors that `tune` would raise for the recipe and the sampled rows (ConfigError, DataError, …).
    """
    objective = find_objective(recipe.objective)
    check_consumed(objective, dataset.train, dataset.validation)
    device = pick_device(recipe.base.device)
    base = weightless_base(recipe.base.name, pick_dtype(recipe.base.dtype, device), device)
    techniques = tuple(technique.prepare(dataset.train, recipe.train.seed) for technique in recipe.technique)
    slot = base.host.attach(techniques, seed=recipe.train.seed)
    rendering = rendering_for(recipe.data, base, slot)
    train, num_train = _bundles(dataset.train, SAMPLED_TRAIN, objective, rendering)
    validation, num_validation = _bundles(dataset.validation, SAMPLED_VALIDATION, objective, rendering)
    resolved = (
        resolve_settings(recipe.train, training_defaults(techniques), num_train, 1.0) if slot.parameters else None
    )
    sampled = len(dataset.train) > SAMPLED_TRAIN
    return Sketch(
        recipe, device, base, slot, techniques, train, validation, num_train, num_validation, resolved, sampled
    )


def estimate_tune(sketch: Sketch, tokens_per_batch: int | None = None) -> TuneEstimate:
    """Memory, work and disk of a sketched run, with its own `tokens_per_batch` or another."""
    limit = tokens_per_batch or sketch.recipe.train.tokens_per_batch
    heaviest = work = typical = None
    if sketch.resolved is not None:
        drawn = _drawn(sketch, sketch.resolved)
        apart = [sketch.slot.number] if sketch.slot.has_dropout else []
        steps = [pack(place(bundles, sketch.slot.number), limit, share_prefixes=True, apart=apart) for bundles in drawn]
        batches = sorted((batch for step in steps for batch in step), key=lambda batch: batch.num_tokens)
        heaviest = trace_pass(sketch.base, sketch.slot, batches[-1])
        typical = _middle(batches)
        work = _work(sketch, sketch.resolved, drawn[1:] or drawn, steps[1:] or steps, limit)
    needs = _needs(sketch, heaviest)
    return TuneEstimate(needs, moments(needs), host_bytes(needs), work, heaviest, typical, _disk(sketch))


def _bundles(
    records: Sequence[Record], most: int, objective: Objective, rendering: Rendering
) -> tuple[list[Bundle], int]:
    """The sequences of a sample, and the number of all rows that are left when rows are dropped as in the sample."""
    every = range(len(records))
    sample = [records[k] for k in (random.Random(0).sample(every, most) if len(every) > most else every)]
    bundles, _ = bundles_of(sample, objective, rendering)
    return list(bundles), max(1, round(len(records) * len(bundles) / len(sample)))


def _drawn(sketch: Sketch, resolved: Resolved) -> list[list[Bundle]]:
    """Rows of some steps as a run may draw them, the step with the most tokens first."""
    draw = random.Random(sketch.recipe.train.seed)
    size = min(resolved.batch_size, len(sketch.train))
    lengths = [_tokens([bundle]) for bundle in sketch.train]
    places = range(len(lengths))
    steps = [draw.sample(places, size) for _ in range(min(DRAWN_STEPS, resolved.num_steps))]
    longest = max(steps, key=lambda step: sum(lengths[place] for place in step))
    return [[sketch.train[place] for place in step] for step in (longest, *steps[:PACKED_STEPS])]


def _tokens(bundles: Sequence[Bundle]) -> int:
    return sum(len(example.token_ids) for bundle in bundles for example in bundle)


def longest(bundles: Sequence[Bundle]) -> int:
    """Tokens of the longest sequence."""
    return max(len(example.token_ids) for bundle in bundles for example in bundle)


def _middle(batches: Sequence[Batch]) -> Batch:
    """Half of the tokens are in batches that are no longer. `batches` are sorted by length."""
    half, seen = sum(batch.num_tokens for batch in batches) / 2, 0
    for batch in batches:
        seen += batch.num_tokens
        if seen >= half:
            return batch
    raise AssertionError("there are no batches")


def _work(
    sketch: Sketch, resolved: Resolved, drawn: Sequence[list[Bundle]], steps: Sequence[list[Batch]], limit: int
) -> Work:
    """What is computed, on average over the packed steps; validation rows beyond the sample are like those in it."""
    batches = [batch for step in steps for batch in step]
    scale = resolved.batch_size / min(resolved.batch_size, len(sketch.train)) / len(steps)
    checks = pack(place(sketch.validation, sketch.slot.number), limit, share_prefixes=True)
    more = sketch.num_validation / len(sketch.validation)
    return Work(
        num_steps=resolved.num_steps,
        row_tokens=scale * sum(_tokens(bundles) for bundles in drawn),
        passes=scale * len(batches),
        tokens=scale * sum(batch.num_tokens for batch in batches),
        targets=scale * sum(int(batch.loss_mask.sum()) for batch in batches),
        num_validations=-(-resolved.num_steps // resolved.eval_every),
        validation_passes=round(more * len(checks)),
        validation_tokens=round(more * sum(batch.num_tokens for batch in checks)),
        validation_targets=round(more * sum(int(batch.loss_mask.sum()) for batch in checks)),
    )


def _needs(sketch: Sketch, heaviest: Pass | None) -> Needs:
    base, slot = sketch.base, sketch.slot
    weights = base.num_parameters * base.dtype.itemsize
    stored = sum(path.stat().st_size for path in weight_files(base.folder)) or _download(base)
    rows = _tokens(sketch.train) * sketch.num_train / len(sketch.train)
    rows += _tokens(sketch.validation) * sketch.num_validation / len(sketch.validation)
    return Needs(
        weights=weights,
        converted=stored if abs(stored / weights - 1) > SAME_PRECISION else 0,
        trained=_trained(slot),
        heaviest=heaviest,
        row_tokens=round(rows),
        verifies=sketch.copies,
        on_gpu=sketch.device.type == "cuda",
    )


def _trained(slot: Slot) -> Trained:
    itemsize = next((parameter.dtype.itemsize for parameter in slot.parameters.values()), 4)
    return Trained(slot.num_parameters, itemsize, slot.owns_base)


def _download(base: Base) -> int:
    """Size of weights that are not here yet, by the precision that the configuration names."""
    dtype = getattr(base.config, "dtype", None)
    return base.num_parameters * (dtype.itemsize if isinstance(dtype, torch.dtype) else 2)


def _disk(sketch: Sketch) -> Disk:
    base, trained = sketch.base, _trained(sketch.slot)
    weights = base.num_parameters * base.dtype.itemsize
    checkpoint = trained.checkpoint + trained.best
    merges = bool(trained.num_parameters) and all(t.traits.merges for t in sketch.techniques)
    return Disk(
        download=0 if weight_files(base.folder) else _download(base),
        checkpoint=checkpoint,
        artifact=weights if trained.owns_base else trained.best,
        # a checkpoint is whole before it takes the place of the last one; verification writes the merged model
        temporary=max(checkpoint, weights if merges and sketch.copies else 0),
    )
