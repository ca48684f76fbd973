"""A commented recipe written from its schema: every setting with its default and what it does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

DESCRIBED_AT = 40
"""The column at which descriptions start, where the setting leaves room."""

_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
_NOT_TEXT = {"true", "false", "null", "yes", "no", "on", "off"}


def recipe_template(schema: type[BaseModel], given: Mapping[str, Any], head: str = "") -> str:
    """YAML that loads to `schema` with `given` (nested, by field name) and defaults for all else.

    A field that chooses among classes by `type` shows the class that `given` names, and the others as comments.
    Raises KeyError for a required field that is not given.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    for name, field in schema.model_fields.items():
        lines += ["", *_entry(name, field, given, "")]
    return "\n".join(lines).lstrip("\n") + "\n"


def _entry(name: str, field: FieldInfo, given: Mapping[str, Any], indent: str) -> Iterator[str]:
    models = list(_models(field.annotation))
    if len(models) > 1:
        yield from _choice(name, models, given[name], indent)
    elif models and models[0] is field.annotation:
        yield f"{indent}{name}:"
        yield from _settings(models[0], given.get(name, {}), indent + "  ")
    else:
        default = (field.examples or [None])[0] if field.is_required() else field.get_default(call_default_factory=True)
        yield _setting(name, field, given.get(name, default), indent)


def _settings(model: type[BaseModel], given: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from _entry(name, field, given, indent)


def _choice(name: str, models: list[type[BaseModel]], chosen: str, indent: str) -> Iterator[str]:
    """The block of the chosen class, and those of the others, ready to be taken instead."""
    by_type = {model.model_fields["type"].default: model for model in models}
    yield f"{indent}{name}:  # {_summary(by_type[chosen])}"
    yield from _settings(by_type[chosen], {}, indent + "  ")
    for other, model in by_type.items():
        if other != chosen:
            yield f"{indent}# or: {_summary(model)}"
            yield f"{indent}# {name}:"
            yield from (f"{indent}# {line}" for line in _settings(model, {}, "  "))


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _setting(name: str, field: FieldInfo, value: Any, indent: str) -> str:
    text = f"{indent}{name}: {_scalar(value)}"
    return f"{text:<{DESCRIBED_AT}}  # {field.description}" if field.description else text


def _scalar(value: Any) -> str:
    """A value as one-line YAML 1.2, of which JSON is a part."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return json.dumps(value, ensure_ascii=False)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings classes inside a type, e.g. those of `tuple[LoRA | Full, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple, list):
        for inner in get_args(annotation):
            yield from _models(inner)
