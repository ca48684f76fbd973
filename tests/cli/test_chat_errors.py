"""A conversation outlives an answer that cannot be given."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import tailor.inference.load
from tailor.cli.main import run
from tailor.errors import DataError, ResourceError, TailorError
from tailor.text.messages import Message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DataError("the user text holds <|end|>", hint="remove it"), ["the user text holds <|end|>", "remove it"]),
        (ResourceError("a prompt leaves no room", hint="shorten the prompt"), ["leaves no room", "/new starts over"]),
    ],
)
def test_an_error_is_said_and_its_turn_dropped(
    error: TailorError, said: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[Message]] = []

    def generate(turns: list[Message], **settings: Any) -> str:
        asked.append(list(turns))
        if turns[-1].content == "bad":
            raise error
        return f"answer to {turns[-1].content}"

    monkeypatch.setattr(tailor.inference.load, "load", lambda *a, **k: SimpleNamespace(generate=generate))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\nbad\ntwo\n/new\nthree\n"))
    assert run(["chat", "anything", "--system", "S"]) == 0
    streams = capsys.readouterr()
    assert streams.out.splitlines() == ["answer to one", "answer to two", "answer to three"]
    for text in said:
        assert text in streams.err
    assert [m.content for m in asked[2]] == ["S", "one", "answer to one", "two"]
    assert [m.content for m in asked[3]] == ["S", "three"]
