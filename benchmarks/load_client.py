"""A small HTTP client for many concurrent streams: one connection per request, server-sent events, early departures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
PATIENCE = 120.0
"""Seconds after which an answer counts as lost."""


@dataclass
class Answer:
    """What came back. `done` is the end that the protocol promises; `failure` what came in its place."""

    status: int = 0
    body: Any = None
    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    tokens: list[Mapping[str, Any]] = field(default_factory=list)
    done: bool = False
    left: bool = False
    failure: str | None = None
    num_chunks: int = 0
    asked_at: float = 0.0
    first_at: float = 0.0
    last_at: float = 0.0


async def ask(port: int, path: str, body: bytes, leave_after: int | None = None) -> Answer:
    """Send a request and read its answer; with `leave_after`, go without a word after so many pieces of text.

    Never raises for what the server does: that stands in the answer's `failure`.
    """
    answer = Answer(asked_at=time.perf_counter())
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                head = f"POST {path} HTTP/1.1\r\nhost: {HOST}:{port}\r\ncontent-type: application/json\r\n"
                writer.write(f"{head}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
                await _read(answer, reader, leave_after)
            finally:
                if answer.left:
                    writer.transport.abort()
                writer.close()
    except TimeoutError:
        answer.failure = f"nothing for {PATIENCE:g} seconds"
    except (OSError, EOFError, ValueError, KeyError) as error:
        answer.failure = f"{type(error).__name__}: {error}"
    return answer


async def get(port: int, path: str) -> bytes:
    """The body of a GET."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"GET {path} HTTP/1.1\r\nhost: {HOST}:{port}\r\nconnection: close\r\n\r\n".encode())
    status, headers = await _head(reader)
    body = b"".join([part async for part in _parts(reader, headers)])
    writer.close()
    if status != 200:
        raise RuntimeError(f"GET {path}: {status} {body[:200]!r}")
    return body


async def _read(answer: Answer, reader: asyncio.StreamReader, leave_after: int | None) -> None:
    if leave_after == 0:
        answer.left = True
        return
    answer.status, headers = await _head(reader)
    if not headers.get("content-type", "").startswith("text/event-stream"):
        answer.body = json.loads(b"".join([part async for part in _parts(reader, headers)]))
        answer.done = True
        if answer.status == 200:
            _take_whole(answer)
        return
    async for event in _events(reader, headers):
        if event == b"[DONE]":
            answer.done = True
            return
        _take(answer, json.loads(event))
        if leave_after is not None and answer.num_chunks >= leave_after:
            answer.left = True
            return


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status and the headers."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value for name, value in headers.items()}


async def _parts(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes; raises EOFError when it is cut."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


async def _events(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The data of server-sent events; comments are heartbeats."""
    held = b""
    async for part in _parts(reader, headers):
        *events, held = (held + part).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event.removeprefix(b"data: ")


def _take(answer: Answer, chunk: Mapping[str, Any]) -> None:
    """One chunk of a stream."""
    if "error" in chunk:
        answer.failure = f"error event: {chunk['error']['code']}: {chunk['error']['message']}"
        return
    answer.usage = chunk.get("usage") or answer.usage
    for choice in chunk["choices"]:
        if text := choice["delta"].get("content"):
            answer.last_at = time.perf_counter()
            answer.first_at = answer.first_at or answer.last_at
            answer.num_chunks += 1
            answer.text += text
        answer.tokens += (choice.get("logprobs") or {}).get("content") or ()
        answer.finish_reason = choice["finish_reason"] or answer.finish_reason


def _take_whole(answer: Answer) -> None:
    """An answer that came as one."""
    (choice,) = answer.body["choices"]
    answer.text = choice["message"]["content"] or ""
    answer.finish_reason, answer.usage = choice["finish_reason"], answer.body["usage"]
    answer.tokens = list((choice["logprobs"] or {}).get("content") or ())
