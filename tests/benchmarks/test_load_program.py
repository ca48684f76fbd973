"""benchmarks/load_test.py: what counts as lost, truncated, mixed up; how the sums are compared. No load is made."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def tally_module() -> ModuleType:
    return importlib.import_module("load_tally")


@pytest.fixture
def client() -> ModuleType:
    return importlib.import_module("load_client")


ONE, OTHER = ("one", 0), ("other", 0)


def known(module: ModuleType, doubtful: float = float("inf")) -> Any:
    own = module.Known("grüße to you", "stop", 7, 5, doubtful)
    return {ONE: own, OTHER: module.Known("grüße to me", "stop", 7, 5, float("inf"))}


def answer(client: ModuleType, text: str, completion: int = 5, **more: Any) -> Any:
    details = {"cached_tokens": 2}
    usage = {"prompt_tokens": 7, "completion_tokens": completion, "prompt_tokens_details": details}
    return client.Answer(**{"status": 200, "text": text, "finish_reason": "stop", "usage": usage, "done": True, **more})


@pytest.mark.parametrize(
    ("text", "more", "doubtful", "outcome"),
    [
        ("grüße to you", {}, float("inf"), "ok"),
        ("grüße to you", {"completion": 4}, float("inf"), "wrong"),
        ("grüße to", {}, float("inf"), "truncated"),
        ("", {}, float("inf"), "truncated"),
        ("grüße to me", {}, float("inf"), "mixed_up"),
        ("grüße to us", {}, float("inf"), "wrong"),
        ("grüße to us", {}, 11.0, "near_tie"),
        ("grüße to us", {}, 12.0, "wrong"),
        ("grüße to you", {"done": False}, float("inf"), "lost"),
        ("grüße to you", {"finish_reason": None}, float("inf"), "lost"),
        ("grüße to you", {"usage": None}, 0.0, "lost"),
    ],
)
def test_an_answer_is_judged(
    tally_module: ModuleType, client: ModuleType, text: str, more: dict[str, Any], doubtful: float, outcome: str
) -> None:
    """`grüße to ` has 11 bytes."""
    found = answer(client, text, **more)
    assert tally_module.judge(found, ONE, known(tally_module, doubtful)) == outcome


def test_the_first_close_call_is_found(tally_module: ModuleType) -> None:
    def token(text: str, gap: float) -> dict[str, Any]:
        return {"bytes": list(text.encode()), "top_logprobs": [{"logprob": -0.5}, {"logprob": -0.5 - gap}]}

    assert tally_module.doubtful_from([token("grü", 1.0), token("ße", 2e-4), token("!", 0.9e-4), token("!", 0.0)]) == 7
    assert tally_module.doubtful_from([token("a", 1.0)]) == float("inf")


def test_departures_leave_room_in_the_sums(tally_module: ModuleType, client: ModuleType) -> None:
    tally = tally_module.Tally(known(tally_module))
    tally.count("greedy", ONE, answer(client, "grüße to you"))
    tally.count("departing", OTHER, answer(client, "grü", left=True, num_chunks=1))
    counts = {"requests": 2, "finished": 1, "cancelled": 1, "failed": 0, "prompt_tokens": 7, "cached_tokens": 2}
    counts |= {"generated_tokens": 8, "kv_bytes_used": 0, "running": 0, "waiting": 0}
    metrics: dict[str, float] = {f"tailor_{name}": value for name, value in counts.items()}
    sums = tally_module.accounts(tally, metrics)
    assert all(least <= found <= most for least, found, most in sums.values())
    assert sums["generated tokens"] == [6, 8, 10]
    assert sums["requests"] == [2, 2, 2]
    metrics["tailor_generated_tokens"] = 11
    metrics['tailor_http_requests_total{route="r",method="POST",status="400"}'] = 1
    metrics['tailor_http_requests_total{route="r",method="POST",status="499"}'] = 5
    sums = tally_module.accounts(tally, metrics)
    wrong = [name for name, (least, found, most) in sums.items() if not least <= found <= most]
    assert wrong == ["generated tokens", "answers 4xx"]


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PIECE = b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
FAILED = b'data: {"error":{"code":"unavailable","message":"no"}}\n\ndata: [DONE]\n\n'


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


def asked(client: ModuleType, reply: bytes, leave_after: int | None = None) -> Any:
    """What the client makes of a reply."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    async def ask(serve: Callable[..., Awaitable[None]]) -> Any:
        async with await asyncio.start_server(serve, client.HOST, 0) as server:
            return await client.ask(server.sockets[0].getsockname()[1], "/", b"{}", leave_after)

    return asyncio.run(ask(serve))


def test_streams_are_read_however_they_are_cut(client: ModuleType) -> None:
    whole = PIECE + b": ping\n\n" + PIECE + LAST
    for size in (1, 7, len(whole)):
        parts = [whole[k : k + size] for k in range(0, len(whole), size)]
        found = asked(client, HEAD + chunked(*parts, b""))
        assert (found.text, found.finish_reason, found.done, found.failure) == ("aa", "stop", True, None)
        assert found.num_chunks == 2


def test_what_does_not_end_is_not_done(client: ModuleType) -> None:
    cut = asked(client, HEAD + chunked(PIECE))
    assert (cut.text, cut.done) == ("a", False)
    assert "IncompleteReadError" in cut.failure
    failed = asked(client, HEAD + chunked(PIECE, FAILED, b""))
    assert failed.failure == "error event: unavailable: no"
    assert asked(client, b"").failure is not None
    left = asked(client, HEAD + chunked(PIECE, PIECE, LAST, b""), leave_after=1)
    assert (left.left, left.num_chunks, left.done) == (True, 1, False)
