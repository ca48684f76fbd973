"""Text as it grows: whole characters, no beginnings of stop texts, and in the end what the renderer reads."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor.inference.text_stream import TextStream
from tailor.models.base import load_base
from tailor.text.render import Renderer
from tiny_models import tiny_base

NANO = load_base("tailor-nano").renderer
RENDERERS = {"nano": NANO, "tiny": tiny_base().renderer, "plain": tiny_base(chat=False).renderer}


def pieces(renderer: Renderer, token_ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(renderer, stop)
    found = []
    for token in token_ids:
        found.append(stream.push(token))
        if stream.stopped or token in renderer.stop:
            break
    return [*found, stream.finish()], stream


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=60), seed=st.integers(0, 99))
def test_the_pieces_are_the_text(name: str, text: str, seed: int) -> None:
    renderer = RENDERERS[name]
    draw = random.Random(seed)
    ids = [i for i in renderer.tokenizer.encode(text, continues=True) if i not in renderer.stop]
    ids += [draw.randrange(renderer.tokenizer.vocab_size) for _ in range(draw.randrange(30))]
    found, stream = pieces(renderer, ids)
    assert "".join(found) == stream.content == renderer.parse(stream.token_ids).content
    assert not any(piece.endswith("\ufffd") for piece in found[:-1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), stop=st.lists(st.text("abe th.\n", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_never_shows_not_even_its_beginning(seed: int, stop: list[str]) -> None:
    draw = random.Random(seed)
    text = " ".join(draw.choice(["the", "bath", "be", "a", "the the.", "\n", "habit"]) for _ in range(20))
    found, stream = pieces(NANO, NANO.tokenizer.encode(text, continues=True), tuple(stop))
    places = [at for at in (text.find(s) for s in stop) if at >= 0]
    whole = text[: min(places)] if places else text
    assert "".join(found) == whole
    assert stream.stopped == bool(places)
    shown = ""
    for piece in found:
        shown += piece
        assert whole.startswith(shown)


def test_characters_of_several_tokens_come_whole() -> None:
    text = "naïve 東京 🙂 ok"
    found, _ = pieces(NANO, NANO.tokenizer.encode(text, continues=True))
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found)


def test_nothing_follows_the_token_that_ends_a_turn() -> None:
    stream = TextStream(NANO)
    ids = NANO.tokenizer.encode("yes", continues=True)
    said = "".join(stream.push(token) for token in [*ids, NANO.stop[0], *ids])
    assert said + stream.finish() == "yes"


def test_long_answers_are_not_decoded_again_and_again() -> None:
    text = "word " * 400
    ids = NANO.tokenizer.encode(text, continues=True)
    seen: list[int] = []
    stream = TextStream(NANO)
    inner = NANO.tokenizer.decode
    stream.renderer.tokenizer.decode = lambda token_ids, **options: (
        seen.append(len(token_ids))
        or inner(  # type: ignore[method-assign, func-returns-value]
            token_ids, **options
        )
    )
    try:
        said = "".join(stream.push(token) for token in ids)
    finally:
        del stream.renderer.tokenizer.decode  # type: ignore[method-assign]
    assert max(seen) < 30
    assert text.startswith(said)
