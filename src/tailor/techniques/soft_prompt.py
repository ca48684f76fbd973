"""What techniques that train virtual tokens have in common: how many, for which task, and where they stand in its text.

A technique inherits `SoftPrompt`, names its trained tensor `self.table_name` and hands its rows to `add_rows`. Tasks of
one prompt table are several such techniques on one slot, told apart by `task` (NeMo's prompt table).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, StringConstraints, model_validator
from torch import Tensor

from tailor.errors import ConfigError
from tailor.models.embedding import VirtualTokens
from tailor.models.slots import Slot
from tailor.techniques.technique import PeftFiles, Technique
from tailor.text.template import MARKER, Template, Templates

TABLE = "prompt_embeddings"
"""The trained tensor, as PEFT calls it."""

MOVED = {"taskname": "task", "total_virtual_tokens": "num_virtual_tokens"}
"""Keys of a NeMo task template that are settings of the technique here."""

TaskName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,95}$")]


def _spelled_out(template: Any) -> Any:
    """`template: TEXT` is short for `template: {prompt_template: TEXT}`; with overrides on it it arrives as `type`."""
    if isinstance(template, str):
        return {"prompt_template": template}
    if isinstance(template, dict) and isinstance(template.get("type"), str):
        return {"prompt_template": template["type"], **{k: v for k, v in template.items() if k != "type"}}
    return template


class SoftPrompt(Technique):
    """Virtual tokens of one task: in front of the text, or at the markers of a template."""

    num_virtual_tokens: int = Field(50, ge=1, description="rows of the prompt table; each costs context like a word")
    task: TaskName | None = Field(None, description="the task's name in a prompt table of several tasks")
    template: Annotated[Template | None, BeforeValidator(_spelled_out)] = Field(
        None, description="text with {fields} and <|VIRTUAL_PROMPT_0|> where tokens stand; else they lead"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_nemo_spells_it(cls, data: Any) -> Any:
        """A NeMo task template as it stands under `template`; its splits alone say how many tokens there are."""
        template = _spelled_out(data.get("template")) if isinstance(data, Mapping) else None
        if not isinstance(template, Mapping):
            return data
        found = {key: value for key, value in data.items() if key != "template"}
        for theirs, ours in MOVED.items():
            if theirs in template and found.setdefault(ours, template[theirs]) != template[theirs]:
                raise ValueError(f"{ours} is {found[ours]!r}, but the template's {theirs} is {template[theirs]!r}")
        splits = template.get("virtual_token_splits")
        if isinstance(splits, Sequence) and all(type(size) is int for size in splits):
            found.setdefault("num_virtual_tokens", sum(splits))
        return {**found, "template": {key: value for key, value in template.items() if key not in MOVED}}

    @model_validator(mode="after")
    def _splits_add_up(self) -> Self:
        splits = self.template.virtual_token_splits if self.template else None
        if splits is not None and sum(splits) != self.num_virtual_tokens:
            total = " + ".join(map(str, splits))
            raise ValueError(
                f"virtual_token_splits {total} = {sum(splits)}, but num_virtual_tokens is {self.num_virtual_tokens}"
            )
        return self

    @property
    def table_name(self) -> str:
        """The name of the trained tensor among the slot's parameters."""
        return TABLE if self.task is None else f"{TABLE}.{self.task}"

    def add_rows(self, slot: Slot, rows: Callable[[], Tensor]) -> None:
        """Let `rows()`, (num_virtual_tokens, hidden), stand where the settings say. Raises ConfigError for too many."""
        context = int(slot.host.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        if self.num_virtual_tokens >= context:
            raise ConfigError(f"{self.num_virtual_tokens} virtual tokens fill the base's context of {context}")
        tokens = VirtualTokens(self.num_virtual_tokens, rows)
        slot.add_virtual_tokens(tokens, task=self.task or "", template=self.template)

    def beyond_peft(self) -> str | None:
        """PEFT puts virtual tokens in front, wherever they were trained."""
        if self.template is None:
            return None
        markers = len(MARKER.findall(self.template.prompt_template))
        return f"its virtual tokens stand at {markers} marker(s) of a template, and PEFT would put them all in front"

    def table_files(self, slot: Slot, **config: Any) -> PeftFiles:
        """The rows as PEFT's files; `config` is what this technique's kind adds."""
        table = slot.virtual_tokens[self.task or ""].rows().detach().cpu().clone()
        shared = {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": table.shape[0],
            "token_dim": table.shape[1],
            "num_transformer_submodules": 1,
            "inference_mode": True,
        }
        return {**config, **shared}, {TABLE: table}


def read_table(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The one tensor of a PEFT prompt: (num_virtual_tokens, width). Raises ConfigError for anything else."""
    if set(tensors) != {TABLE}:
        raise ConfigError(f"a prompt table holds one tensor, {TABLE!r}; this one holds {', '.join(sorted(tensors))}")
    table = tensors[TABLE]
    if table.shape[0] != config["num_virtual_tokens"]:
        raise ConfigError(f"the table has {table.shape[0]} rows, its config says {config['num_virtual_tokens']}")
    return table


def templates_of(techniques: Sequence[Technique]) -> Templates:
    """The template of every task, for reading its rows."""
    return {t.task or "": t.template for t in techniques if isinstance(t, SoftPrompt)}


def tasks_of(techniques: Sequence[Technique]) -> list[str]:
    """The names of the tasks that these techniques are for."""
    return [t.task for t in techniques if isinstance(t, SoftPrompt) and t.task is not None]
