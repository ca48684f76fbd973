"""The recipe of a comparison: which bases, techniques, sizes and seeds, on which rows, measured how."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tailor.config import Strict
from tailor.data.dataset import DataSettings
from tailor.evaluation.evaluate import EvalSettings
from tailor.recipes.tune_settings import BaseSettings, named_base
from tailor.techniques import TECHNIQUES, Technique, TechniqueList
from tailor.training.settings import TrainSettings


def _spelled_out(entry: Any) -> Any:
    """`lora`, `{type: lora, rank: 8}` and a list of techniques are short for an entry with that technique alone."""
    if isinstance(entry, str):
        return {"name": entry, "technique": entry}
    if isinstance(entry, list | tuple | Technique):
        return {"technique": entry}
    if isinstance(entry, dict) and "technique" not in entry and "type" in entry:
        return {"technique": entry}
    return entry


class Entry(Strict):
    """One line of the comparison: a technique (or several on one slot) and how it is trained."""

    name: str = Field(
        "",
        max_length=60,
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._ +-]*)?$",
        description="its name in the tables; the technique's when not given",
    )
    technique: TechniqueList
    train: TrainSettings | None = Field(
        None, description="training settings of this entry; the comparison's when not given"
    )

    @property
    def title(self) -> str:
        """The name, or the techniques' types joined by +."""
        return self.name or "+".join(technique.type for technique in self.technique)

    @property
    def owns_base(self) -> bool:
        """Whether it changes the base's own weights and must be alone on its own copy."""
        return any(not technique.traits.frozen_base for technique in self.technique)


class CompareSettings(DataSettings):
    """The `data` block of a comparison: training and validation rows as for `tune`, and a test side."""

    test: str | None = Field(None, description="the test file; split off the training file when not given")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of the prompts that the split sets aside as test")
    max_test_rows: int = Field(500, ge=2, description="test on at most so many rows, drawn once")


def _in_a_name(title: str) -> str:
    """An entry's title as a part of an artifact's name."""
    return "".join(c if c.isalnum() or c in "-." else "-" for c in title)


def _as_bases(value: Any) -> Any:
    return [named_base(base) for base in (value if isinstance(value, list | tuple) else [value])]


class CompareRecipe(Strict):
    """A comparison. A resolved recipe alone repeats it."""

    name: str = Field(description="the comparison's name, and the beginning of its artifacts' names")
    base: Annotated[tuple[BaseSettings, ...], BeforeValidator(_as_bases), Field(min_length=1)] = Field(
        (BaseSettings(),), description="one base or several"
    )
    data: CompareSettings
    techniques: tuple[Annotated[Entry, BeforeValidator(_spelled_out)], ...] = Field(
        tuple(Entry(technique=({"type": name},)) for name, kind in TECHNIQUES.items() if kind.has_defaults()),
        min_length=1,
        description="names, techniques with settings, or entries {name, technique, train}",
    )
    sizes: tuple[Annotated[int, Field(ge=2)] | Literal["all"], ...] = Field(
        ("all",), min_length=1, description="numbers of training rows, for learning curves; all: every row"
    )
    seeds: int = Field(1, ge=1, description="repetitions, each with its own draw of rows, initialisation and order")
    tune: bool = Field(False, description="give every technique the same budget of settings, chosen on validation")
    trials: int = Field(4, ge=2, description="the budget: settings tried per technique (with tune)")
    objective: str = Field("sft", description="what is optimised")
    train: TrainSettings = Field(TrainSettings(), description="training settings of all entries")
    evaluation: EvalSettings = EvalSettings()
    metric: str | None = Field(None, description="what decides; by the kind of task when not given")
    baselines: bool = Field(True, description="also measure what needs no language model, where the task allows")
    general_text: str | None = Field(
        None, description="text that is not the task, one passage per line; tailor's own when not given"
    )
    rate: float = Field(1.0, gt=0, description="what an hour of this machine costs, in US dollars")
    save: bool = Field(
        True,
        description="keep the customizations of the largest size as artifacts; what they cost in use, whether they "
        "share a batch and what they forgot is measured on these, so false leaves it out",
    )

    @field_validator("techniques")
    @classmethod
    def _names_differ(cls, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        titles = [entry.title for entry in entries]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"two entries are called {twice[0]!r}: give each its own name")
        if "base" in titles:
            raise ValueError("no entry can be called 'base': that line is the plain base")
        kept: dict[str, str] = {}
        for title in titles:
            other = kept.setdefault(_in_a_name(title).casefold(), title)
            if other != title:
                raise ValueError(f"entries {other!r} and {title!r} would be kept under the same name: rename one")
        return entries

    @field_validator("base")
    @classmethod
    def _bases_differ(cls, bases: tuple[BaseSettings, ...]) -> tuple[BaseSettings, ...]:
        names = [base.absolute().name for base in bases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"base {twice[0]!r} is named twice")
        return bases

    @model_validator(mode="after")
    def _all_take_effect(self) -> Self:
        if self.evaluation.max_rows is not None:
            raise ValueError("evaluation.max_rows: the test rows are drawn once for everybody: use data.max_test_rows")
        if any(self.train_of(entry).tensorboard for entry in self.techniques):
            raise ValueError("train.tensorboard: a comparison writes no TensorBoard events")
        return self

    def train_of(self, entry: Entry) -> TrainSettings:
        """How an entry is trained: what it says itself, else what the comparison says."""
        own = entry.train.model_dump(exclude_unset=True) if entry.train is not None else {}
        if {"num_epochs", "num_steps"} & own.keys():  # two ways to say one thing: either replaces both
            own = {"num_epochs": None, "num_steps": None, **own}
        return self.train.model_copy(update=own)

    def artifact_name(self, base: str, title: str) -> str:
        """`<comparison>-<entry>`, with the base's place in front when there are several."""
        number = [settings.name for settings in self.base].index(base) + 1
        several = f"base{number}-" if len(self.base) > 1 else ""
        return f"{self.name}-{several}{_in_a_name(title)}"

    def resolved(self) -> dict[str, Any]:
        """As a dict that loads to the same comparison, with every setting written out."""
        entries = [
            {
                **entry.model_dump(mode="json"),
                "name": entry.title,
                "train": self.train_of(entry).model_dump(mode="json"),
            }
            for entry in self.techniques
        ]
        return {**self.model_dump(mode="json"), "techniques": entries}
