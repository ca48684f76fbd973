"""The recipe of a prompt search: base, rows, the prompt to begin with, what is tried, and how many calls it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tailor.config import Pattern, Strict
from tailor.data.dataset import DataSettings
from tailor.evaluation.scores import METRICS
from tailor.models.files import is_hosted
from tailor.recipes.tune_settings import BaseSettings, named_base
from tailor.techniques.prompting import Prompting
from tailor.techniques.prompting_shots import Similarity


class PromptData(DataSettings):
    """The `data` block; the validation rows are held out: no prompt of theirs is shown before the last report."""

    validation_fraction: float = Field(0.3, gt=0, lt=1, description="share of the prompts that is held out")
    selection_fraction: float = Field(
        0.5, gt=0, lt=1, description="share of the others by which prompts are chosen; the rest can become shots"
    )
    max_selection: int = Field(64, ge=2, description="rows by which prompts are chosen, at most")
    max_held_out: int = Field(200, ge=2, description="rows of the last report, at most")
    max_pool: int = Field(1000, ge=1, description="rows that can become shots, at most")


class PromptRecipe(Strict):
    """A prompt search. A resolved recipe alone repeats it."""

    name: str = Field(description="the search's name, and that of the artifact with the best prompt")
    base: Annotated[BaseSettings, BeforeValidator(named_base)] = BaseSettings()
    data: PromptData
    start: Prompting | None = Field(None, description="the prompt to improve on; the plain base when not given")
    budget: int = Field(1500, ge=1, description="model calls in all, the last report's included")
    rounds: int = Field(3, ge=1, description="rounds of new prompts, each around the best of those before")
    max_shots: int = Field(8, ge=0, description="most shots of a prompt; 0: instructions only")
    num_sets: int = Field(8, ge=0, description="sets of shots drawn in a round")
    num_instructions: int = Field(4, ge=0, description="instructions that the model writes in a round; 0: none")
    similarity: Similarity = Field("bm25", description="of shots chosen per prompt: bm25, or embedding")
    reasoning: bool = Field(
        False, description="try chain of thought too, with reasoning that the model writes where rows have none"
    )
    votes: int = Field(1, ge=1, description="answers sampled per prompt in what is tried (each is a call)")
    metric: str = Field("auto", description="auto: by the kind of task; or a metric that scores single answers")
    answer_pattern: Pattern | None = Field(
        None, description=r"regular expression that reads the label out of answer and reference, e.g. '^Queue: (\w+)'"
    )
    max_new_tokens: int | None = Field(None, ge=1, description="longest answer; from the references when not given")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals of the last report")
    seed: int = Field(0, ge=0, description="of splits, draws and samples")

    @field_validator("metric")
    @classmethod
    def _metric_scores_answers(cls, metric: str) -> str:
        fitting = [name for name, known in METRICS.items() if known.needs != "likelihood" and known.row is not None]
        if metric not in ("auto", *fitting):
            raise ValueError(f"prompts are chosen by a metric of single answers: auto, {', '.join(fitting)}")
        return metric

    @model_validator(mode="after")
    def _tries_something(self) -> Self:
        shots = self.max_shots and self.num_sets
        if not (shots or self.num_instructions or self.reasoning or self.votes > 1):
            raise ValueError("nothing is tried: allow shots (max_shots, num_sets), instructions, reasoning or votes")
        return self

    def absolute(self) -> Self:
        """The recipe with absolute paths, so that it can be gone on with from any folder."""
        paths = {"train": self.data.train, "validation": self.data.validation}
        found = {key: str(Path(path).expanduser().absolute()) for key, path in paths.items() if path is not None}
        base = self.base if is_hosted(self.base.name) else self.base.absolute()
        return self.model_copy(update={"base": base, "data": self.data.model_copy(update=found)})
