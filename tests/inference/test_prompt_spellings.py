"""`Customized.generate` and `complete`: prompts as texts, messages and dicts; a seed for every prompt; tools."""

from __future__ import annotations

from typing import Any

import pytest

import tailor
from tailor.errors import DataError
from tailor.inference.load import Customized, as_messages
from tailor.inference.local import LocalBackend
from tailor.text.messages import Message, assistant, system, user
from tiny_models import tiny_base


@pytest.fixture(scope="module")
def customized() -> Customized:
    base = tiny_base()
    return Customized(base, LocalBackend(base))


@pytest.mark.parametrize(
    ("prompt", "turns"),
    [
        ("hi", (user("hi"),)),
        (tailor.Message("user", "hi"), (user("hi"),)),
        ({"role": "user", "content": "hi"}, (user("hi"),)),
        (
            [{"role": "system", "content": "S"}, user("a"), {"role": "assistant", "content": "b"}],
            (system("S"), user("a"), assistant("b")),
        ),
        ([{"role": "user", "content": "hi", "name": "Ann"}], (Message("user", "hi", name="Ann"),)),
    ],
)
def test_spellings_of_a_prompt(prompt: Any, turns: tuple[Message, ...]) -> None:
    assert as_messages(prompt) == turns


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ([{"role": "usr", "content": "hi"}], "did you mean 'user'"),
        ([{"role": "user", "content": 3}], r"content is a number \(3\)"),
        (["hi", "there"], r"a turn is text \('hi'\)"),
    ],
)
def test_what_is_no_message_is_said(prompt: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        as_messages(prompt)


def test_dicts_are_answered_like_messages(customized: Customized) -> None:
    said = customized.generate([{"role": "user", "content": "the fox"}], max_new_tokens=5)
    assert (
        said
        == customized.generate(user("the fox"), max_new_tokens=5)
        == customized.generate("the fox", max_new_tokens=5)
    )


def test_each_prompt_draws_with_a_seed_of_its_own(customized: Customized) -> None:
    settings = {"temperature": 1.0, "max_new_tokens": 8}
    texts = [c.token_ids for c in customized.complete(["the fox"] * 3, seed=5, **settings)]
    assert len(set(texts)) == 3
    again = [customized.complete(["the fox"], seed=5 + k, **settings)[0].token_ids for k in range(3)]
    assert texts == again


def test_tools_reach_the_request(customized: Customized, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(customized.backend, "generate", lambda requests: seen.extend(requests) or [])
    tool = {"type": "function", "function": {"name": "clock"}}
    customized.complete(["a", "b"], tools=[[tool], []])
    assert [request.tools for request in seen] == [(tool,), ()]
    with pytest.raises(ValueError, match="shorter"):
        customized.complete(["a", "b"], tools=[[tool]])
