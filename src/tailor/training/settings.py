"""How a slot is trained: the `train` block of a recipe, and its resolved form."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from tailor.config import Strict
from tailor.errors import ConfigError
from tailor.models.slots import Slot
from tailor.techniques.technique import Defaults, training_defaults
from tailor.training.optimizer import Schedule


class TrainSettings(Strict):
    """The `train` block. What is not given comes from the technique's measured defaults."""

    learning_rate: float | None = Field(
        None,
        gt=0,
        description="peak learning rate; the technique's own when not given, and of several the last one's: the others "
        "keep their ratio to it",
    )
    learning_rate_multiplier: float = Field(
        1.0, gt=0, description="scales the learning rate, the given one or the technique's own"
    )
    num_epochs: float | None = Field(None, gt=0, description="passes over the rows; or give num_steps")
    num_steps: int | None = Field(None, ge=1, description="optimizer steps; or give num_epochs")
    batch_size: int | None = Field(None, ge=1, description="examples per optimizer step")
    tokens_per_batch: int = Field(4096, ge=16, description="tokens per forward pass: memory, never the result")
    schedule: Schedule = Field("cosine", description="cosine, linear or constant, after the warm-up")
    warmup_ratio: float = Field(0.1, ge=0, le=1, description="share of the steps in which the rate rises to its peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's averaging coefficients")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip a slot's gradient to this norm; null for none")
    eval_every: int | None = Field(None, ge=1, description="steps between validations; ten in a run when not given")
    patience: int | None = Field(
        4, ge=1, description="stop after this many validations without a better loss; null: never"
    )
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; as eval_every when not given"
    )
    seed: int = Field(0, ge=0, description="initialisation, order of the rows, dropout")
    tensorboard: bool = Field(False, description="also write TensorBoard events into the run folder (extra: track)")


@dataclass(frozen=True, slots=True)
class Resolved:
    """TrainSettings with every number filled in for a given set of rows."""

    learning_rate: float
    num_steps: int
    batch_size: int
    warmup_steps: int
    eval_every: int
    checkpoint_every: int


def resolve_settings(settings: TrainSettings, defaults: Defaults, num_rows: int, embedding_rms: float) -> Resolved:
    """Fill in what the recipe left open; `embedding_rms` is the unit of rates that are relative to the embeddings.

    Raises ConfigError when num_epochs and num_steps are both given.
    """
    if settings.num_epochs is not None and settings.num_steps is not None:
        raise ConfigError("train.num_epochs and train.num_steps are both given: one would have no effect")
    batch_size = min(settings.batch_size or defaults.batch_size(num_rows), num_rows)
    if settings.num_steps is not None:
        num_steps = settings.num_steps
    elif settings.num_epochs is not None:
        num_steps = max(1, round(settings.num_epochs * num_rows / batch_size))
    else:
        num_steps = defaults.num_steps(num_rows, batch_size)
    eval_every = settings.eval_every or max(1, num_steps // 10)
    return Resolved(
        learning_rate=(settings.learning_rate or defaults.peak(embedding_rms)) * settings.learning_rate_multiplier,
        num_steps=num_steps,
        batch_size=batch_size,
        warmup_steps=round(settings.warmup_ratio * num_steps),
        eval_every=eval_every,
        checkpoint_every=settings.checkpoint_every or eval_every,
    )


def relative_rates(slot: Slot) -> dict[str, float]:
    """Each parameter's multiple of the slot's learning rate, by name; what is not there has 1.

    The slot's rate is that of the last technique that trains something (`training_defaults`). In a combination the
    parameters of the others are trained at their own technique's default over that one's, on top of the multiple they
    have in their technique (LoRA+): a prompt table goes on needing a rate thousands of times LoRA's.
    """
    owners = {id(owner): owner for owner in slot.owners.values()}
    if len(owners) < 2:
        return dict(slot.rates)
    rms = slot.host.embedding_rms()
    own = {key: owner.traits.defaults.peak(rms) for key, owner in owners.items() if owner.traits.defaults is not None}
    whole = training_defaults(list(owners.values())).peak(rms)
    found = {name: slot.rates.get(name, 1.0) * own.get(id(owner), whole) / whole for name, owner in slot.owners.items()}
    return {name: rate for name, rate in found.items() if name in slot.parameters and rate != 1.0}
