"""How a slot is trained: the `train` block of a recipe, and its resolved form."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from tailor.config import Strict
from tailor.errors import ConfigError
from tailor.techniques.technique import Defaults
from tailor.training.optimizer import Schedule


class TrainSettings(Strict):
    """The `train` block. What is not given comes from the technique's measured defaults."""

    learning_rate: float | None = Field(
        None, gt=0, description="peak learning rate; the technique's own when not given"
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
    unit = embedding_rms if defaults.per_embedding_rms else 1.0
    eval_every = settings.eval_every or max(1, num_steps // 10)
    return Resolved(
        learning_rate=settings.learning_rate or defaults.learning_rate * unit,
        num_steps=num_steps,
        batch_size=batch_size,
        warmup_steps=round(settings.warmup_ratio * num_steps),
        eval_every=eval_every,
        checkpoint_every=settings.checkpoint_every or eval_every,
    )
