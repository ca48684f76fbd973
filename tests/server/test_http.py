"""What goes over the wire, without a client in between: envelopes, guards, events, and how a server stops."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from live_server import Live, start
from prometheus_client.parser import text_string_to_metric_families
from scripted_service import BASE, TUNED, ScriptedService

from tailor.server.auth import KeyRing

Serve = Callable[..., Live]
CHAT = "/v1/chat/completions"


def send(live: Live, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, data, {"content-type": "application/json", **named})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "unknown_url"),
        ("PUT", CHAT, {}, 405, "method_not_supported"),
        ("POST", CHAT, b"{", 400, "invalid_json"),
        ("POST", CHAT, b"", 400, "missing_required_parameter"),
        ("POST", CHAT, {}, 400, "missing_required_parameter"),
        ("POST", CHAT, [], 400, "invalid_type"),
        ("POST", CHAT, b"[" * 100_000, 400, None),
        ("POST", CHAT, b'{"model": "\\ud800"}', 400, "invalid_value"),
        ("POST", CHAT, b'{"model": 1e999}', 400, None),
        ("GET", "/v1/models/nothing", None, 404, "model_not_found"),
        ("POST", "/v1/embeddings", {"model": BASE}, 400, "missing_required_parameter"),
    ],
)
def test_every_error_has_the_envelope(live: Live, method: str, path: str, body: Any, status: int, code: Any) -> None:
    found, headers, text = send(live, method, path, body)
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert found == status
    assert code is None or error["code"] == code
    assert headers["x-request-id"].startswith("req_")


def test_other_content_types_are_named(live: Live) -> None:
    status, _, text = send(live, "POST", CHAT, b"a=b", content_type="application/x-www-form-urlencoded")
    assert (status, json.loads(text)["error"]["code"]) == (415, "unsupported_media_type")


def test_a_trailing_slash_is_the_same_route(live: Live) -> None:
    assert send(live, "POST", CHAT + "/", chat("x"))[0] == 200
    assert send(live, "GET", "/v1/models/")[0] == 200
    assert send(live, "GET", "/v1/models/org%2Fname@v1")[0] == 200
    assert send(live, "GET", f"/v1/models/{TUNED}")[0] == 200


def test_large_bodies_are_refused_while_they_come(serve: Serve) -> None:
    live = serve(max_body_bytes=1000)
    status, headers, text = send(live, "POST", CHAT, chat("x" * 2000))
    assert (status, json.loads(text)["error"]["code"]) == (413, "request_too_large")
    assert "x-request-id" in headers
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as raw:
        start = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        raw.sendall(start.encode() + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            raw.sendall(b"1f4\r\n" + b" " * 500 + b"\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 413")
    assert send(live, "POST", CHAT, chat("x"))[0] == 200


def test_keys_open_what_their_scopes_say(serve: Serve, tmp_path: Any) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    talking, key = ring.create("me", ["inference"])
    live = serve(keys_file=tmp_path / "keys.json", api_keys=("all-rights",), host="0.0.0.0")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {talking}"}, {"api_key": "wrong"}):
        status, answered, text = send(live, "GET", "/v1/models", **headers)
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        assert answered["www-authenticate"] == "Bearer"
    mine = {"authorization": f"Bearer {talking}"}
    assert send(live, "GET", "/v1/models", **mine)[0] == 200
    assert send(live, "GET", "/v1/models", api_key=talking)[0] == 200
    assert send(live, "POST", CHAT, chat("x"), host="my-server.example:80", **mine)[0] == 200
    assert send(live, "GET", "/health")[0] == 200
    for method, path in (("DELETE", f"/v1/models/{TUNED}"), ("POST", "/v1/unload_lora_adapter"), ("GET", "/v1/files")):
        status, _, text = send(live, method, path, **mine)
        assert (status, json.loads(text)["error"]["code"]) == (403, "insufficient_scope")
    assert send(live, "DELETE", f"/v1/models/{TUNED}", authorization="Bearer all-rights")[0] == 200
    ring.revoke(key.key_id)
    assert send(live, "GET", "/v1/models", **mine)[0] == 401


def test_foreign_pages_are_kept_out(serve: Serve) -> None:
    live = serve(allowed_hosts=("box.lan",))
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::1"):
        status, _, text = send(live, "GET", "/v1/models", host=host)
        assert (status, json.loads(text)["error"]["code"]) == (403, "host_not_allowed")
    for host in ("localhost", "127.0.0.1:99", "[::1]:8000", "box.lan", "BOX.lan:80"):
        assert send(live, "GET", "/v1/models", host=host)[0] == 200
    status, headers, text = send(live, "GET", "/v1/models", origin="https://evil.example")
    assert (status, json.loads(text)["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in headers
    assert send(live, "GET", "/v1/models", host="localhost:80", origin="http://localhost:80")[0] == 200


def test_pages_that_are_named_may_call(serve: Serve) -> None:
    live = serve(cors_origins=("https://app.example",), api_keys=("secret",))
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,x-stainless-os"}
    status, headers, _ = send(live, "OPTIONS", CHAT, origin="https://app.example", **asked)
    assert status == 200
    assert headers["access-control-allow-origin"] == "https://app.example"
    assert "x-stainless-os" in headers["access-control-allow-headers"]
    mine = {"authorization": "Bearer secret", "origin": "https://app.example"}
    status, headers, _ = send(live, "GET", "/v1/models", **mine)
    assert status == 200
    assert "x-request-id" in headers["access-control-expose-headers"].lower()


def test_events_are_framed_and_hearts_beat(serve: Serve) -> None:
    live = serve(ScriptedService(pause=0.12), heartbeat=0.03)
    status, headers, text = send(live, "POST", CHAT, chat("slowly", stream=True, max_tokens=2))
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert "content-length" not in headers
    events = text.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert ": ping" in events
    assert all(event == ": ping" or event.startswith("data: ") for event in events[:-1])


def test_an_error_in_the_middle_is_an_event_and_the_end(live: Live, capfd: pytest.CaptureFixture[str]) -> None:
    status, _, text = send(live, "POST", CHAT, chat("fail midway", stream=True))
    assert status == 200
    last = text.decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in text.decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answers(live: Live, stream: bool) -> None:
    text = f"hang {stream}"
    body = json.dumps(chat(text, stream=stream, n=2)).encode()
    start = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as raw:
        raw.sendall(f"{start}content-length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: len(live.service.running) == 2)
        if stream:
            assert raw.recv(20).startswith(b"HTTP/1.1 200")
    until(lambda: live.service.cancelled.count(text) == 2)
    assert not live.service.running


def test_a_stop_lets_answers_end_or_cuts_them(serve: Serve) -> None:
    live = serve(grace=0.3)
    results: dict[str, tuple[int, dict[str, str], bytes]] = {}
    asked = {
        "ends": chat("slowly", max_tokens=5),
        "hang stream": chat("hang", stream=True),
        "hang whole": chat("hang"),
    }

    def ask(name: str) -> None:
        results[name] = send(live, "POST", CHAT, asked[name])

    threads = [threading.Thread(target=ask, args=(name,)) for name in asked]
    for thread in threads:
        thread.start()
    until(lambda: len(live.service.requests) == 3)
    live.stop()
    for thread in threads:
        thread.join(10)
    assert results["ends"][0] == 200
    last = results["hang stream"][2].decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_stopped"
    assert results["hang whole"][0] == 503
    assert live.service.closed
    assert not live.service.running


def test_health_readiness_and_counts(live: Live) -> None:
    assert json.loads(send(live, "GET", "/health")[2]) == {"status": "ok"}
    assert json.loads(send(live, "GET", "/ready")[2]) == {"status": "ready"}
    send(live, "GET", f"/v1/models/{BASE}")
    send(live, "GET", "/v1/nothing/of/the/kind")
    text = send(live, "GET", "/metrics")[2].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    counted = {tuple(s.labels.values()): s.value for s in families["tailor_http_requests"].samples}
    assert counted["/v1/models/{model:path}", "GET", "200"] >= 1
    assert counted["other", "other", "404"] >= 1
    assert families["tailor_tokens_generated"].samples[0].value == 12
    buckets = [s for s in families["tailor_http_request_seconds"].samples if s.labels.get("le") == "+Inf"]
    assert sum(bucket.value for bucket in buckets) == sum(counted.values())
    live.server.state.readiness.stopping = True
    assert send(live, "GET", "/ready")[0] == 503
    live.server.state.readiness.stopping = False
    live.service.alive = False
    assert send(live, "GET", "/ready")[0] == 503
    live.service.alive = True


def test_tokenize_and_back(live: Live) -> None:
    made = json.loads(send(live, "POST", "/tokenize", {"model": BASE, "prompt": "hé", "return_token_strs": True})[2])
    assert made["tokens"] == list("hé".encode())
    assert made["count"] == 3
    assert len(made["token_strs"]) == 3
    back = send(live, "POST", "/detokenize", {"model": BASE, "tokens": made["tokens"]})[2]
    assert json.loads(back) == {"prompt": "hé"}
    messages = [{"role": "user", "content": "a"}]
    made = json.loads(send(live, "POST", "/tokenize", {"model": BASE, "messages": messages})[2])
    assert bytes(made["tokens"]) == b"user: a\n"
    assert send(live, "POST", "/tokenize", {"model": BASE})[0] == 400
    assert send(live, "POST", "/detokenize", {"model": BASE, "tokens": [1 << 30]})[0] == 400


def test_adapters_come_from_their_folders_only(serve: Serve, own_home: Any, tmp_path: Any) -> None:
    (own_home / "artifacts" / "mine").mkdir(parents=True)
    (own_home / "artifacts" / "out").symlink_to("/etc")
    (tmp_path / "allowed" / "other").mkdir(parents=True)
    live = serve(adapter_folders=(tmp_path / "allowed",))

    def load(path: str | None) -> tuple[int, bytes]:
        body = {"lora_name": "new"} if path is None else {"lora_name": "new", "lora_path": path}
        status, _, text = send(live, "POST", "/v1/load_lora_adapter", body)
        return status, text

    for path in (None, "mine", str(own_home / "artifacts" / "mine"), str(tmp_path / "allowed" / "other")):
        assert load(path) == (200, b"Success: LoRA adapter 'new' added successfully.")
    outside = ("/etc", "..", "../../..", "out", ".", "mine/../../..", str(tmp_path), "a\0b", "x" * 5000)
    for path in outside:
        assert load(path)[0] in (400, 403), path
    status, text = load("missing")
    assert status == 404
    assert str(own_home).encode() not in text
    assert send(live, "POST", "/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    status, _, text = send(live, "POST", "/v1/unload_lora_adapter", {"lora_name": BASE})
    assert (status, json.loads(text)["error"]["code"]) == (403, "base_model_protected")


def test_chats_are_recorded_when_asked_to() -> None:
    kept: list[Any] = []
    live = start(ScriptedService(), kept.append)
    try:
        send(live, "POST", CHAT, chat("not me"))
        whole = json.loads(send(live, "POST", CHAT, chat("me", store=True, metadata={"k": "v"}))[2])
        send(live, "POST", CHAT, chat("me too", store=True, stream=True))
    finally:
        live.stop()
    assert [entry["request"]["messages"][0]["content"] for entry in kept] == ["me", "me too"]
    assert kept[0]["response"] == whole
    assert kept[0]["request"]["metadata"] == {"k": "v"}
    assert kept[1]["response"]["choices"][0]["message"]["content"] == "You said: me too"
    assert kept[1]["principal"] == "local"
