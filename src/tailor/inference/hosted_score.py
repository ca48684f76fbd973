"""Logprobs of given texts at an endpoint: tokens by its `/tokenize`, their logprobs by an echo of `/completions`.

vLLM and tailor's own server have both; OpenAI's service has neither for chat models, so likelihood cannot be measured
there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tailor.errors import TailorError
from tailor.inference.hosted_endpoint import Endpoint
from tailor.inference.hosted_usage import Usage

Turns = Sequence[Mapping[str, Any]]
PROBE: Turns = ({"role": "user", "content": "a"},)


class Scorer:
    """Scores completions of conversations, token by token."""

    def __init__(self, endpoint: Endpoint, client: Any, usage: Usage) -> None:
        self.endpoint = endpoint
        self.client = client
        self.usage = usage

    @cached_property
    def obstacle(self) -> str | None:
        """Why it cannot be done here, None when it can: tried with one word. Raises what would stop all requests."""
        name = self.endpoint.name
        try:
            ids = self._ids(self.endpoint.model, PROBE, ())
        except TailorError as error:
            if error.code in ("auth", "overloaded"):
                raise
            return f"{name} has no /tokenize, so the tokens of a given text are not known"
        try:
            echoed = self._echo(self.endpoint.model, ids)
        except TailorError as error:
            if error.code in ("auth", "overloaded"):
                raise
            return f"{name} does not echo logprobs of a given text ({error.message})"
        if len(echoed) < len(ids):
            return f"{name} does not echo logprobs of a given text"
        return None if self._num_closing else f"{name} has no token that ends a turn"

    def logprobs(self, model: str, turns: Turns, completion: str, tools: Sequence[Mapping[str, Any]]) -> Tensor:
        """(n,) logprobs of the completion's tokens and the one that ends the turn.

        Raises TailorError when prompt and answer do not meet at a token: the template rewrites the prompt.
        """
        prompt = self._ids(model, turns, tools)
        whole = self._ids(model, (*turns, {"role": "assistant", "content": completion}), tools)
        if whole[: len(prompt)] != prompt:
            raise TailorError(
                f"{self.endpoint.name}: its chat template writes a prompt otherwise when an answer follows it",
                hint="choose metrics of the generated text: accuracy, exact_match, rougeL",
            )
        whole = whole[: len(whole) - self._num_closing + 1]
        echoed = self._echo(model, whole)[len(prompt) : len(whole)]
        if any(value is None for value in echoed) or len(echoed) != len(whole) - len(prompt):
            raise TailorError(f"{self.endpoint.name} echoed {len(echoed)} logprobs of {len(whole)} tokens")
        return torch.tensor([float(value) for value in echoed if value is not None], dtype=torch.float32)

    @cached_property
    def _num_closing(self) -> int:
        """Tokens with which the template closes an answer: those that two different answers end in."""
        one, other = (
            self._ids(self.endpoint.model, (*PROBE, {"role": "assistant", "content": text}), ()) for text in "ab"
        )
        pairs = zip(reversed(one), reversed(other), strict=False)
        return next((k for k, (a, b) in enumerate(pairs) if a != b), 0)

    def _ids(self, model: str, turns: Turns, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        asked: dict[str, Any] = {"model": model, "messages": [dict(turn) for turn in turns]}
        asked["add_generation_prompt"] = turns[-1]["role"] != "assistant"
        if tools:
            asked["tools"] = [dict(tool) for tool in tools]
        with self.endpoint.errors():
            found = self.client.post(f"{self.endpoint.root}/tokenize", body=asked, cast_to=object)
        ids = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise TailorError(f"{self.endpoint.name}: /tokenize sent no token ids")
        return ids

    def _echo(self, model: str, ids: Sequence[int]) -> list[float | None]:
        with self.endpoint.errors():
            found = self.client.completions.create(
                model=model, prompt=list(ids), max_tokens=1, temperature=0, logprobs=1, echo=True
            )
        self.usage.add(getattr(found, "usage", None))
        choices = getattr(found, "choices", None) or ()
        logprobs = getattr(choices[0], "logprobs", None) if choices else None
        return list(getattr(logprobs, "token_logprobs", None) or ())
