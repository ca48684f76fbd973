"""TECHNIQUES: how parameters are changed. One file and one line per technique.

CLI choices, recipe schema, artifact format, docs table and contract tests follow from this dict.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tailor.techniques.technique import Technique

AnyTechnique = Prompting | PromptTuning | LoRA | Full

TECHNIQUES: dict[str, type[AnyTechnique]] = {
    "prompting": Prompting,
    "prompt_tuning": PromptTuning,
    "lora": LoRA,
    "full": Full,
}


def _spelled_out(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


OneTechnique = Annotated[Annotated[AnyTechnique, Field(discriminator="type")], BeforeValidator(_spelled_out)]
"""A technique in a recipe: `lora`, or `{type: lora, rank: 8}`."""

TechniqueList = Annotated[tuple[OneTechnique, ...], BeforeValidator(_as_list), Field(min_length=1)]
"""One technique or a list of them, composed on one slot."""

__all__ = ["TECHNIQUES", "AnyTechnique", "OneTechnique", "Technique", "TechniqueList"]
