"""The recipe of a sweep: rows, base, what is fixed, what is searched, how many trials, and when a trial is given up."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from tailor.config import Strict
from tailor.data.dataset import DataSettings
from tailor.recipes.sweep_space import SearchSpace, Space, flattened, space_of
from tailor.recipes.tune_settings import BaseSettings, named_base
from tailor.techniques import TechniqueList
from tailor.training.settings import TrainSettings


class MedianPruning(Strict):
    """Give a trial up when its best validation loss is worse than the median of finished trials at the same point.

    Golovin et al. 2017, "Google Vizier", section 3.2.2.
    """

    type: Literal["median"] = "median"
    startup_trials: int = Field(5, ge=0, description="so many trials are finished before any is given up")
    warmup: int = Field(2, ge=0, le=9, description="tenths of a trial's steps before it may be given up")


class HalvingPruning(Strict):
    """Asynchronous successive halving: Li et al. 2018, arXiv:1810.05934. Points are tenths of a trial's steps."""

    type: Literal["halving"] = "halving"
    reduction: int = Field(3, ge=2, description="one of so many trials goes on at each rung (1, 3, 9 tenths with 3)")


class NoPruning(Strict):
    """Every trial is trained to its end."""

    type: Literal["none"] = "none"


def _spelled_out(value: Any) -> Any:
    return {"type": value or "none"} if value is None or isinstance(value, str) else value


Pruning = Annotated[
    Annotated[MedianPruning | HalvingPruning | NoPruning, Field(discriminator="type")], BeforeValidator(_spelled_out)
]


class SweepRecipe(Strict):
    """A sweep. A resolved recipe alone repeats it."""

    name: str = Field(description="the sweep's name, and that of the artifact with the best trial's weights")
    base: Annotated[BaseSettings, BeforeValidator(named_base)] = BaseSettings()
    data: DataSettings
    technique: TechniqueList | None = Field(
        None, description="the technique of all trials, with what is fixed of it; lora when nothing is said"
    )
    objective: str = Field("sft", description="what is optimised")
    train: TrainSettings = Field(TrainSettings(), description="what is fixed of the training")
    search: Annotated[dict[str, Space], BeforeValidator(flattened)] = Field(
        {},
        description="path → values: technique: [lora, ia3], technique.rank: [4, 8], "
        "train.learning_rate: {low: 1e-4, high: 1e-2, log: true}; every technique's own space when not given",
    )
    num_trials: int = Field(20, ge=1, description="trials in all, those given up included")
    in_parallel: int = Field(4, ge=1, description="trials trained side by side in one pass; more take more memory")
    seed: int = Field(0, ge=0, description="of the draws; train.seed is that of every trial's training")
    pruner: Pruning = Field(MedianPruning(), description="median, halving or none: when a trial is given up")
    save: bool = Field(True, description="keep the weights of the best trial as an artifact")

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        problems = space_of(self.technique, self.search, self.train)[1]
        if self.train.tensorboard:
            problems.append((("train", "tensorboard"), "a sweep writes no TensorBoard events"))
        if problems:
            details = [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{error}", {"error": told}), loc=where, input=None
                )
                for where, told in problems
            ]
            raise ValidationError.from_exception_data("SweepRecipe", details)
        return self

    @cached_property
    def space(self) -> SearchSpace:
        """What trials are drawn from."""
        return space_of(self.technique, self.search, self.train)[0]

    def absolute(self) -> Self:
        """The recipe with absolute paths, so that it can be gone on with from any folder."""
        paths = {"train": self.data.train, "validation": self.data.validation}
        found = {key: str(Path(path).expanduser().absolute()) for key, path in paths.items() if path is not None}
        return self.model_copy(update={"base": self.base.absolute(), "data": self.data.model_copy(update=found)})
