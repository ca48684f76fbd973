"""The traffic log: what of a chat is kept, what is not, and how it is found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recorded_chats import told
from tailor.errors import ConfigError
from tailor.feedback.journal import Damage
from tailor.feedback.traffic import Choice, Exchange, Traffic, TrafficSettings, open_traffic


@pytest.fixture
def settings(tmp_path: Path) -> TrafficSettings:
    return TrafficSettings(folder=tmp_path / "traffic", max_record_bytes=4096)


def raw(traffic: Traffic) -> list[dict[str, Any]]:
    return [json.loads(line) for path in traffic.journal.files() for line in path.read_text("utf-8").splitlines()]


def test_a_chat_comes_back(settings: TrafficSettings) -> None:
    traffic = open_traffic(settings, artifact_of={"ft:x": "moods-2"}.get)
    tool = {"type": "function", "function": {"name": "f"}}
    chat = told("chatcmpl-1", "hi", "hello", "hey", model="ft:x", tools=[tool], seed=3, stream=True, user=None)
    traffic.record(chat)
    assert traffic.find("chatcmpl-1") == Exchange(
        id="chatcmpl-1",
        time=1_790_000_000,
        model="ft:x",
        artifact="moods-2",
        principal="key-1",
        messages=({"role": "user", "content": "hi"},),
        tools=(tool,),
        params={"seed": 3},
        choices=tuple(
            Choice(k, {"role": "assistant", "content": text, "refusal": None, "annotations": []}, "stop")
            for k, text in enumerate(("hello", "hey"))
        ),
        num_choices=2,
        usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    )
    assert traffic.find("chatcmpl-") is None
    assert traffic.find("chatcmpl-2") is None
    (entry,) = raw(traffic)
    assert entry["schema_version"] == 1
    assert entry["fingerprint"] == "fp_1"


def test_older_functions_become_tools(settings: TrafficSettings) -> None:
    traffic = open_traffic(settings)
    traffic.record(told("a", "hi", "hello", functions=[{"name": "f"}]))
    found = traffic.find("a")
    assert found is not None
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)


def test_what_is_private_never_reaches_the_disk(settings: TrafficSettings) -> None:
    traffic = open_traffic(settings.model_copy(update={"redact": ("email", "(?P<city>Berlin)")}))
    call = {"id": "call_1", "type": "function", "function": {"name": "mail", "arguments": '{"to": "a@b.example"}'}}
    asked = [{"role": "user", "content": "I am a@b.example from Berlin"}]
    traffic.record(told("a", asked, "Hello a@b.example", {"tool_calls": [call]}, user="a@b.example"))
    (path,) = traffic.journal.files()
    assert b"a@b" not in path.read_bytes()
    (entry,) = raw(traffic)
    assert entry["messages"][0]["content"] == "I am [EMAIL] from [CITY]"
    assert entry["choices"][0]["message"]["content"] == "Hello [EMAIL]"
    assert json.loads(entry["choices"][1]["message"]["tool_calls"][0]["function"]["arguments"]) == {"to": "[EMAIL]"}
    assert entry["params"] == {"user": "[EMAIL]"}
    assert entry["id"] == "a"


def test_a_hook_sees_the_entry_and_may_refuse_it(settings: TrafficSettings) -> None:
    def hook(entry: dict[str, Any]) -> dict[str, Any] | None:
        return None if entry["principal"] == "key-1" else {"note": "seen", **entry}

    traffic = Traffic(settings, redact=hook)
    traffic.record(told("a", "hi", "hello"))
    traffic.record({**told("b", "hi", "hello"), "principal": "key-2"})
    assert [each.id for each in traffic.exchanges() if isinstance(each, Exchange)] == ["b"]
    assert traffic.find("b") is not None


def test_a_chat_that_is_too_large_is_noted(settings: TrafficSettings) -> None:
    traffic = open_traffic(settings)
    traffic.record(told("a", "x" * 5000, "hello", "hey"))
    (path,) = traffic.journal.files()
    assert path.stat().st_size < 4096
    found = traffic.find("a")
    assert found is not None
    assert (found.messages, found.choices, found.num_choices) == ((), (), 2)
    assert found.num_bytes is not None
    assert found.num_bytes > 5000


def test_lines_that_are_no_chats_are_said_with_their_place(settings: TrafficSettings) -> None:
    traffic = open_traffic(settings)
    traffic.record(told("a", "hi", "hello"))
    (path,) = traffic.journal.files()
    with path.open("a") as file:
        file.write('{"id": "b", "schema_version": 1}\n{"id": "c", "schema_version": 2}\n{"id": "d"')
    first, *rest = traffic.exchanges()
    assert isinstance(first, Exchange)
    assert first.place == f"{path}:1"
    assert [(each.place, each.reason[:11]) for each in rest if isinstance(each, Damage)] == [
        (f"{path}:2", "not a recor"),
        (f"{path}:3", "its schema_"),
        (f"{path}:4", "not JSON: E"),
    ]


def test_the_folder_is_under_home(own_home: Path) -> None:
    traffic = open_traffic()
    traffic.record(told("a", "hi", "hello"))
    assert [path.parent for path in traffic.journal.files()] == [own_home / "traffic"]
    with pytest.raises(ConfigError):
        open_traffic(TrafficSettings(redact=("emails",)))
