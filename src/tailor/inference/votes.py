"""Self-consistency in generation: a request that is to be voted on becomes several, and their majority its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from tailor.inference.backend import Completion, Request
from tailor.metrics.votes import Votes, majority
from tailor.models.dropout import stable_seed


class Generate(Protocol):
    """How a backend answers: one completion per request, in order; `progress` is told how many are complete."""

    def __call__(
        self, requests: Sequence[Request], progress: Callable[[int], None] | None = None, /
    ) -> list[Completion]: ...


def generate_with_votes(
    generate: Generate,
    requests: Sequence[Request],
    votes_of: Callable[[Request], Votes | None],
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """`generate`, with `votes_of(request)` answers sampled where that is not None, and the majority's returned.

    All samples of all requests are generated together. A request that asks for a temperature of its own keeps it; each
    sample has a seed of its own that follows from the request's. The completion returned is the winning sample as it
    is, with its own text and number of tokens.
    """
    samples = [sampled(request, votes_of(request)) for request in requests]
    asked = [sample for some in samples for sample in some]
    if len(asked) == len(requests):
        return generate(asked, progress)

    def tell(done: int) -> None:
        if progress is not None:
            progress(done * len(requests) // len(asked))

    answered = iter(generate(asked, tell))
    return [winner([next(answered) for _ in some]) for some in samples]


def sampled(request: Request, votes: Votes | None) -> list[Request]:
    """The requests whose answers are votes on this one; itself alone when nothing is voted on."""
    if votes is None or votes.num == 1:
        return [request]
    own = request.sampling
    temperature = own.temperature or votes.temperature
    seeds = [stable_seed(f"{own.seed}/vote/{k}") % (1 << 31) for k in range(votes.num)]  # hosted models take 32 bits
    return [
        replace(request, sampling=own.model_copy(update={"temperature": temperature, "seed": seed})) for seed in seeds
    ]


def winner(completions: Sequence[Completion]) -> Completion:
    """The completion that stands for the answer most of them give."""
    means = [sum(c.logprobs) / len(c.logprobs) if c.logprobs else 0.0 for c in completions]
    chosen = completions[majority([c.answer for c in completions], means)]
    outvoted = sum(c.num_sampled_tokens for c in completions) - chosen.num_sampled_tokens
    return replace(chosen, num_outvoted_tokens=outvoted) if outvoted else chosen
