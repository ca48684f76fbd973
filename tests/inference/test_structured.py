"""Structured answers: whatever the logits, a finished answer has its structure; nothing valid is out of reach."""

from __future__ import annotations

import gc
import json
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance")
pytest.importorskip("jsonschema")

from tailor.errors import ConfigError, QualityError
from tailor.inference import structured
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.inference.sampling import choose
from tailor.inference.structured import Structure, check, compiled, validate
from tailor.models.base import load_base
from tailor.models.files import EMBEDDED
from tailor.text.messages import user
from tailor.text.tokenizer import Tokenizer, load_tokenizer
from tiny_models import tiny_tokenizer

NANO_STOP = (6, 2)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["new", "old", None]}, "maxItems": 2},
        "boss": {"anyOf": [{"$ref": "#/$defs/boss"}, {"type": "null"}]},
    },
    "required": ["name", "age", "boss"],
    "additionalProperties": False,
    "$defs": {"boss": {"type": "object", "properties": {"id": {"type": "number", "multipleOf": 0.5, "maximum": 9}}}},
}
STRUCTURES = [
    Structure(kind="json_schema", content=PERSON),
    Structure(
        kind="json_schema", content={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}
    ),
    Structure(kind="regex", content=r"(?i)(yes|no)( [0-9]{1,3}){0,2}\."),
    Structure(kind="regex", content="[a-fé😀]{2,6}"),
    Structure(kind="choice", content=("positive", "positively not", "neutral", 'say "hi"\n<|eos|>', "(a|b)*")),
    Structure(kind="grammar", content='start: "<" word ("," word)? ">"\nword: /[a-z]{1,3}/'),
]


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return load_tokenizer(EMBEDDED["tailor-nano"])


def answer(
    structure: Structure,
    tokenizer: Tokenizer,
    stop: tuple[int, ...],
    logits_of: Callable[[list[int]], Tensor],
    *,
    seed: int,
    temperature: float = 1.5,
    max_new_tokens: int = 60,
) -> str | None:
    """The text of an answer that ended with a stop token or by its structure; None for one that grew too long."""
    params = SamplingParams(temperature=temperature, seed=seed, structure=structure)
    generator = torch.Generator().manual_seed(seed)
    constraint = compiled(structure, tokenizer, stop)
    sampled: list[int] = []
    for _ in range(max_new_tokens):
        logits = logits_of(sampled)
        token = choose(logits, params, generator, sampled_ids=sampled, allowed=constraint.mask(len(logits)))
        constraint.accept(token)
        if token in stop:
            return tokenizer.decode(sampled, continues=True)
        sampled.append(token)
        if constraint.finished:
            return tokenizer.decode(sampled, continues=True)
    return None


def noise(seed: int, size: int) -> Callable[[list[int]], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda sampled: 4 * torch.randn(size, generator=generator)


# ------------------------------------------------------------------------------------------------ valid, whatever comes


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda structure: structure.kind)
def test_noise_under_a_structure_has_the_structure(nano: Tokenizer, structure: Structure) -> None:
    texts = [answer(structure, nano, NANO_STOP, noise(s, nano.vocab_size), seed=s) for s in range(40)]
    finished = [text for text in texts if text is not None]
    assert len(finished) >= 10
    for text in finished:
        validate(structure, text)
    assert len(set(finished)) >= min(3, len(finished)), "and what is chosen is still chosen by chance"


def test_answers_of_a_model_have_their_structures_beside_each_other() -> None:
    backend = LocalBackend(load_base("tailor-nano", device="cpu"))
    free = Request((user("Tell me about Ann."),), sampling=SamplingParams(max_new_tokens=8))
    alone = backend.generate([free])[0].text
    requests = [
        Request(
            (user("Tell me about Ann."),),
            sampling=SamplingParams(structure=structure, temperature=temperature, seed=seed, max_new_tokens=24),
        )
        for structure in STRUCTURES
        for temperature, seed in ((0.0, 0), (1.5, 1), (1.5, 2))
    ]
    *answers, beside = backend.generate([*requests, free])
    finished = 0
    for request, completion in zip(requests, answers, strict=True):
        if completion.finish_reason == "stop":
            assert request.sampling.structure is not None
            validate(request.sampling.structure, completion.text)
            finished += 1
    assert finished >= 8
    assert beside.text == alone


def test_a_json_object_of_a_model_is_one(nano: Tokenizer) -> None:
    structure = Structure(kind="json_object")
    closers = nano.encode('"}:0', continues=True)
    found = []
    for seed in range(40):
        draw = noise(seed, nano.vocab_size)

        def logits_of(sampled: list[int], draw: Callable[[list[int]], Tensor] = draw) -> Tensor:
            logits = draw(sampled)
            logits[closers] += 12  # otherwise random texts never end
            return logits

        text = answer(structure, nano, NANO_STOP, logits_of, seed=seed)
        if text is not None:
            validate(structure, text)
            found.append(json.loads(text))
    assert len(found) >= 10
    assert all(isinstance(value, dict) for value in found)


SCALARS = st.sampled_from(
    [
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "multipleOf": 0.25},
        {"type": "string", "minLength": 1, "maxLength": 3, "pattern": "^[ab]+|c$"},
        {"type": ["boolean", "null"]},
        {"enum": ["x", 1, None, [1, {"a": "b"}]]},
        {"const": 2.5},
        {"type": "string", "format": "time"},
    ]
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    keys = st.sampled_from(["a", "b", "ab", "é"])
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(keys, inner, min_size=1, max_size=3)},
        optional={
            "required": st.lists(keys, max_size=2, unique=True),
            "additionalProperties": st.sampled_from([False, {"type": "null"}]),
        },
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array"), "items": inner, "maxItems": st.integers(1, 3)},
        optional={"prefixItems": st.lists(inner, min_size=1, max_size=2), "minItems": st.integers(0, 1)},
    )
    either = st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)})
    both = st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=2)})
    return objects | arrays | either | both


@settings(max_examples=60)
@given(schema=st.recursive(SCALARS, nested, max_leaves=5), seed=st.integers(0, 10_000))
def test_random_schemas_hold_for_noise(schema: dict[str, Any], seed: int) -> None:
    structure = Structure(kind="json_schema", content=schema)
    try:
        check(structure)
    except ConfigError:
        return  # such as one that nothing satisfies
    tokenizer = tiny_tokenizer()
    text = answer(structure, tokenizer, (tokenizer.eos_id or 0,), noise(seed, tokenizer.vocab_size), seed=seed)
    if text is not None:
        validate(structure, text)


# ------------------------------------------------------------------------------------------------ nothing out of reach


class PlainText:
    """Tokens of a text in which special tokens are spelled out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.fast = FastTokenizer.from_str(tokenizer.hf.backend_tokenizer.to_str())
        self.fast.encode_special_tokens = True

    def __call__(self, text: str) -> list[int]:
        return list(self.fast.encode(text, add_special_tokens=False).ids)


def follow(structure: Structure, tokenizer: Tokenizer, stop: tuple[int, ...], ids: list[int]) -> bool:
    constraint = compiled(structure, tokenizer, stop)
    for token in ids:
        if not constraint.mask(tokenizer.vocab_size)[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize(
    ("kind", "content", "good", "bad"),
    [
        ("json_object", None, ['{"a": [1, {"b": "é😀\\n"}]}', "{}"], ["[]", '"a"', "1", "{'a': 1}", '{"a": 1,}']),
        ("regex", "a+|b", ["a", "aaaa", "b"], ["ab", "", "c"]),
        ("regex", r"^\d{2} €$", ["12 €"], ["1 €", "12 $"]),
        ("choice", ["yes", "yes, sir", "<|user|> é"], ["yes", "yes, sir", "<|user|> é"], ["no", "ye", "yes, "]),
        ("grammar", 'start: "(" start ")" | "x"', ["x", "((x))"], ["((x)", "()"]),
    ],
)
def test_what_may_be_said(nano: Tokenizer, kind: Any, content: Any, good: list[str], bad: list[str]) -> None:
    structure = Structure(kind=kind, content=content)
    check(structure)
    split = PlainText(nano)
    assert {text: follow(structure, nano, NANO_STOP, [*split(text), 6]) for text in good} == dict.fromkeys(good, True)
    assert {text: follow(structure, nano, NANO_STOP, [*split(text), 6]) for text in bad} == dict.fromkeys(bad, False)
    for text in good:
        validate(structure, text)
    for text in bad:
        with pytest.raises(QualityError):
            validate(structure, text)


def test_a_split_character_is_allowed_byte_by_byte() -> None:
    tokenizer = tiny_tokenizer()
    structure = Structure(kind="regex", content="[é😀]+")
    ids = tokenizer.encode("😀é")
    assert len(ids) == 6
    assert follow(structure, tokenizer, (2,), [*ids, 2])
    assert not follow(structure, tokenizer, (2,), [*ids[:5], 2]), "not in the middle of one"


def test_special_tokens_are_not_text(nano: Tokenizer) -> None:
    structure = Structure(kind="regex", content=r"[\s\S]*")
    allowed = compiled(structure, nano, NANO_STOP).mask(nano.vocab_size)
    assert [i for i in sorted(nano.special_ids) if allowed[i]] == sorted(NANO_STOP)
    with pytest.raises(ConfigError, match="no token for what it wants"):
        compiled(Structure(kind="grammar", content='start: <|user|> "a"'), nano, NANO_STOP).mask(nano.vocab_size)


# ------------------------------------------------------------------------------------------------ stopping


def test_a_stop_token_only_where_the_text_is_complete(nano: Tokenizer) -> None:
    constraint = compiled(Structure(kind="choice", content=["a", "ab"]), nano, NANO_STOP)
    first, second = nano.encode("a"), nano.encode("b")
    assert not constraint.mask(4096)[list(NANO_STOP)].any()
    constraint.accept(first[0])
    assert constraint.mask(4096).nonzero()[:, 0].tolist() == sorted([*NANO_STOP, second[0]])
    assert not constraint.finished, "more may follow"
    constraint.accept(second[0])
    assert constraint.finished
    assert constraint.mask(4096).nonzero()[:, 0].tolist() == sorted(NANO_STOP)
    constraint.accept(NANO_STOP[1])
    assert constraint.finished


def test_a_token_that_may_not_stand_there_is_an_error(nano: Tokenizer) -> None:
    constraint = compiled(Structure(kind="choice", content=["a"]), nano, NANO_STOP)
    with pytest.raises(ConfigError, match="does not fit the structure") as caught:
        constraint.accept(nano.encode("b")[0])
    assert "state" not in caught.value.message
    assert not constraint.finished
    with pytest.raises(ConfigError, match="cannot be followed any further"):
        constraint.mask(4096)


@pytest.mark.parametrize("num_logits", [4096, 4090, 5000, 8])
def test_logits_may_be_more_or_fewer_than_words(nano: Tokenizer, num_logits: int) -> None:
    structure = Structure(kind="regex", content=r"[\s\S]*")
    allowed = compiled(structure, nano, NANO_STOP).mask(num_logits)
    assert allowed.shape == (num_logits,)
    assert allowed.dtype == torch.bool
    assert not allowed[4096:].any()
    assert allowed[7]


# ------------------------------------------------------------------------------------------------ tokenizers


def sentencepiece_like() -> Tokenizer:
    """As Llama 2's: a space is ▁, a text starts with one, and what is unknown falls apart into bytes."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", '"', "▁{"]
    fast = FastTokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    )


@pytest.mark.parametrize("structure", STRUCTURES[1:], ids=lambda structure: structure.kind)
@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_like])
def test_other_tokenizers(make: Callable[[], Tokenizer], structure: Structure) -> None:
    tokenizer = make()
    stop = (tokenizer.eos_id or 0,)
    texts = [answer(structure, tokenizer, stop, noise(s, tokenizer.vocab_size), seed=s) for s in range(15)]
    finished = [text for text in texts if text is not None]
    assert finished
    for text in finished:
        validate(structure, text)


def test_a_tokenizer_that_loses_characters_is_refused() -> None:
    fast = FastTokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[END]": 2}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="[END]", unk_token="[UNK]"))
    with pytest.raises(ConfigError, match="this base cannot follow structures"):
        compiled(Structure(kind="json_object"), tokenizer, (2,))


def test_a_base_without_a_stop_token_is_refused(nano: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no token that ends an answer"):
        compiled(Structure(kind="json_object"), nano, ())


# ------------------------------------------------------------------------------------------------ kept, and let go


def test_what_is_costly_is_done_once(nano: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure(kind="regex", content="kept [a-z]")
    first = compiled(structure, nano, NANO_STOP).mask(4096)
    monkeypatch.setattr(structured.automaton, "matcher", None)
    again = compiled(Structure(kind="regex", content="kept [a-z]"), nano, NANO_STOP)
    again.accept(int(first.nonzero()[0]))
    assert not torch.equal(again.mask(4096), first)
    fresh = compiled(structure, nano, NANO_STOP)
    assert torch.equal(fresh.mask(4096), first), "each answer starts from the start"


def test_a_tokenizer_that_is_gone_takes_its_structures_along() -> None:
    tokenizer = sentencepiece_like()
    compiled(Structure(kind="json_object"), tokenizer, (2,))
    kept = weakref.ref(structured._VOCABULARIES[tokenizer][(2,)])
    del tokenizer
    gc.collect()
    assert kept() is None


def test_from_several_threads(nano: Tokenizer) -> None:
    problems: list[Exception] = []

    def work(number: int) -> None:
        try:
            rng = random.Random(number)
            for _ in range(10):
                structure = rng.choice(STRUCTURES[1:])
                text = answer(structure, nano, NANO_STOP, noise(rng.randrange(1000), 4096), seed=number)
                if text is not None:
                    validate(structure, text)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


# ------------------------------------------------------------------------------------------------ what cannot be one


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("regex", None, "regex wants a text"),
        ("regex", "", "regex wants a text"),
        ("grammar", ["a"], "grammar wants a text"),
        ("choice", "a", "choice wants a list of different, non-empty texts"),
        ("choice", [], "choice wants"),
        ("choice", ["a", "a"], "choice wants"),
        ("choice", ["a", ""], "choice wants"),
        ("json_object", {"type": "object"}, "json_object wants no content"),
        ("json_schema", {"const": float("nan")}, "cannot be written as JSON"),
        ("json_schema", {"const": {1, 2}}, "cannot be written as JSON"),
        ("regex", "a" * 100_001, "content of 100001 characters, 100000 are the most"),
        ("xml", "a", "unknown value 'xml'"),
    ],
)
def test_contents_that_do_not_fit_their_kind(kind: Any, content: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Structure(kind=kind, content=content)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "[", "unclosed character class"),
        ("grammar", 'strt: "a"', "no start rule found"),
        ("grammar", 'start: "a" b', "unknown name"),
        ("grammar", 'start: %json {"not": {}}', "a grammar cannot hold %json"),
        ("grammar", 'start: "(" start ")"', None),  # never ends, and is not found to
    ],
)
def test_mistakes_are_named_before_the_first_token(kind: Any, content: str, words: str | None) -> None:
    if words is None:
        check(Structure(kind=kind, content=content))
        return
    with pytest.raises(ConfigError) as caught:
        check(Structure(kind=kind, content=content))
    assert words in caught.value.message


def test_a_pattern_too_complex_to_follow_ends_with_an_error(nano: Tokenizer) -> None:
    structure = Structure(kind="regex", content=r"(.*a){0,40}(.{0,200}b.{0,200}){0,20}c")
    with pytest.raises(ConfigError, match="cannot be followed any further"):
        answer(structure, nano, NANO_STOP, noise(0, 4096), seed=0, max_new_tokens=400)


def test_structures_are_values() -> None:
    one = SamplingParams(structure=Structure(kind="json_schema", content=PERSON))
    other = SamplingParams(structure={"kind": "json_schema", "content": json.dumps(PERSON)})  # type: ignore[arg-type]
    assert one == other
    assert hash(one) == hash(other)
    assert SamplingParams.model_validate_json(one.model_dump_json()) == one
