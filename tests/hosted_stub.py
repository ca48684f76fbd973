"""An OpenAI-compatible endpoint for tests, on 127.0.0.1, with the oddities that real ones have, switched on by name."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
END = 1000
"""The token that ends a turn; others are the code points of their characters."""


@dataclass
class Fault:
    """One answer that goes wrong."""

    status: int
    message: str = "it went wrong"
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Stub:
    """What the endpoint does; tests change it as they like."""

    url: str = ""
    answer: Callable[[Json], str] = lambda asked: "fine"
    faults: deque[Fault] = field(default_factory=deque)
    refused: dict[str, str] = field(default_factory=dict)
    """Parameters that are refused, with the code."""
    oddities: set[str] = field(default_factory=set)
    """no_usage, list_content, null_content, no_choices, error_body, html, odd_fields, logprobs, mid_stream_error,
    slow, echo (and /tokenize), no_events, no_finished_model."""
    asked: list[Asked] = field(default_factory=list)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    jobs: dict[str, Json] = field(default_factory=dict)
    states: list[str] = field(default_factory=lambda: ["validating_files", "queued", "running", "succeeded"])
    """What a job's status is, one after the other, each time it is looked at; the last one stays."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def bodies(self, path: str) -> list[Any]:
        """What was posted to a path."""
        return [asked.body for asked in self.asked if asked.method == "POST" and asked.path == path]


@contextmanager
def stub_endpoint() -> Iterator[Stub]:
    """A running stub; its `url` ends in /v1."""
    stub = Stub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub))
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _refusal(stub: Stub, body: Any) -> Fault | None:
    """Of the first parameter that the stub does not take."""
    named = [name for name in stub.refused if isinstance(body, dict) and name in body]
    if not named:
        return None
    return Fault(400, f"Unsupported parameter: '{named[0]}' is not supported", stub.refused[named[0]], named[0])


def _handler(stub: Stub) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - a class whose methods are counted together
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Tests want no log."""

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def _serve(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            path = self.path.split("?")[0]
            headers = {key.lower(): value for key, value in self.headers.items()}
            body = _body(headers.get("content-type", ""), raw)
            with stub.lock:
                stub.asked.append(Asked(self.command, path, headers, body))
                fault = stub.faults.popleft() if stub.faults else None
            fault = fault or _refusal(stub, body)
            if fault is not None:
                error = {"message": fault.message, "type": "x", "param": fault.param, "code": fault.code}
                self._send(fault.status, {"error": error}, fault.headers)
                return
            if "slow" in stub.oddities:
                time.sleep(1.0)
            self._reply(path, _route(stub, self.command, path, body))

        def _reply(self, path: str, found: Json | bytes | list[str] | None) -> None:
            if found is None:
                self._send(404, {"error": {"message": f"no such thing: {path}", "type": "x", "code": "not_found"}})
            elif isinstance(found, bytes):
                self._write(200, found, "application/octet-stream", {})
            elif isinstance(found, list):
                self._write(200, "".join(found).encode(), "text/event-stream", {})
            elif "html" in stub.oddities:
                self._write(200, b"<html>hello</html>", "text/html", {})
            else:
                self._send(200, found)

        def _send(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
            self._write(status, json.dumps(body).encode(), "application/json", headers or {})

        def _write(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
            self.send_response(status)
            more = {"x-request-id": "req_1", "x-ratelimit-remaining-requests": "99", **headers}
            for key, value in {"content-type": kind, "content-length": str(len(content)), **more}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

    return Handler


def _body(kind: str, raw: bytes) -> Any:
    if kind.startswith("multipart/"):
        parts = message_from_bytes(b"content-type: " + kind.encode() + b"\r\n\r\n" + raw)
        return {
            part.get_param("name", header="content-disposition"): (part.get_filename(), part.get_payload(decode=True))
            for part in parts.get_payload()  # type: ignore[union-attr]
        }
    return json.loads(raw) if raw else None


def _route(stub: Stub, method: str, path: str, body: Any) -> Json | bytes | list[str] | None:
    if method == "POST" and path in _POSTS:
        return _POSTS[path](stub, body)
    parts = path.removeprefix("/v1/").split("/")
    if parts[0] == "files" and len(parts) > 1 and parts[1] in stub.files:
        name, content = stub.files[parts[1]]
        return content if parts[2:] == ["content"] else _file(parts[1], name, content)
    if parts[:2] == ["fine_tuning", "jobs"] and len(parts) > 2 and parts[2] in stub.jobs:
        return _job_route(stub, parts[2], parts[3:])
    return None


def _chat(stub: Stub, asked: Json) -> Json | list[str]:
    text = stub.answer(asked)
    if "error_body" in stub.oddities:
        return {"error": {"message": "the provider behind is down", "code": 502}}
    if asked.get("stream"):
        return list(_chunks(stub, text))
    content: Any = text
    if "list_content" in stub.oddities:
        content = [{"type": "text", "text": text[:2]}, {"type": "odd"}, {"type": "text", "text": text[2:]}]
    if "null_content" in stub.oddities:
        content = None
    message: Json = {"role": "assistant", "content": content}
    choice: Json = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    if "logprobs" in stub.oddities:  # top_logprobs are missing
        choice["logprobs"] = {"content": [{"token": c, "logprob": -0.5, "bytes": None} for c in text]}
    if "odd_fields" in stub.oddities:
        choice |= {"finish_reason": "tired", "matched_stop": 7}
        message |= {"reasoning_content": "hm", "provider": {"name": "x"}}
    found: Json = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": asked["model"]}
    found["choices"] = [] if "no_choices" in stub.oddities else [choice]
    if "no_usage" not in stub.oddities:
        found["usage"] = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
        found["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
    return found


def _chunks(stub: Stub, text: str) -> Iterator[str]:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    deltas: list[Json] = [{"role": "assistant", "content": ""}, *({"content": c} for c in text), {}]
    for k, delta in enumerate(deltas):
        if "mid_stream_error" in stub.oddities and k == 3:
            yield f"data: {json.dumps({'error': {'message': 'the engine died', 'code': 'internal_error'}})}\n\n"
            return
        yield ": ping\n\n" + f"data: {json.dumps({**head, 'choices': [{'index': 0, 'delta': delta}]})}\n\n"
    usage = {"prompt_tokens": 10, "completion_tokens": len(text), "total_tokens": 10 + len(text)}
    yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"


def _completions(stub: Stub, asked: Json) -> Json:
    """With echo, the logprob of a token is minus its id over a thousand."""
    logprobs = None
    if asked.get("echo") and "echo" in stub.oddities:
        values = [None, *(-token / 1000 for token in asked["prompt"][1:]), -9.0]
        logprobs = {"tokens": [], "token_logprobs": values, "top_logprobs": [], "text_offset": []}
    choice = {"index": 0, "text": stub.answer(asked), "finish_reason": "length", "logprobs": logprobs}
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "choices": [choice], "usage": usage}


def _tokenize(stub: Stub, asked: Json) -> Json | None:
    """The template `<role>content<end>` and a line break after it, in code points."""
    if "echo" not in stub.oddities:
        return None
    ids: list[int] = []
    for turn in asked["messages"]:
        ids += [ord(turn["role"][0]), *map(ord, turn["content"]), END, 10]
    if asked["add_generation_prompt"]:
        ids.append(ord("a"))
    return {"tokens": ids, "count": len(ids), "max_model_len": 4096}


def _embeddings(stub: Stub, asked: Json) -> Json:
    rows = [
        {"object": "embedding", "index": k, "embedding": [float(len(text)), 1.0]}
        for k, text in enumerate(asked["input"])
    ]
    usage = {"prompt_tokens": 5, "total_tokens": 5}
    return {"object": "list", "model": asked["model"], "data": rows[::-1], "usage": usage}


def _upload(stub: Stub, form: Json) -> Json:
    name, content = form["file"]
    key = f"file-{len(stub.files) + 1}"
    stub.files[key] = (name, content)
    return _file(key, name, content)


def _file(key: str, name: str, content: bytes) -> Json:
    facts = {"id": key, "object": "file", "bytes": len(content), "created_at": 1, "filename": name}
    return {**facts, "purpose": "fine-tune", "status": "processed"}


def _create(stub: Stub, asked: Json) -> Json:
    key = f"ftjob-{len(stub.jobs) + 1}"
    job: Json = {"id": key, "object": "fine_tuning.job", "created_at": 1, "model": asked["model"], "seed": 7}
    job |= {"organization_id": "org", "result_files": [], "status": "queued", "fine_tuned_model": None}
    job |= {"training_file": asked["training_file"], "validation_file": asked.get("validation_file"), "error": None}
    method = asked.get("method") or {"type": "supervised", "supervised": {"hyperparameters": {}}}
    job |= {"method": method, "hyperparameters": method[method["type"]]["hyperparameters"], "looks": 0}
    job |= {"suffix": asked.get("suffix"), "trained_tokens": None, "finished_at": None}
    stub.jobs[key] = job
    return job


def _job_route(stub: Stub, key: str, rest: list[str]) -> Json | None:
    job = stub.jobs[key]
    if rest == ["cancel"]:
        job["status"], stub.states[:] = "cancelled", ["cancelled"]
        return job
    if rest == ["events"]:
        return {"object": "list", "data": [] if "no_events" in stub.oddities else _events(job), "has_more": False}
    if rest:
        return None
    job["status"] = stub.states[min(job["looks"], len(stub.states) - 1)]
    job["looks"] += 1
    if job["status"] in ("succeeded", "Completed") and "no_finished_model" not in stub.oddities:
        job |= {"fine_tuned_model": f"ft:{job['model']}:org:{job['suffix'] or ''}:1a2b3c4d", "trained_tokens": 1234}
    if job["status"] == "failed":
        job["error"] = {"code": "invalid_training_file", "message": "line 3 has no answer", "param": "training_file"}
    return job


def _events(job: Json) -> list[Json]:
    """Newest first, one more at every look."""
    own = {"object": "fine_tuning.job.event", "created_at": 1, "level": "info", "type": "metrics"}
    told = [{**own, "id": f"ftevent-{k}", "message": f"step {k}: loss 0.5"} for k in range(job["looks"])]
    return [{**event, "data": {"step": k, "train_loss": 0.5}} for k, event in enumerate(told)][::-1]


_POSTS: dict[str, Callable[[Stub, Any], Any]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completions,
    "/v1/embeddings": _embeddings,
    "/v1/files": _upload,
    "/v1/fine_tuning/jobs": _create,
    "/tokenize": _tokenize,
}
