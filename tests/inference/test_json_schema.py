"""JSON schemas: every keyword let through is enforced token by token, every other one is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from tailor.errors import ConfigError, QualityError
from tailor.inference.json_schema import ANNOTATIONS, ENFORCED, FORMATS, checked_schema, conforms
from tailor.inference.structured import Structure, check, compiled
from tailor.models.files import EMBEDDED
from tailor.text.tokenizer import Tokenizer, load_tokenizer

STOP = (6, 2)

# keyword: a schema that is about it, texts that it lets through, texts that it does not
ENFORCED_CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "type": ({"type": "integer"}, ["1", "-20"], ['"a"', "null", "1.5", "true", "[1]"]),
    "enum": ({"enum": [1, "a", None, [1, 2]]}, ["1", '"a"', "null", "[1, 2]"], ["2", '"b"', "[1]", "true"]),
    "const": ({"const": {"a": 1.5}}, ['{"a": 1.5}'], ['{"a": 1}', "{}", '{"a": 1.5, "b": 1}']),
    "minimum": ({"type": "number", "minimum": 2.5}, ["2.5", "3", "10.25"], ["2.4", "-3", "2"]),
    "maximum": ({"type": "integer", "maximum": 12}, ["12", "3", "-100"], ["13", "120"]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, ["4"], ["3", "2"]),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 3}, ["2.99", "2"], ["3", "3.0", "4"]),
    "multipleOf": ({"type": "number", "multipleOf": 0.25}, ["0.50", "2.75", "3"], ["0.3", "1.10", "0.2"]),
    "minLength": ({"type": "string", "minLength": 2}, ['"ab"', '"éé"', '"\\n\\n"'], ['"a"', '""', '"\\n"']),
    "maxLength": ({"type": "string", "maxLength": 2}, ['"ab"', '"😀é"', '""'], ['"abc"', '"\\n\\n\\n"']),
    "pattern": ({"type": "string", "pattern": "^a[0-9]+$"}, ['"a1"', '"a22"'], ['"a"', '"ba1"', '"a1b"']),
    "format": ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2024-02-30"', '"today"']),
    "items": ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1, 2]"], ['["a"]', "[1, null]"]),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
        ['[1, "a"]', '[1, "a", null]', "[1]"],
        ['["a"]', "[1, 2]"],
    ),
    "minItems": ({"type": "array", "minItems": 2}, ["[1, 2]"], ["[1]", "[]"]),
    "maxItems": ({"type": "array", "maxItems": 1}, ["[]", "[1]"], ["[1, 2]"]),
    "properties": (
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        ['{"a": 1}', "{}", '{"b": "x"}'],
        ['{"a": "x"}', '{"\\u0061": "x"}'],
    ),
    "required": ({"type": "object", "required": ["a"]}, ['{"a": 1}'], ["{}", '{"b": 1}']),
    "additionalProperties": (
        {"type": "object", "properties": {"a": True}, "additionalProperties": {"type": "integer"}},
        ['{"a": "x", "b": 1}'],
        ['{"b": "x"}', '{"a": 1, "b": null}'],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^n": {"type": "integer"}}},
        ['{"n1": 1}', '{"x": "y"}'],
        ['{"n1": "x"}', '{"\\u006e": "x"}'],
    ),
    "minProperties": ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
    "maxProperties": ({"type": "object", "maxProperties": 1}, ["{}", '{"a": 1}'], ['{"a": 1, "b": 2}']),
    "anyOf": ({"anyOf": [{"type": "integer", "minimum": 3}, {"type": "null"}]}, ["3", "null"], ["2", '"a"']),
    "oneOf": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["null", "[]"]),
    "allOf": ({"type": "integer", "allOf": [{"minimum": 3}, {"maximum": 5}]}, ["3", "5"], ["2", "6"]),
    "$ref": (
        {"properties": {"a": {"$ref": "#"}, "b": {"const": 1}}, "type": "object", "additionalProperties": False},
        ['{"a": {"a": {"b": 1}}}', "{}"],
        ['{"a": 1}', '{"a": {"a": {"b": 2}}}', '{"a": {"c": {}}}'],
    ),
    "$defs": (
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}},
        ["1"],
        ['"a"'],
    ),
    "definitions": ({"items": {"$ref": "#/definitions/n"}, "definitions": {"n": {"const": 1}}}, ["[1]"], ["[2]"]),
}
FORMAT_CASES = {
    "date-time": ("2024-02-29T10:00:00Z", "2024-02-30T10:00:00Z"),
    "time": ("10:00:00+01:00", "25:00:00Z"),
    "date": ("2024-01-31", "2024-04-31"),
    "duration": ("P1DT2H", "1D"),
    "email": ("a.b@c.de", "a@"),
    "hostname": ("a-b.de", "-a.de"),
    "ipv4": ("1.2.3.4", "1.2.3.256"),
    "ipv6": ("::1", "::g"),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567-e89b"),
    "uri": ("https://a.b/c?d=e#f", "//a b"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(EMBEDDED["tailor-nano"])


def says(tokenizer: Tokenizer, schema: Any, text: str) -> bool:
    """Whether a constrained answer can be this text: every token allowed where it stands, and a stop token after."""
    constraint = compiled(Structure(kind="json_schema", content=schema), tokenizer, STOP)
    for token in [*tokenizer.encode(text, continues=True), STOP[0]]:
        if not constraint.mask(tokenizer.vocab_size)[token]:
            return False
        constraint.accept(token)
    return True


def fits(schema: Any, text: str) -> bool:
    try:
        conforms(checked_schema(schema), text)
    except QualityError:
        return False
    return True


def refusal(schema: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(Structure(kind="json_schema", content=schema))
    return f"{caught.value.message} ({caught.value.hint})"


# ------------------------------------------------------------------------------------------------ what is enforced


def test_every_keyword_let_through_has_its_case() -> None:
    assert set(ENFORCED_CASES) == ENFORCED
    assert set(FORMAT_CASES) == set(FORMATS)


@pytest.mark.parametrize("keyword", ENFORCED_CASES)
def test_the_keyword_is_enforced_token_by_token(tokenizer: Tokenizer, keyword: str) -> None:
    schema, good, bad = ENFORCED_CASES[keyword]
    check(Structure(kind="json_schema", content=schema))
    assert {text: says(tokenizer, schema, text) for text in good} == dict.fromkeys(good, True)
    assert {text: says(tokenizer, schema, text) for text in bad} == dict.fromkeys(bad, False)
    assert {text: fits(schema, text) for text in good} == dict.fromkeys(good, True)
    if keyword != "format":  # formats are left to the constraint
        assert {text: fits(schema, text) for text in bad} == dict.fromkeys(bad, False)


@pytest.mark.parametrize("keyword", [k for k in ENFORCED_CASES if k not in ("$defs", "definitions")])
def test_it_is_the_keyword_that_is_enforced(tokenizer: Tokenizer, keyword: str) -> None:
    schema, _, bad = ENFORCED_CASES[keyword]
    without = {key: value for key, value in schema.items() if key != keyword}
    if keyword == "$ref":
        without = {**schema, "properties": {"a": True, "b": {"const": 1}}}
    plain = [text for text in bad if "\\u" not in text]
    assert any(says(tokenizer, without, text) for text in plain)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_enforced(tokenizer: Tokenizer, name: str) -> None:
    good, bad = FORMAT_CASES[name]
    schema = {"type": "string", "format": name}
    assert says(tokenizer, schema, json.dumps(good))
    assert not says(tokenizer, schema, json.dumps(bad))


def test_keywords_beside_each_other_all_hold(tokenizer: Tokenizer) -> None:
    schema = {
        "$defs": {"named": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
        "$ref": "#/$defs/named",
        "properties": {"age": {"type": "integer", "minimum": 0}},
        "required": ["age"],
    }
    assert says(tokenizer, schema, '{"age": 3, "name": "Ann"}') or says(tokenizer, schema, '{"name": "Ann", "age": 3}')
    for text in ('{"name": "Ann"}', '{"age": 3}', '{"age": -3, "name": "Ann"}', '{"name": 3, "age": 3}'):
        assert not says(tokenizer, schema, text)


def test_whitespace_may_indent_but_not_fill(tokenizer: Tokenizer) -> None:
    schema = {"type": "object"}
    value = {"a": [1, {"b": None}]}
    for indent in (None, 2, 4, "\t"):
        assert says(tokenizer, schema, json.dumps(value, indent=indent))
    assert says(tokenizer, schema, '{"a":1}')
    assert not says(tokenizer, schema, "{" + " " * 60 + '"a": 1}')
    assert not says(tokenizer, schema, "{\n\n\n\n\n\n}")
    assert not says(tokenizer, schema, ' {"a": 1}')


def test_annotations_say_nothing(tokenizer: Tokenizer) -> None:
    notes: dict[str, Any] = dict.fromkeys(ANNOTATIONS - {"examples", "deprecated", "readOnly", "writeOnly"}, "text")
    notes |= {"examples": ["x"], "deprecated": True, "readOnly": False, "writeOnly": False, "default": {"not": {}}}
    schema = {**notes, "$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://x.org/y", "type": "null"}
    assert says(tokenizer, schema, "null")
    assert fits(schema, "null")
    assert not fits(schema, "1")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": {"a/b": {"nullable": True}}}, "at /properties/a~1b/nullable: the keyword"),
        ({"items": {"uniqueItems": True}}, "/items/uniqueItems: the keyword 'uniqueItems' is not enforced"),
        ({"properteis": {}}, "did you mean 'properties'"),
        ({"anyOf": [{}, {"not": {}}]}, "/anyOf/1/not: the keyword 'not' is not enforced (say what is allowed"),
        ({"if": {}, "then": {}}, "/if: the keyword 'if' is not enforced"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"$defs": {"unused": {"contains": {}}}}, "/$defs/unused/contains"),
        ({"properties": {"a": {"$id": "https://x.org"}}}, "/properties/a/$id"),
        ({"$anchor": "a"}, "$anchor"),
        ({"contentEncoding": "base64"}, "contentEncoding"),
        ({"format": "unknown"}, "/format: the format 'unknown' is not enforced"),
        ({"minProperties": 2}, "/minProperties: minProperties 2 is not enforced (0 and 1 are)"),
        ({"$ref": "https://x.org/y"}, "names no schema in this document"),
        ({"$ref": "#/$defs/b", "$defs": {"a": {}}}, "names no schema"),
        ({"$ref": "#/default", "default": {"not": {}}}, "names no schema"),  # never looked at: it could say anything
        ({"$ref": "#a"}, "names no schema"),
        ({"$ref": "#"}, "refers to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "refers to itself"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "refers to itself"),
        ({"const": 2**53 + 1}, "/const: 9007199254740993 is too large"),
        ({"enum": [{"a": [0.1 + 0.2]}]}, "/enum: 0.30000000000000004 has too many digits"),
        ({"const": "a\x00b"}, "the control character '\\x00' cannot be enforced"),
        ({"type": "strnig"}, "/type: 'strnig' is not valid"),
        ({"items": [{}]}, "/items: [{}] is not of type 'object', 'boolean'"),
        ({"minimum": 3, "exclusiveMinimum": True}, "/exclusiveMinimum: True is not of type 'number'"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "/$schema: "),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "the cases of a oneOf must differ in type"),
        ({"pattern": "(?=a)"}, "look-around"),
        ({"pattern": "["}, "unclosed character class"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength (3) is greater than maxLength (2)"),
        ({"type": "string", "enum": [1, 2]}, "nsatisfiable"),
        (False, "false allows nothing"),
        ("{", "the JSON schema is not JSON: "),
        ("[]", "[] is not of type 'object', 'boolean'"),
        ("[" * 5000, "not JSON"),
        ({"anyOf": [{}] * 3000}, "more than 2000 schemas"),
    ],
)
def test_refused_with_the_place_and_the_reason(schema: Any, words: str) -> None:
    assert words in refusal(schema)


def test_depth_is_limited() -> None:
    schema: dict[str, Any] = {}
    for _ in range(50):
        schema = {"items": schema}
    assert "nested more than 40 schemas deep" in refusal(schema)


def test_what_explodes_is_refused() -> None:
    cases = [{"type": "object", "properties": {f"q{k}": {"const": k}}} for k in range(230)]
    assert "too large" in refusal({"allOf": [{"anyOf": cases}, {"anyOf": cases}]})


# ------------------------------------------------------------------------------------------------ the finished text


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"multipleOf": 0.01}, "0.07", "0.071"),  # 0.07 / 0.01 is no integer in float64
        ({"multipleOf": 0.01}, "123456789012345678901234567890.25", "1e-999"),
        ({"multipleOf": 2}, "3e1", "1e999999999"),
        ({"exclusiveMaximum": 10.5}, "10.49999999999999999999999", "10.5"),
        ({"pattern": r"^\W$"}, '"é"', '"e"'),  # ECMA's \W knows ASCII only
        ({"pattern": r"^\p{L}+$"}, '"é"', '"1"'),
        ({"pattern": "^(a+)+$"}, '"' + "a" * 50 + '"', '"' + "a" * 50 + 'b"'),  # exponential by backtracking
        ({"additionalProperties": False, "patternProperties": {"^a": True}}, '{"ab": 1}', '{"ba": 1}'),
        ({"properties": {"a": {"type": "integer"}}}, '{"a": 1}', '{"\\u0061": "x"}'),
        ({}, "[1, null]", "NaN"),
        ({"maximum": 5}, "-1E+99999999999999999999", "1E+99999999999999999999"),
        ({"multipleOf": 2}, "1e-99999999999999999999", "1e99999999999999999999"),
        ({}, "{}", '{"a": 1'),
        ({}, "[]", ""),
        ({}, "1", "[" * 100_000),
        ({}, "1", "1" * 5000),  # more digits than Python reads
    ],
)
def test_finished_texts(schema: Any, good: str, bad: str) -> None:
    assert fits(schema, good)
    assert not fits(schema, bad)


def test_the_place_that_does_not_fit_is_named() -> None:
    schema = {"properties": {"a": {"items": {"type": "integer"}}}}
    with pytest.raises(QualityError, match=r"does not fit its JSON schema at /a/1: 'x' is not of type 'integer'"):
        conforms(checked_schema(schema), '{"a": [1, "x"]}')
