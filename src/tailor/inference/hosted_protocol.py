"""Requests as an OpenAI-compatible endpoint wants them, and its answers with all their oddities."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tailor.errors import ConfigError, require
from tailor.inference.backend import FinishReason, Request, SamplingParams
from tailor.inference.hosted_endpoint import DEFAULT_URL, Endpoint
from tailor.text.messages import Message

MAX_STOPS = 4
"""Stop texts that the protocol takes; those beyond are cut off here."""

LENGTHS = ("max_completion_tokens", "max_tokens")
"""The field's name at OpenAI, whose newer models refuse the other, and the one that every endpoint knows."""

OPTIONAL = ("temperature", "seed")
"""What an endpoint may refuse without the question being another one."""

EXTENSIONS = {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "ignore_stop": "ignore_eos",
}
"""Our settings that OpenAI's protocol has no field for, by the name that vLLM gives them."""

REFUSED = ("unsupported_parameter", "unsupported_value")

PENALTIES = ("presence_penalty", "frequency_penalty")

Answer = TypeVar("Answer")


class Wire:
    """How one endpoint wants to be asked; it learns from refusals. `notes` say what it would not take."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.notes: list[str] = []
        self._length = LENGTHS[0] if endpoint.url == DEFAULT_URL else LENGTHS[1]
        self._left_out: set[str] = set()

    def note(self, text: str) -> None:
        """Remember a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def arguments(self, request: Request) -> dict[str, Any]:
        """The arguments of the client's `create` beside model and messages. What has its default is not sent.

        Raises ConfigError for what the protocol cannot say.
        """
        sampling = request.sampling
        length = "max_tokens" if request.prompt is not None else self._length
        how: dict[str, Any] = {length: sampling.max_new_tokens, "temperature": sampling.temperature}
        if sampling.temperature > 0:
            how |= {"seed": sampling.seed} | ({"top_p": sampling.top_p} if sampling.top_p < 1 else {})
        how |= {name: value for name in PENALTIES if (value := getattr(sampling, name))}
        if sampling.stop:
            how["stop"] = list(sampling.stop[:MAX_STOPS])
        if sampling.logit_bias:
            how["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
        if sampling.num_top_logprobs:
            many = sampling.num_top_logprobs
            how |= {"logprobs": many} if request.prompt is not None else {"logprobs": True, "top_logprobs": many}
        if request.tools:
            how["tools"] = [dict(tool) for tool in request.tools]
        if sampling.structure is not None:
            how["response_format"] = _response_format(sampling, self.endpoint.name)
        if extra := _extensions(sampling):
            how["extra_body"] = extra
        return {name: value for name, value in how.items() if name not in self._left_out}

    def sent(self, send: Callable[[], Answer], sampling: SamplingParams) -> Answer:
        """Send, and once more without, or with another name for, what the endpoint refuses."""
        openai = require("openai", "hosted")
        for _ in range(len(OPTIONAL) + 1):
            try:
                return send()
            except openai.BadRequestError as error:
                if not self._adapted(error, sampling):
                    raise
        return send()

    def _adapted(self, error: Any, sampling: SamplingParams) -> bool:
        """Whether the refusal is of something that can be said otherwise."""
        name = error.param or next((n for n in (*LENGTHS, *OPTIONAL) if f"'{n}'" in str(error.message)), None)
        if error.code not in REFUSED and not (error.code is None and "support" in str(error.message)):
            return False
        if name == self._length and error.code != "unsupported_value":
            self._length = LENGTHS[1 - LENGTHS.index(name)]
            return True
        if name in OPTIONAL:
            self._left_out.add(name)  # several threads may be refused before the first has learned it
            value = getattr(sampling, name)
            self.note(f"{self.endpoint.name} does not take {name} {value:g}: its own default is used")
            return True
        return name in LENGTHS and name != self._length  # another thread has learned it meanwhile


def _extensions(sampling: SamplingParams) -> dict[str, Any]:
    usual = SamplingParams()
    return {
        theirs: value
        for ours, theirs in EXTENSIONS.items()
        if (value := getattr(sampling, ours)) != getattr(usual, ours)
    }


def _response_format(sampling: SamplingParams, name: str) -> dict[str, Any]:
    structure = sampling.structure
    assert structure is not None
    if structure.kind == "json_object":
        return {"type": "json_object"}
    if structure.kind == "json_schema":
        schema = {"name": "answer", "schema": structure.content, "strict": True}
        return {"type": "json_schema", "json_schema": schema}
    raise ConfigError(
        f"{name}: answers of a hosted model cannot be held to a {structure.kind}",
        hint="json_object and json_schema can be asked of an OpenAI-compatible endpoint",
    )


def chat_turn(message: Message) -> dict[str, Any]:
    """A message as the protocol has it: arguments of calls are JSON text there, calls have a type and an id."""
    turn = message.to_dict()
    if message.tool_calls:
        turn["tool_calls"] = [_call(call, k) for k, call in enumerate(message.tool_calls)]
    return turn


def _call(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    function = dict(call.get("function", call))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {"id": call.get("id") or f"call_{number}", "type": "function", "function": function}


def answer_text(choice: Any) -> str:
    """The text of a chat's or a completion's choice; a refusal is the answer too."""
    message = getattr(choice, "message", None)
    if message is None:
        return content_text(getattr(choice, "text", None))
    return content_text(getattr(message, "content", None)) or content_text(getattr(message, "refusal", None))


def content_text(content: Any) -> str:
    """Content as text, whether it came as one, as a list of parts, or not at all."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(part for part in parts if isinstance(part, str))


def finish_of(reason: Any) -> FinishReason:
    """Why the answer ended, in our two words; what only the endpoint knows counts as its own decision to stop."""
    return "length" if reason in ("length", "max_tokens", "model_length") else "stop"


def logprobs_of(choice: Any) -> tuple[float, ...]:
    """The logprobs of the answer's tokens; none where the endpoint sent none."""
    found = getattr(choice, "logprobs", None)
    content = getattr(found, "content", None)
    if content:
        return tuple(float(token.logprob) for token in content)
    return tuple(float(value) for value in getattr(found, "token_logprobs", None) or () if value is not None)
