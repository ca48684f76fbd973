"""TECHNIQUES: how parameters are changed. One file and one line per technique.

CLI choices, recipe schema, artifact format, docs table and contract tests follow from this dict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from tailor.techniques.adapter import Adapter
from tailor.techniques.full import Full
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.techniques.new_tokens import NewTokens
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tailor.techniques.technique import Technique

TECHNIQUES: dict[str, type[Technique]] = {
    "prompting": Prompting,
    "prompt_tuning": PromptTuning,
    "p_tuning": PTuning,
    "prefix_tuning": PrefixTuning,
    "adapter": Adapter,
    "ia3": IA3,
    "lora": LoRA,
    "new_tokens": NewTokens,
    "full": Full,
}


def _spelled_out(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [name.strip() for name in value.split("+")]
    return value if isinstance(value, list | tuple) else [value]


if TYPE_CHECKING:
    AnyTechnique = Technique
else:  # pydantic chooses among the registered classes by their `type`
    AnyTechnique = Union[tuple(TECHNIQUES.values())]  # noqa: UP007

OneTechnique = Annotated[Annotated[AnyTechnique, Field(discriminator="type")], BeforeValidator(_spelled_out)]
"""A technique in a recipe: `lora`, or `{type: lora, rank: 8}`."""

TechniqueList = Annotated[tuple[OneTechnique, ...], BeforeValidator(_as_list), Field(min_length=1)]
"""One technique or a list of them, composed on one slot; `adapter+p_tuning` is short for a list of names."""

__all__ = ["TECHNIQUES", "OneTechnique", "Technique", "TechniqueList"]
