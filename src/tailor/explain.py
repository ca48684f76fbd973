"""Validation errors in words for people: which key, what is accepted there, and the nearest valid choice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from tailor.errors import nearest

KeyPath = tuple[str, ...]  # ("technique", "0", "rank"): list positions as text, as overrides spell them

_ACCEPTED = {  # the kind of error → what would have been right
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "dict_type": "a mapping (key: value)",
    "mapping_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "none_required": "null",
}


@dataclass(frozen=True)
class _Finding:
    """One error: where, a whole sentence or what is `accepted` there, and whether another union branch may differ."""

    path: KeyPath
    sentence: str = ""
    accepted: str = ""
    value: Any = None
    choices: tuple[str, ...] = ()
    branch: bool = False


def explain(error: ValidationError, schema: type[BaseModel], data: Any) -> list[tuple[KeyPath, str]]:
    """The problems with `data`, one (key path, sentence) for each key.

    Branches of a union that was tried in full ("text, or a list, or a mapping") become one sentence, and say nothing
    when the mistake sits deeper inside the branch that the data meant.
    """
    found = [_finding(detail, schema, data) for detail in error.errors(include_url=False)]
    paths = dict.fromkeys(finding.path for finding in found)
    told = []
    for path in paths:
        here = [finding for finding in found if finding.path == path]
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in paths)
        if deeper and all(finding.branch for finding in here):
            continue
        told.append((path, _sentence(here)))
    return told


def show(value: Any) -> str:
    """A value as an error message quotes it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple, set, frozenset)):
        return "a list"
    text = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _sentence(findings: Sequence[_Finding]) -> str:
    if sentences := [finding.sentence for finding in findings if finding.sentence]:
        return "; ".join(dict.fromkeys(sentences))
    first = findings[0]
    choices = tuple(choice for finding in findings for choice in finding.choices)
    if isinstance(first.value, str) and choices and all(finding.choices for finding in findings):
        return f"unknown value {first.value!r} ({nearest(first.value, choices)})"
    accepted = " or ".join(dict.fromkeys(finding.accepted for finding in findings))
    quote = "; put it in quotes" if accepted == "text" and isinstance(first.value, (bool, int, float)) else ""
    return f"wants {accepted}, got {show(first.value)}{quote}"


def _finding(detail: Mapping[str, Any], schema: type[BaseModel], data: Any) -> _Finding:
    kind, context, loc = detail["type"], detail.get("ctx", {}), detail["loc"]
    value = detail["input"]
    if kind == "extra_forbidden":
        place = _locate(schema, data, loc[:-1])
        known = dict.fromkeys(name for model in place.models for name in model.model_fields)
        return _Finding((*place.path, str(loc[-1])), f"unknown setting ({nearest(str(loc[-1]), known)})")
    place = _locate(schema, data, loc)
    if kind == "missing":
        return _Finding(place.path, "is required")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _untyped(place, value, context)
    if kind == "value_error":
        return _Finding(place.path, str(context["error"]))
    if kind in _ACCEPTED:
        accepted = _ACCEPTED[kind].format(**context)
        choices = _quoted(accepted) if kind in ("literal_error", "enum") else ()
        return _Finding(place.path, accepted=accepted, value=value, choices=choices, branch=place.branch)
    message = detail["msg"].replace("Input should be", "must be").removeprefix("Assertion failed, ")
    return _Finding(place.path, f"{message[:1].lower()}{message[1:]}, got {show(value)}")


def _untyped(place: _Located, value: Any, context: Mapping[str, Any]) -> _Finding:
    """A setting that chooses among classes by `type`, where the type is missing or unknown."""
    choices = _quoted(context.get("expected_tags", "")) or tuple(
        name for model in place.models for name in _type_names(model)
    )
    mapping = isinstance(place.value, Mapping)
    path = (*place.path, "type") if mapping else place.path
    if "tag" in context:
        return _Finding(path, f"unknown type {context['tag']!r} ({nearest(context['tag'], choices)})")
    if mapping:
        return _Finding(path, f"is required ({nearest('', choices)})")
    return _Finding(path, accepted="a mapping (key: value)", value=value, branch=place.branch)


@dataclass(frozen=True)
class _Located:
    """Where in the data an error is: `models` are the settings classes meant there; `branch`: inside a union."""

    path: KeyPath
    value: Any
    models: tuple[type[BaseModel], ...]
    branch: bool


def _locate(schema: type[BaseModel], data: Any, loc: Sequence[int | str]) -> _Located:
    """Follow an error's location through the schema, leaving out the names it gives to the branches of unions."""
    path: KeyPath = ()
    options: list[Any] = [schema]
    branch = False
    for part in loc:
        if isinstance(part, int):
            options = [choice for option in options for choice in _inside(option, part)]
            branch = False
            if isinstance(data, (list, tuple)) and part < len(data):  # else a scalar that stands for a list of one
                path, data = (*path, str(part)), data[part]
            continue
        named = [option for option in options if _is_model(option) and part in (option.__name__, *_type_names(option))]
        if named and len(options) > 1:
            options, branch = named, True
            continue
        fields = [option for option in options if _is_model(option) and part in option.model_fields]
        if not fields and not (isinstance(data, Mapping) and part in data):
            branch = True  # the name of a branch such as "str" or "list[int]"
            continue
        options = [choice for option in options for choice in _inside(option, part)]
        data = data.get(part) if isinstance(data, Mapping) else None
        path, branch = (*path, part), False
    models = tuple(option for option in options if _is_model(option))
    if len(models) > 1 and isinstance(data, Mapping):
        models = tuple(model for model in models if data.get("type") in _type_names(model)) or models
    return _Located(path, data, models, branch)


def _inside(option: Any, part: int | str) -> list[Any]:
    """What may stand at a key or position of one alternative."""
    if _is_model(option):
        return _alternatives(option.model_fields[part].annotation) if part in option.model_fields else []
    arguments = [argument for argument in get_args(option) if argument is not Ellipsis]
    if not arguments:
        return []
    if isinstance(part, int) and get_origin(option) is tuple and part < len(arguments):
        return _alternatives(arguments[part])
    return _alternatives(arguments[-1])


def _alternatives(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [choice for argument in get_args(annotation) for choice in _alternatives(argument)]
    return [] if annotation is type(None) else [annotation]


def _is_model(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, BaseModel)


def _type_names(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of a class's `type` field, by which a recipe chooses it."""
    field = model.model_fields.get("type")
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def _quoted(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"'([^']*)'", text))
