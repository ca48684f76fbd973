"""What is asked, what comes back, and the protocol every source of answers follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from pydantic import Field
from torch import Tensor

from tailor.config import Strict
from tailor.inference.structured import Structure
from tailor.text.messages import Message

FinishReason = Literal["stop", "length"]


class SamplingParams(Strict):
    """How tokens are chosen. Temperature 0 is greedy; a seed belongs to its request, whoever shares the batch."""

    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_k: int = Field(0, ge=0, description="sample among the k likeliest tokens; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the likeliest tokens that hold this probability")
    min_p: float = Field(0.0, ge=0, le=1, description="sample among tokens at least so likely, as a share of the best")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="taken from the logits of tokens said already")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="the same, once for every time a token was said")
    repetition_penalty: float = Field(1.0, gt=0, description="divides logits of tokens in prompt and answer; 1: none")
    logit_bias: tuple[tuple[int, float], ...] = Field((), description="token ids and what is added to their logits")
    stop: tuple[str, ...] = Field((), description="texts at which the answer ends (not part of it)")
    seed: int = Field(0, ge=0, description="of this request's own random numbers")
    min_new_tokens: int = Field(0, ge=0, description="tokens before which none is chosen that ends a turn")
    ignore_stop: bool = Field(False, description="go on after the token that ends a turn, for measurements")
    num_top_logprobs: int = Field(0, ge=0, le=20, description="likeliest tokens to report at every place")
    structure: Structure | None = Field(None, description="what the text must be: JSON, a schema, a pattern, a choice")


GREEDY = SamplingParams()


@dataclass(frozen=True)
class Request:
    """Something to continue: a conversation, or as it stands a `prompt` of text or token ids (then without messages).

    `artifact` names an attached customization; None is the plain base. `tools` are JSON schemas for the base's chat
    template. `task` names one of a prompt table's; without it, it is the one that the last user turn's fields name, or
    the only one. `echo` asks for the logprobs of the prompt's own tokens too. `effort` (none, low, high, …) is how long
    a base of this machine is to think first, where its chat template has a switch for that.
    """

    messages: tuple[Message, ...]
    artifact: str | None = None
    sampling: SamplingParams = GREEDY
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str | None = None
    prompt: str | tuple[int, ...] | None = None
    echo: bool = False
    effort: str | None = None


class TokenLogprob(NamedTuple):
    """A token, its logprob as the model gives it (no temperature, no penalty), and the likeliest at its place.

    `top` holds (id, logprob), best first; a token among them has bit for bit the same logprob there.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """An answer. `logprobs[i]` is `token_ids[i]`'s before temperature; `answer` is what a chain of thought ends in.

    `tokens` tells more of them when likeliest tokens were asked for. `num_cached_tokens` of the prompt had been
    computed for another request. `prompt_tokens` are those of an echoed prompt; the first has no logprob.
    `num_outvoted_tokens` were sampled for answers that lost the vote.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    answer: str
    num_cached_tokens: int = 0
    tokens: tuple[TokenLogprob, ...] = ()
    prompt_tokens: tuple[TokenLogprob | None, ...] = ()
    num_outvoted_tokens: int = 0

    @property
    def num_sampled_tokens(self) -> int:
        """All that was generated for this answer."""
        return len(self.token_ids) + self.num_outvoted_tokens


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
