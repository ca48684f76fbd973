"""A tuning run as a recipe: base, data, technique, objective, training, output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tailor.config import Strict, Translated
from tailor.data.dataset import DataSettings
from tailor.models.files import absolute_name
from tailor.recipes import nemo
from tailor.techniques import Technique, TechniqueList
from tailor.techniques.soft_prompt import tasks_of
from tailor.training.settings import TrainSettings

MAX_NAME_WITH_CHECKPOINTS = 80
"""Letters of an artifact's name that leave room for `-step-N` behind it."""


class BaseSettings(Strict):
    """The `base` block; a plain name will do."""

    name: str = Field("tailor-nano", description="tailor-nano (embedded), a local folder, or a hub id")
    device: str = Field("auto", description="auto, cpu, cuda or mps")
    dtype: str = Field("auto", description="auto, float32, bfloat16, float16")
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4 keeps the decoder's linear layers in 4 bits (QLoRA); less memory, slower passes"
    )

    def absolute(self) -> Self:
        """With the absolute path where the name is that of a local folder."""
        return self.model_copy(update={"name": absolute_name(self.name)})


def named_base(base: Any) -> Any:
    """`base: tailor-nano` is short for `base: {name: tailor-nano}`; with overrides on it it arrives as `type`."""
    if isinstance(base, str):
        return {"name": base}
    if isinstance(base, dict) and isinstance(base.get("type"), str):
        return {"name": base["type"], **{key: value for key, value in base.items() if key != "type"}}
    return base


class OutputSettings(Strict):
    """The `output` block."""

    name: str = Field(description="the artifact's name")
    force: bool = Field(False, description="replace an artifact of that name (with add: the task of that name)")
    add: bool = Field(False, description="add the technique's task to the prompt table of that name, or begin one")
    checkpoints: int = Field(
        0, ge=0, description="states at the ends of the last epochs to save too, as artifacts NAME-step-N"
    )
    verify: bool = Field(True, description="prove at the end that what was trained is what is served")


class TuneRecipe(Strict):
    """A tuning run. A resolved recipe alone repeats it."""

    base: Annotated[BaseSettings, BeforeValidator(named_base)] = BaseSettings()
    data: DataSettings
    technique: TechniqueList
    start: str | None = Field(None, description="an artifact of the same technique: training goes on from it")
    objective: str = Field("sft", description="what is optimised")
    train: TrainSettings = TrainSettings()
    output: OutputSettings
    notes: tuple[str, ...] = Field((), description="remarks that the artifact keeps")

    @classmethod
    def translate(cls, data: dict[str, Any]) -> Translated:
        """NeMo's `peft` block in our words."""
        return nemo.translate(data, cls.model_fields)

    @field_validator("technique")
    @classmethod
    def _full_runs_alone(cls, techniques: tuple[Technique, ...]) -> tuple[Technique, ...]:
        if len(techniques) > 1 and (owners := [t.type for t in techniques if not t.traits.frozen_base]):
            raise ValueError(f"{owners[0]} changes the base itself and cannot be combined with others")
        return techniques

    @model_validator(mode="after")
    def _tasks_are_added_one_by_one(self) -> Self:
        tasks = tasks_of(self.technique)
        if self.output.add and not (len(tasks) == len(self.technique) == 1):
            raise ValueError("output.add adds one task to a prompt table: one soft prompt, named with technique.task")
        if len(tasks) > 1:
            raise ValueError(f"tasks are trained one by one ({', '.join(tasks)}): add each with output.add=true")
        return self

    @model_validator(mode="after")
    def _checkpoints_are_of_what_is_attached_and_trained(self) -> Self:
        if not self.output.checkpoints:
            return self
        if not self.can_keep_checkpoints:
            kinds = "+".join(technique.type for technique in self.technique)
            raise ValueError(f"output.checkpoints keeps states of what is trained on a frozen base; {kinds} is not")
        if len(self.output.name) > MAX_NAME_WITH_CHECKPOINTS:
            raise ValueError(f"output.checkpoints needs a name of up to {MAX_NAME_WITH_CHECKPOINTS} letters")
        return self

    @property
    def can_keep_checkpoints(self) -> bool:
        """Whether states on the way are small enough to keep: not a whole model each, and something is trained."""
        traits = [technique.traits for technique in self.technique]
        return all(one.frozen_base for one in traits) and any(one.defaults is not None for one in traits)

    @property
    def added_task(self) -> str | None:
        """The task that joins a prompt table; None for an artifact of its own."""
        return tasks_of(self.technique)[0] if self.output.add else None

    def absolute(self) -> Self:
        """The recipe with absolute paths, so that it can be resumed and verified from any folder."""
        paths = {"train": self.data.train, "validation": self.data.validation}
        found = {key: str(Path(path).expanduser().absolute()) for key, path in paths.items() if path is not None}
        return self.model_copy(update={"base": self.base.absolute(), "data": self.data.model_copy(update=found)})
