"""A request says how long to think first: on a base whose template has a switch it is turned, on others nothing is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tailor.inference.backend import GREEDY, Request
from tailor.inference.local import LocalBackend
from tailor.models.base import Base, load_base
from tailor.models.files import resolve
from tailor.text.messages import user

ASKED = (user("Where is my parcel?"),)
SHORT = GREEDY.model_copy(update={"max_new_tokens": 6, "ignore_stop": True})


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The embedded base with a template that opens a thought unless it is told not to."""
    folder = Path(shutil.copytree(resolve("tailor-nano"), tmp_path_factory.mktemp("base") / "thinker"))
    (path,) = folder.glob("chat_template*")
    template = path.read_text("utf-8").rstrip()
    path.write_text(
        template + "{% if add_generation_prompt and enable_thinking is false %}Thought.{% endif %}", "utf-8"
    )
    return load_base(folder, dtype="float32")


def test_the_switch_is_turned_for_one_request_alone(thinker: Base) -> None:
    backend = LocalBackend(thinker)
    assert backend.takes_effort(None)
    plain, none, high = backend.generate([Request(ASKED, sampling=SHORT, effort=e) for e in (None, "none", "high")])
    prompt = thinker.renderer.prompt(ASKED)
    off = (*prompt, *thinker.tokenizer.encode("Thought.", continues=True))
    by_hand = backend.generate([Request((), prompt=off, sampling=SHORT)])[0]
    assert none.num_prompt_tokens == len(off) > len(prompt) == plain.num_prompt_tokens
    assert none.token_ids == by_hand.token_ids
    assert (high.token_ids, high.text) == (plain.token_ids, plain.text)


def test_without_a_switch_nothing_changes() -> None:
    backend = LocalBackend(load_base("tailor-nano", dtype="float32"))
    assert not backend.takes_effort(None)
    plain, high = backend.generate([Request(ASKED, sampling=SHORT, effort=e) for e in (None, "high")])
    assert plain.token_ids == high.token_ids
