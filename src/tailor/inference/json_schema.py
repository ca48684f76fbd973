"""The part of JSON Schema that constrained decoding enforces: whatever else a schema says is refused, never dropped.

A draft 2020-12 schema; earlier drafts are read as that where they mean the same. Backends ignore keywords they do not
know, so the keywords here are those that were seen to be enforced (tests/inference/test_json_schema.py shows each).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any
from urllib.parse import unquote

from tailor.errors import ConfigError, QualityError, nearest, require
from tailor.inference.automaton import accepts, json_grammar

SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}  # a mapping to schemas
LISTS = {"prefixItems", "anyOf", "oneOf", "allOf"}
SINGLE = {"items", "additionalProperties"}
VALUES = {
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
ENFORCED = frozenset(SCHEMAS | LISTS | SINGLE | VALUES)
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "discriminator"}
)
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
"""Enforced by patterns: 29 February passes as a date of any year, second 60 as a time."""

DRAFTS = ("draft/2020-12", "draft/2019-09", "draft-07", "draft-06")
HINTS = {
    "nullable": 'write {"type": ["string", "null"]}',
    "dependencies": "write the cases with anyOf",
    "if": "write the cases with anyOf",
    "not": "say what is allowed instead: enum, pattern, minimum",
    "propertyNames": "use patternProperties with additionalProperties: false",
    "additionalItems": "use prefixItems, and items for the rest",
}
MAX_SCHEMAS = 2000
MAX_DEPTH = 40
MAX_NUMBER = 2**53
"""Compilers read numbers as float64: beyond this, integers are no longer told apart."""

MAX_DIGITS = 15
"""Fractions of so many digits are the same as text and as float64."""

MAX_EXPONENT = 400
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Characters that JSON can only write as \\u escapes, which answers have none of."""


def refused(pointer: str, problem: str, hint: str | None = None) -> ConfigError:
    """The error for a schema that would not be enforced as it is written: where (a JSON pointer), and what."""
    return ConfigError(f"JSON schema at {pointer or '/'}: {problem}", hint=hint)


def checked_schema(schema: Any) -> Any:
    """The schema without `$schema` and `$id`. Raises ConfigError, naming the JSON pointer, when part of it is not
    enforced, it is not a schema, points outside itself, or is too large.
    """
    if schema is False:
        raise refused("", "false allows nothing")
    if schema is True:
        return {}
    if isinstance(schema, dict):
        _check_draft(schema)
        schema = {key: value for key, value in schema.items() if key not in ("$schema", "$id")}
    found: dict[str, Any] = {}
    for pointer, inner in _schemas(schema, "", 0):
        found[pointer] = inner
        if len(found) > MAX_SCHEMAS:
            raise refused(pointer, f"more than {MAX_SCHEMAS} schemas in one", "ask for less at a time")
    for pointer, inner in found.items():
        if isinstance(inner, dict):
            _check_keywords(pointer, inner, found)
    _check_meta(schema)
    _check_circles(found)
    return schema


def conforms(schema: Any, text: str) -> None:
    """Raises QualityError, naming the JSON pointer, unless `text` is JSON and the (checked) schema holds for it.

    Formats are left to whoever constrained the text. Object keys that stand twice count once, the last time.
    """
    try:
        value = json.loads(text, parse_float=_decimal, parse_constant=_refuse_constant)
        exact = json.loads(json.dumps(schema), parse_float=Decimal)
        error = next(iter(_validator()(exact).iter_errors(value)), None)
    except (ValueError, RecursionError) as broken:
        raise QualityError(f"the answer is not JSON: {str(broken) or 'nested too deeply'}") from None
    if error is not None:
        where = pointer_of(error.absolute_path)
        raise QualityError(f"the answer does not fit its JSON schema at {where or '/'}: {error.message[:200]}")


def pointer_of(path: Any) -> str:
    """Keys and positions as a JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


# --- what is refused -------------------------------------------------------------------------------------------------


def _schemas(schema: Any, pointer: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Every schema inside a schema, itself first, with its JSON pointer."""
    yield pointer, schema
    if depth > MAX_DEPTH:
        raise refused(pointer, f"nested more than {MAX_DEPTH} schemas deep", "flatten it, or use $ref for recursion")
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        inner: list[tuple[Any, Any]] = []
        if key in SCHEMAS and isinstance(value, dict):
            inner = [((key, name), part) for name, part in value.items()]
        elif key in LISTS and isinstance(value, list):
            inner = [((key, place), part) for place, part in enumerate(value)]
        elif key in SINGLE:
            inner = [((key,), value)]
        for path, part in inner:
            yield from _schemas(part, pointer + pointer_of(path), depth + 1)


def _check_draft(schema: dict[str, Any]) -> None:
    draft = schema.get("$schema", DRAFTS[0])
    if not isinstance(draft, str) or not any(known in draft for known in DRAFTS):
        raise refused("/$schema", f"{draft!r} is not a known draft", "choices: " + ", ".join(DRAFTS))


def _check_keywords(pointer: str, schema: dict[str, Any], found: Mapping[str, Any]) -> None:
    for key, value in schema.items():
        here = pointer + pointer_of([key])
        if key not in ENFORCED | ANNOTATIONS:
            known = nearest(key, sorted(ENFORCED | ANNOTATIONS))
            raise refused(here, f"the keyword {key!r} is not enforced", HINTS.get(key, known))
        if key == "$ref" and (not isinstance(value, str) or target(value) not in found):
            raise refused(here, f"{value!r} names no schema in this document", "write #/$defs/NAME, or #")
        if key == "format" and value not in FORMATS:
            raise refused(here, f"the format {value!r} is not enforced", nearest(str(value), FORMATS))
        if key == "minProperties" and isinstance(value, int) and value > 1:
            # a key that stands twice would count twice
            raise refused(here, f"minProperties {value} is not enforced (0 and 1 are)", "name the keys in `required`")
        if key not in SCHEMAS | LISTS | SINGLE | ANNOTATIONS:
            _check_value(here, value)


def _check_value(pointer: str, value: Any) -> None:
    """Numbers and texts that a compiler would quietly change."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_value(pointer, part)
    elif isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise refused(pointer, f"{value} is too large to be enforced exactly", f"numbers up to {MAX_NUMBER} are")
    elif isinstance(value, float) and len(Decimal(repr(value)).normalize().as_tuple().digits) > MAX_DIGITS:
        raise refused(pointer, f"{value} has too many digits to be enforced exactly", f"round it to {MAX_DIGITS}")
    elif isinstance(value, str) and (control := CONTROL.search(value)):
        raise refused(pointer, f"the control character {control[0]!r} cannot be enforced", "leave it out")


def _check_meta(schema: Any) -> None:
    """It is a schema at all: types of keywords' values, as draft 2020-12's own schema has them."""
    jsonschema = require("jsonschema", "server")
    draft = jsonschema.Draft202012Validator
    errors = draft(draft.META_SCHEMA).iter_errors(schema)
    error = jsonschema.exceptions.best_match(errors)
    if error is not None:
        raise refused(pointer_of(error.absolute_path), error.message[:200])


def _check_circles(found: Mapping[str, Any]) -> None:
    """A schema that is defined by itself, with no property or item between, says nothing and never ends."""
    ended: set[str] = set()

    def follow(pointer: str, open_: tuple[str, ...]) -> None:
        if pointer in open_:
            raise refused(pointer, "the schema refers to itself with no property or item between")
        schema = found[pointer]
        if pointer not in ended and isinstance(schema, dict):
            if "$ref" in schema:
                follow(str(target(schema["$ref"])), (*open_, pointer))
            for key in ("anyOf", "oneOf", "allOf"):
                for place in range(len(schema.get(key, ()))):
                    follow(f"{pointer}/{key}/{place}", (*open_, pointer))
        ended.add(pointer)

    for start in found:
        follow(start, ())


def target(reference: str) -> str | None:
    """The JSON pointer that a local reference means; None for any other reference."""
    return unquote(reference[1:]) if reference == "#" or reference.startswith("#/") else None


# --- what a text is checked by ---------------------------------------------------------------------------------------


def _decimal(text: str) -> Decimal:
    """A JSON number with a fraction or exponent; beyond what a Decimal holds, the infinity or zero next to it."""
    try:
        return Decimal(text)
    except InvalidOperation:
        digits, exponent = text.lower().split("e")
        return Decimal(0) if exponent.startswith("-") else Decimal("Infinity").copy_sign(Decimal(digits))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _validator() -> Any:
    """Draft 2020-12, with exact decimals, and patterns matched by the automaton that constrains (in linear time)."""
    jsonschema = require("jsonschema", "server")
    own = {
        "multipleOf": _problems(_is_multiple, "is not a multiple of"),
        "pattern": _problems(_has_pattern, "does not match"),
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
    }
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, own)


def _problems(holds: Callable[[Any, Any], bool], words: str) -> Callable[..., Iterator[Any]]:
    def rule(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[Any]:
        if not holds(value, wanted):
            yield require("jsonschema", "server").ValidationError(f"{value!r} {words} {wanted}")

    return rule


def _is_multiple(value: Any, of: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | Decimal) or not value:
        return True
    if isinstance(value, Decimal) and (value.is_infinite() or abs(value.adjusted()) > MAX_EXPONENT):
        return False  # the exact fraction would fill the memory
    return Fraction(value) % Fraction(of) == 0


def _has_pattern(value: Any, pattern: str) -> bool:
    if not isinstance(value, str):
        return True
    return accepts(
        json_grammar(json.dumps({"type": "string", "pattern": pattern}), escapes=True),
        json.dumps(value, ensure_ascii=False),
    )


def _pattern_properties(validator: Any, patterns: Mapping[str, Any], value: Any, schema: Any) -> Iterator[Any]:
    for pattern, inner in patterns.items():
        for name, part in value.items() if isinstance(value, dict) else ():
            if _has_pattern(name, pattern):
                yield from validator.descend(part, inner, path=name, schema_path=pattern)


def _additional_properties(validator: Any, inner: Any, value: Any, schema: Any) -> Iterator[Any]:
    for name, part in value.items() if isinstance(value, dict) else ():
        known = name in schema.get("properties", {})
        if not known and not any(_has_pattern(name, pattern) for pattern in schema.get("patternProperties", {})):
            yield from validator.descend(part, inner, path=name)
