"""What is asked, what comes back, and the protocol every source of answers follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from tailor.config import Strict
from tailor.text.messages import Message

FinishReason = Literal["stop", "length"]


class SamplingParams(Strict):
    """How tokens are chosen. Temperature 0 is greedy; a seed belongs to its request, whoever shares the batch."""

    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="sample among the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens that hold this probability")
    stop: tuple[str, ...] = Field((), description="texts at which the answer ends (not part of it)")
    seed: int = Field(0, ge=0, description="of this request's own random numbers")


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Request:
    """A conversation to continue. `artifact` names an attached customization; None is the plain base.

    `tools` are JSON schemas for the base's chat template. `task` names one of a prompt table's; without it, it is the
    one that the last user turn's fields name, or the only one.
    """

    messages: tuple[Message, ...]
    artifact: str | None = None
    sampling: SamplingParams = GREEDY
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str | None = None


@dataclass(frozen=True)
class Completion:
    """An answer. `logprobs[i]` is `token_ids[i]`'s before temperature; `answer` is what a chain of thought ends in."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    answer: str


class Backend(Protocol):
    """A source of answers: the local engine, a hosted service, or a script for tests."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        ...

    def logprobs(self, requests: Sequence[Request], completions: Sequence[str]) -> list[Tensor]:
        """Logprobs of each completion's tokens (end-of-turn token included) after its request, one (n,) per pair."""
        ...

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(num_texts, hidden) unit vectors."""
        ...
