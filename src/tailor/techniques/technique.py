"""What a technique is: a frozen settings object that knows how to sit on a slot and how to travel as PEFT files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from tailor.config import Strict
from tailor.data.records import Record
from tailor.errors import ConfigError
from tailor.models.slots import Slot

PeftFiles = tuple[dict[str, Any], dict[str, Tensor]]
"""`adapter_config.json` as a dict, and the tensors of `adapter_model.safetensors`."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """How a technique is trained unless the recipe says otherwise; found by measurement (docs/log.md).

    The number of steps is `num_epochs` passes over the rows, held between `min_steps` and `max_steps`: a handful of
    rows still gets enough updates for a randomly initialised table, and a large file does not run for hours.

    With `per_embedding_rms`, `learning_rate` is in units of the root mean square of the base's word embeddings: AdamW
    moves every number by about the rate per step, and a table's rows must travel as far as words are apart, which
    differs between bases by a factor of fifty.
    """

    learning_rate: float
    num_epochs: float
    min_steps: int
    max_steps: int
    per_embedding_rms: bool = False

    def peak(self, embedding_rms: float) -> float:
        """The learning rate on a base whose word embeddings have this root mean square."""
        return self.learning_rate * (embedding_rms if self.per_embedding_rms else 1.0)

    def batch_size(self, num_rows: int) -> int:
        """Few rows want small batches (more updates from the same tokens), many rows want speed."""
        return 8 if num_rows < 1_000 else 16 if num_rows < 20_000 else 32

    def num_steps(self, num_rows: int, batch_size: int) -> int:
        """Optimizer steps for `num_rows` rows."""
        wanted = -(-int(self.num_epochs * num_rows) // batch_size)
        return max(self.min_steps, min(self.max_steps, wanted))


@dataclass(frozen=True, slots=True)
class Traits:
    """The technique's row of the comparison table: claims, each held under test.

    `formula` is what it computes and `source` where that is from, for docs/techniques.md. `rows` is the seeds' rule of
    thumb for how many rows it takes: (too few below, comfortable from).
    """

    trains: str
    where: str
    formula: str
    source: str
    frozen_base: bool
    merges: bool
    mixes: bool
    peft: bool
    rows: tuple[int, int]
    defaults: Defaults | None


class Technique(Strict):
    """One customization technique. The settings object *is* the technique: `LoRA(rank=8)`.

    A few methods, of which only `attach` must be written: most techniques take nothing from the rows beforehand and
    have no smaller form, and those that PEFT has no files for leave the last two as they are.

    `example` are settings without which it cannot be made. `alternatives` are settings that a comparison with a tuning
    budget tries besides the defaults; `search` are values
    of a few settings that a sweep draws from unless it is told otherwise.
    """

    type: str

    traits: ClassVar[Traits]
    example: ClassVar[Mapping[str, Any]] = {}
    peft_types: ClassVar[tuple[str, ...]] = ()
    alternatives: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    def prepare(self, records: Sequence[Record], seed: int) -> Self:
        """This technique with what it takes from the training rows filled in (shots)."""
        return self

    def smaller(self) -> Self | None:
        """The next form that takes less: for rows that do not fit, or are too few; None when there is none."""
        return None

    @classmethod
    def has_defaults(cls) -> bool:
        """Whether it can be made from its name alone: then every comparison has a line for it."""
        return not any(field.is_required() for field in cls.model_fields.values())

    @abstractmethod
    def attach(self, slot: Slot) -> None:
        """Add parameters, virtual tokens or prompt rewriting to `slot`. Raises ConfigError when nothing matches."""

    def beyond_peft(self) -> str | None:
        """What of these settings PEFT has no files for, or would load wrongly; None when it has them all."""
        return None if self.traits.peft else f"a technique that trains {self.traits.trains} has no PEFT format"

    def to_peft(self, slot: Slot) -> PeftFiles:
        """The slot's share of this technique in PEFT's file layout. Raises ConfigError where PEFT has none."""
        raise _no_peft(self.traits)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Self, dict[str, Tensor]]:
        """The technique and slot state of PEFT files (`peft_types`). Raises ConfigError for what we do not honour."""
        raise _no_peft(cls.traits)


def training_defaults(techniques: Sequence[Technique]) -> Defaults:
    """How techniques on one slot are trained: as the last of them that has defaults. At least one must have them."""
    return [technique.traits.defaults for technique in techniques if technique.traits.defaults is not None][-1]


def _no_peft(traits: Traits) -> ConfigError:
    return ConfigError(f"a technique that trains {traits.trains} has no PEFT format")


PEFT_PREFIX = "base_model.model."


def refuse_settings(config: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    """Raise ConfigError for PEFT settings that change results and that we would silently ignore."""
    for key, value in neutral.items():
        if config.get(key, value) not in (value, None, False, [], {}):
            raise ConfigError(f"this PEFT adapter sets {key}={config[key]!r}, which is not supported")
