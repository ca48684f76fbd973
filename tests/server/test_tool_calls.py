"""Tool calls are found however the answer is cut into pieces, and what is no call stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor.server.tool_calls import CallReader

CALL = '{"name": "look", "arguments": {"at": "<x>"}}'
TAGGED = f"<tool_call>\n{CALL}\n</tool_call>"


def read(pieces: list[str], names: tuple[str, ...] = ("look", "go")) -> tuple[str, list[tuple[str, str]]]:
    reader = CallReader(names)
    text = "".join(map(reader.feed, pieces)) + reader.finish()
    return text, [(call.name, call.arguments) for call in reader.calls]


FOUND = [("look", '{"at": "<x>"}')]


@pytest.mark.parametrize(
    ("answer", "text", "calls"),
    [
        (CALL, "", FOUND),
        (f"\n {CALL}\n", "", FOUND),
        (f"[{CALL}, {CALL}]", "", FOUND * 2),
        ('{"name": "go", "parameters": {"n": 1}}', "", [("go", '{"n": 1}')]),
        ('{"type": "function", "function": {"name": "go", "arguments": "{}"}}', "", [("go", "{}")]),
        ('{"name": "go"}', "", [("go", "{}")]),
        (TAGGED, "", FOUND),
        (f"{TAGGED}\n{TAGGED}", "", FOUND * 2),
        (f"Let me see.\n{TAGGED}", "Let me see.\n", FOUND),
        (f"<tool_call>{CALL}", "", FOUND),
        ("Just text with a < sign", "Just text with a < sign", []),
        ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
        ('{"name": ["look"]}', '{"name": ["look"]}', []),
        ('{"a": 1}', '{"a": 1}', []),
        ("{not json", "{not json", []),
        ("[]", "[]", []),
        ("<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
        ("<tool_cal", "<tool_cal", []),
        ("[" * 100_000, "[" * 100_000, []),
        ("", "", []),
        ("  ", "  ", []),
    ],
)
def test_calls_and_texts(answer: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read([answer]) == (text, calls)
    if len(answer) < 1000:
        assert read(list(answer)) == (text, calls)


@given(
    st.lists(st.sampled_from([TAGGED, "text ", "<tool", "_call>", "{", "\n", "</tool_call>", "é"]), max_size=6),
    st.data(),
)
def test_pieces_do_not_matter(parts: list[str], data: st.DataObject) -> None:
    answer = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    text, calls = read(pieces)
    whole_text, whole_calls = read([answer])
    assert calls == whole_calls
    assert text.split() == whole_text.split()


def test_text_without_tools_is_not_held_back() -> None:
    reader = CallReader(())
    assert reader.feed(CALL) == CALL
    assert reader.calls == []


def test_text_is_shown_as_soon_as_it_is_no_call() -> None:
    reader = CallReader(("look",))
    assert [reader.feed(piece) for piece in ("Hi", " <", "b>", " <tool_", "call>", CALL)] == [
        "Hi",
        " ",
        "<b>",
        " ",
        "",
        "",
    ]
    assert reader.feed("</tool_call>") == ""
    assert json.loads(reader.calls[0].arguments) == {"at": "<x>"}


def test_one_call_where_several_are_not_wanted() -> None:
    said = '<tool_call>{"name": "look", "arguments": {}}</tool_call>\n'
    for parallel, num_calls in ((True, 2), (False, 1)):
        reader = CallReader(("look",), parallel=parallel)
        assert reader.feed(said * 2) + reader.finish() == ""
        assert [call.name for call in reader.calls] == ["look"] * num_calls
    listed = CallReader(("look",), parallel=False)
    assert listed.feed('[{"name": "look"}, {"name": "look"}]') + listed.finish() == ""
    assert len(listed.calls) == 1
