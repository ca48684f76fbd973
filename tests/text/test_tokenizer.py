"""Tokenizers with their own ways: a space before every text, eos as padding, no bos, several templates, a calendar."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tailor.errors import ConfigError
from tailor.text.messages import assistant, user
from tailor.text.render import make_renderer
from tailor.text.tokenizer import TEMPLATE_DAY, Tokenizer, load_tokenizer
from tiny_models import CHAT_TEMPLATE, ROLES, tiny_tokenizer

SPACED = ("always", "first", "prepended", "byte-level")
"""Ways to start every text with a space."""

TEXTS = ("hello", " hello", "  hello", "\nhello", "hello ", "", " ", "the fox\n")


@cache
def spaced_tokenizer(kind: str, *, template: str | None = CHAT_TEMPLATE, bos: bool = True) -> Tokenizer:
    """A BPE of 200 ids whose padding is its eos; `prepended` is the layout of Llama 2."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prepended":
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind == "byte-level":
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        fast.decoder = decoders.ByteLevel()
    else:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        fast.decoder = decoders.Metaspace(prepend_scheme=kind, split=False)
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>", *ROLES], show_progress=False)
    texts = ["hello there the fox\n says hi , how are you? abcdefghijklmnopqrstuvwxyz USV0."] * 3
    fast.train_from_iterator(texts, trainer)
    hf = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )
    hf.chat_template = template
    return Tokenizer(hf)


def trained(rendered: Any) -> list[int]:
    return [i for i, mask in zip(rendered.token_ids, rendered.loss_mask, strict=True) if mask]


@pytest.mark.parametrize("kind", SPACED)
def test_a_piece_that_continues_a_text_gets_no_space(kind: str) -> None:
    tokenizer = spaced_tokenizer(kind)
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("hello"))[0][0] in "▁Ġ"
    for text in TEXTS:
        piece = tokenizer.encode(text, continues=True)
        assert tokenizer.decode(piece, continues=True) == text
    assert tokenizer.decode(tokenizer.encode("the") + tokenizer.encode("re", continues=True)).strip() == "there"


@pytest.mark.parametrize("separator", ["", "\n", " "])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", SPACED)
def test_parse_inverts_render_where_texts_start_with_a_space(kind: str, chat: bool, separator: str) -> None:
    template = CHAT_TEMPLATE.replace("|>{{ m['content']", f"|>{separator}{{{{ m['content']").replace(
        "<|assistant|>{%", f"<|assistant|>{separator}{{%"
    )
    renderer = make_renderer(spaced_tokenizer(kind, template=template if chat else None))
    for content in TEXTS:
        turns = (user("the fox"), assistant(content))
        rendered, prompt = renderer.example(turns), renderer.prompt(turns[:1])
        assert rendered.token_ids[: len(prompt)] == prompt
        assert renderer.parse(trained(rendered)) == assistant(content)


def test_a_rendered_example_reads_as_its_template_writes_it() -> None:
    tokenizer = spaced_tokenizer("first")
    turns = (user("the fox"), assistant("hello"), user("hi"), assistant(" how"))
    rendered = make_renderer(tokenizer).example(turns)
    text = tokenizer.apply_chat_template([turn.to_dict() for turn in turns], (), False)
    assert tokenizer.decode(rendered.token_ids) == text


@pytest.mark.parametrize("chat", [True, False])
def test_an_eos_that_is_also_the_padding_is_trained(chat: bool) -> None:
    template = CHAT_TEMPLATE.replace("<|end|>", "{{ eos_token }}") if chat else None
    tokenizer = spaced_tokenizer("first", template=template)
    assert tokenizer.hf.pad_token_id == tokenizer.eos_id
    renderer = make_renderer(tokenizer)
    assert renderer.stop == (tokenizer.eos_id,)
    assert trained(renderer.example((user("hi"), assistant("hello"))))[-1] == tokenizer.eos_id


@pytest.mark.parametrize("chat", [True, False])
def test_without_a_bos_nothing_stands_first(chat: bool) -> None:
    tokenizer = spaced_tokenizer("first", template=CHAT_TEMPLATE if chat else None, bos=False)
    assert (tokenizer.bos_id, tokenizer.leading_ids()) == (None, [])
    prompt = make_renderer(tokenizer).prompt((user("hi"),))
    assert tokenizer.decode(prompt) == ("<|user|>hi<|end|><|assistant|>" if chat else "hi")


def test_named_templates(tmp_path: Path) -> None:
    hf = spaced_tokenizer("first").hf
    tools = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ tools | tojson }}")
    named = {"default": CHAT_TEMPLATE, "tool_use": tools, "rag": "nothing"}
    hf.chat_template = named
    hf.save_pretrained(tmp_path)
    hf.chat_template = CHAT_TEMPLATE
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.hf.chat_template == named
    assert tokenizer.chat_template == CHAT_TEMPLATE
    turns = [user("hi").to_dict()]
    assert tokenizer.apply_chat_template(turns, (), True) == "<s><|user|>hi<|end|><|assistant|>"
    assert tokenizer.apply_chat_template(turns, ({"name": "f"},), True).startswith('<s>[{"name": "f"}]<|user|>')
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"several chat templates \(rag, tool_use\) and none is named default"):
        load_tokenizer(tmp_path)


def test_a_template_that_stamps_the_date_does_not_change_overnight() -> None:
    dated = (
        "{{ bos_token }}{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d, %A %d %B') }}{% endif %}"
        "{% if date_string is defined %} {{ date_string }}{% endif %}"
    )
    template = CHAT_TEMPLATE.replace("{{ bos_token }}", dated)
    tokenizer = tiny_tokenizer(template=template)
    expected = "<|bos|>2024-07-26, Friday 26 July 26 Jul 2024<|user|>hi<|end|><|assistant|>"
    assert tokenizer.apply_chat_template([user("hi").to_dict()], (), True) == expected
    assert tokenizer.decode(make_renderer(tokenizer).prompt((user("hi"),))) == expected
    assert TEMPLATE_DAY.isoformat() == "2024-07-26T00:00:00"


@pytest.mark.parametrize("kind", [*SPACED, "tiny"])
@given(text=st.text(max_size=30) | st.sampled_from([*TEXTS, "a<|end|>b", "</s>", "<|user|>"]))
def test_ids_are_those_of_a_plain_call_whatever_was_called_before(kind: str, text: str) -> None:
    tokenizer = tiny_tokenizer() if kind == "tiny" else spaced_tokenizer(kind)
    expected = list(tokenizer.hf(text, add_special_tokens=False)["input_ids"])
    assert tokenizer.encode(text) == expected
    tokenizer.hf(["some words", "more"], truncation=True, max_length=2, padding=True)  # it stays switched on
    assert tokenizer.encode(text) == expected


def test_a_tokenizer_with_a_way_of_its_own_is_called() -> None:
    class Shouting(PreTrainedTokenizerFast):  # type: ignore[misc]
        def _encode_plus(self, text: Any, **options: Any) -> Any:
            return super()._encode_plus(
                [part.upper() for part in text] if isinstance(text, list) else text.upper(), **options
            )

    hf = Shouting(tokenizer_object=tiny_tokenizer().hf.backend_tokenizer, eos_token="<|eos|>", bos_token="<|bos|>")
    assert Tokenizer(hf).encode("hello") == tiny_tokenizer().encode("HELLO")


def test_the_fingerprint_follows_vocabulary_template_and_special_tokens() -> None:
    tokenizers = [
        tiny_tokenizer(),
        tiny_tokenizer(template=CHAT_TEMPLATE + " "),
        tiny_tokenizer(leading_bos=True),
        tiny_tokenizer(chat=False),
        *(spaced_tokenizer(kind) for kind in SPACED),
        spaced_tokenizer("first", bos=False),
    ]
    prints = [tokenizer.fingerprint for tokenizer in tokenizers]
    assert None not in prints
    assert len(set(prints)) == len(prints)
    again = Tokenizer(tiny_tokenizer().hf)
    again.encode("some words")
    assert again.fingerprint == prints[0]
