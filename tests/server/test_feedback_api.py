"""Recording chats and saying what one thinks of them, over HTTP."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import openai
import pytest
from live_jobs import served
from scripted_service import BASE, TUNED, ScriptedService

from tailor.feedback.feedback import FeedbackLog
from tailor.feedback.journal import Damage
from tailor.feedback.redact import redactor
from tailor.feedback.traffic import Traffic
from tailor.server.app import create_app
from tailor.server.feedback import feedback_router, recorder, server_traffic
from tailor.server.settings import ServerSettings


class Answer(NamedTuple):
    """What came back over the wire."""

    status: int
    headers: http.client.HTTPMessage
    body: dict[str, Any]


class Live(NamedTuple):
    url: str
    key: str
    client: openai.OpenAI
    traffic: Traffic | None
    log: FeedbackLog

    def chat(self, text: str, **more: Any) -> str:
        """Its id."""
        messages: Any = [{"role": "user", "content": text}]
        answer = self.client.chat.completions.create(model=TUNED, messages=messages, temperature=0, **more)
        return str(answer.id)

    def send(self, method: str, path: str, body: bytes | None = None, key: str | None = None) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        headers = {"authorization": f"Bearer {key or self.key}", "content-type": "application/json"}
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, json.loads(response.read()))
        finally:
            connection.close()

    def say(self, completion_id: str, kind: str, **more: Any) -> Answer:
        body = {"completion_id": completion_id, "kind": kind, **more}
        return self.send("POST", "/v1/feedback", json.dumps(body).encode())

    def said(self, completion_id: str) -> Answer:
        return self.send("GET", f"/v1/feedback?completion_id={quote(completion_id, safe='')}")


def live_server(folder: Path, **chosen: Any) -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(folder))
        settings = ServerSettings(port=0, grace=0.2, **chosen)
        log = FeedbackLog(redact=redactor(settings.redact))
        traffic = server_traffic(settings, lambda model: None if model == BASE else "summaries")
        record = None if traffic is None else recorder(traffic)
        app = create_app(ScriptedService(), settings, routers=[feedback_router(log, traffic)], record=record)
        key = (chosen.get("api_keys") or ("none",))[0]
        with (
            served(app) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
        ):
            yield Live(url, key, client, traffic, log)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from live_server(tmp_path_factory.mktemp("recording"), record=True, redact=("email",), api_keys=("secret",))


@pytest.fixture
def unrecorded(tmp_path: Path) -> Iterator[Live]:
    yield from live_server(tmp_path)


def error_of(answer: Answer) -> dict[str, Any]:
    assert answer.headers["x-request-id"]
    return dict(answer.body["error"])


def test_only_what_is_stored_is_recorded(live: Live) -> None:
    assert live.traffic is not None
    kept = live.chat("Hello, I am a@b.example", store=True, n=2, metadata={"page": "7"}, user="me")
    assert live.traffic.find(live.chat("Hello")) is None
    found = live.traffic.find(kept)
    assert found is not None
    assert (found.model, found.artifact, found.principal) == (TUNED, "summaries", "given")
    assert found.messages == ({"role": "user", "content": "Hello, I am [EMAIL]"},)
    assert [choice.message["content"] for choice in found.choices] == ["You said: Hello, I am [EMAIL]"] * 2
    assert found.params == {"temperature": 0, "n": 2, "metadata": {"page": "7"}, "user": "me"}
    assert found.usage["total_tokens"] > 0


def test_streams_are_recorded_whole(live: Live) -> None:
    assert live.traffic is not None
    messages: Any = [{"role": "user", "content": "Grüße"}]
    events = live.client.chat.completions.create(model=TUNED, messages=messages, temperature=0, stream=True, store=True)
    (completion_id,) = {event.id for event in events}
    found = live.traffic.find(completion_id)
    assert found is not None
    assert found.choices[0].message["content"] == "You said: Grüße"
    assert found.choices[0].finish_reason == "stop"
    assert "stream" not in found.params


def test_feedback_comes_back_with_what_supersedes_it(live: Live) -> None:
    chat_id = live.chat("Hello", store=True, n=2)
    first = live.say(chat_id, "vote", vote="down", choice=1)
    assert first.status == 200
    told = first.body
    assert told.pop("id").startswith("fb-")
    assert told.pop("created_at") > 1_700_000_000
    assert told == {
        "object": "feedback",
        "completion_id": chat_id,
        "choice": 1,
        "kind": "vote",
        "vote": "down",
        "preferred": None,
        "content": None,
        "rating": None,
        "attributes": None,
        "author": "given",
        "superseded": False,
    }
    for kind, values in (
        ("vote", {"vote": "up", "choice": 1}),
        ("vote", {"vote": "down", "choice": 1, "author": "bob"}),
        ("vote", {"preferred": 0}),
        ("edit", {"content": "Write to a@b.example"}),
        ("rating", {"rating": 5}),
        ("rating", {"attributes": {"helpfulness": 4, "verbosity": 0}}),
    ):
        assert live.say(chat_id, kind, **values).status == 200
    listed = live.said(chat_id).body
    assert listed["object"] == "list"
    assert [each["superseded"] for each in listed["data"]] == [True, False, False, False, False, True, False]
    assert listed["data"][4]["content"] == "Write to [EMAIL]"
    assert listed["data"][6]["attributes"] == {"helpfulness": 4, "verbosity": 0}
    assert len(list(live.log.journal.lines())) >= 7


@pytest.mark.parametrize(
    ("kind", "values", "status", "param"),
    [
        ("veto", {}, 400, "kind"),
        ("vote", {}, 400, "vote"),
        ("vote", {"vote": "sideways"}, 400, "vote"),
        ("vote", {"vote": "up", "choice": 1}, 400, "choice"),
        ("vote", {"vote": "up", "choice": -1}, 400, "choice"),
        ("vote", {"preferred": 0}, 400, "preferred"),
        ("edit", {"content": ""}, 400, "content"),
        ("edit", {"content": "x", "rating": 3}, 400, "rating"),
        ("rating", {"rating": 6}, 400, "rating"),
        ("rating", {"rating": 10**400}, 400, "rating"),
        ("rating", {"rating": 4.5}, 400, "rating"),
        ("rating", {"attributes": {"helpfullness": 3}}, 400, "attributes"),
        ("rating", {"atributes": {}}, 400, "atributes"),
        ("vote", {"vote": "up", "author": ""}, 400, "author"),
        ("vote", {"vote": "up", "completion_id": "chatcmpl-unheard"}, 404, "completion_id"),
        ("vote", {"vote": "up", "completion_id": 'a","x":"\n'}, 404, "completion_id"),
    ],
)
def test_what_makes_no_sense_is_refused_in_the_envelope(
    live: Live, kind: str, values: dict[str, Any], status: int, param: str
) -> None:
    chat_id = live.chat("Hello", store=True)
    response = live.say(values.pop("completion_id", chat_id), kind, **values)
    assert response.status == status, response.body
    error = error_of(response)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert live.log.of(chat_id) == []


def test_feedback_on_unknown_completions(live: Live, unrecorded: Live) -> None:
    response = live.said("chatcmpl-unheard")
    assert response.status == 404
    assert error_of(response)["code"] == "completion_not_found"
    assert error_of(live.send("GET", "/v1/feedback"))["param"] == "completion_id"
    # where nothing is recorded, the chats may be recorded elsewhere
    assert unrecorded.say("chatcmpl-elsewhere", "vote", vote="up").status == 200
    assert len(unrecorded.said("chatcmpl-elsewhere").body["data"]) == 1


def test_a_key_is_needed(live: Live) -> None:
    assert live.send("POST", "/v1/feedback", b"{}", key="wrong").status == 401


def test_nothing_is_recorded_unless_the_server_is_told_to(unrecorded: Live, tmp_path: Path) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = unrecorded.client.chat.completions.with_raw_response.create(model=BASE, messages=messages, store=True)
    assert answer.headers["x-ignored-params"] == "store"
    assert not (tmp_path / "traffic").exists()


def test_all_are_recorded_when_it_is(tmp_path: Path) -> None:
    for live in live_server(tmp_path, record_all=True):
        assert live.traffic is not None
        chat_id = live.chat("Hello")
        assert live.traffic.find(chat_id) is not None
        assert not any(isinstance(each, Damage) for each in live.traffic.exchanges())


def test_an_answer_is_given_when_it_cannot_be_recorded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "traffic").write_text("a file where the folder should be")
    for live in live_server(tmp_path, record=True):
        chat_id = live.chat("Hello", store=True)
    assert f"{chat_id} was not recorded" in capfd.readouterr().err


def test_bodies_that_are_no_json(live: Live) -> None:
    response = live.send("POST", "/v1/feedback", b"{")
    assert (response.status, error_of(response)["code"]) == (400, "invalid_json")
    assert live.send("POST", "/v1/feedback", b'{"completion_id": "\\ud800", "kind": "vote"}').status == 400
