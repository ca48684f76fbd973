"""Chats as a server tells them to the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def told(
    completion_id: str,
    question: str | Sequence[dict[str, Any]],
    *answers: str | dict[str, Any],
    at: int = 1_790_000_000,
    model: str = "moods",
    finish_reason: str = "stop",
    **request: Any,
) -> dict[str, Any]:
    """{"request", "response", "principal"} of a chat with these answers."""
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    said = [{"content": answer} if isinstance(answer, str) else answer for answer in answers]
    return {
        "request": {"model": model, "messages": messages, "store": True, **request},
        "response": {
            "id": completion_id,
            "object": "chat.completion",
            "created": at,
            "model": model,
            "system_fingerprint": "fp_1",
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": None, "refusal": None, "annotations": [], **message},
                    "finish_reason": finish_reason,
                    "logprobs": {"content": []},
                }
                for index, message in enumerate(said)
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        },
        "principal": "key-1",
    }
