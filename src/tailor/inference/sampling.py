"""Logits to a token, and what is told of it: penalties, bias and constraints, then temperature, top-k, top-p, min-p.

Truncation is by top-k, by top-p (Holtzman et al. 2020, arXiv:1904.09751 section 3.1) and by min-p (Nguyen et al. 2024,
arXiv:2407.01082); in this order, as in transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tailor.errors import ConfigError
from tailor.inference.backend import SamplingParams, TokenLogprob

NUM_FIRST = 256
"""So many of the likeliest tokens are sorted at first: most often they hold all of top-p."""


def is_plain(params: SamplingParams) -> bool:
    """Whether the next token is simply the likeliest: greedy, and nothing changes the logits."""
    changes = params.logit_bias or params.presence_penalty or params.frequency_penalty or params.min_new_tokens
    return params.temperature == 0 and params.repetition_penalty == 1 and params.structure is None and not changes


def choose(
    logits: Tensor,
    params: SamplingParams,
    generator: torch.Generator,
    *,
    prompt_ids: Sequence[int] = (),
    sampled_ids: Sequence[int] = (),
    allowed: Tensor | None = None,
    stop_ids: Collection[int] = (),
) -> int:
    """The next token from one row of logits (V,). Draws exactly one random number when it samples, else none.

    `allowed` (V,) bool is what a structure lets follow. `stop_ids` are out until min_new_tokens are there, unless
    `allowed` leaves nothing else. Raises ConfigError for a bias on a token that there is not.
    """
    logits = modified(logits, params, prompt_ids, sampled_ids)
    if allowed is not None:
        within = logits.masked_fill(~allowed, -torch.inf)
        # what a structure wants is said even by a model that holds all of it for impossible
        logits = within if bool(within.max() > -torch.inf) else torch.where(allowed, 0.0, -torch.inf)
    if len(sampled_ids) < params.min_new_tokens:
        logits = _without(logits, stop_ids)
    if params.temperature == 0:
        return int(logits.argmax())
    # in float64 and relative to the largest: a tiny temperature ends in 0 and -inf, never in inf - inf or 0 / 0
    relative = (logits - logits.max()).double() / params.temperature
    probabilities = truncated(relative.softmax(dim=0), params.top_k, params.top_p, params.min_p)
    point = torch.rand((), generator=generator, dtype=torch.float64)
    cumulative = probabilities.cumsum(dim=0)
    return int(torch.searchsorted(cumulative, point * cumulative[-1], right=True).clamp(max=len(logits) - 1))


def modified(logits: Tensor, params: SamplingParams, prompt_ids: Sequence[int], sampled_ids: Sequence[int]) -> Tensor:
    """(V,) logits in fp32 after the repetition penalty, presence and frequency penalties and the bias.

    Repetition, over prompt and answer: z > 0 becomes z / r, else z * r (Keskar et al. 2019, arXiv:1909.05858 section
    4.1; the sign as in transformers and vLLM). Presence and frequency, over the answer: z - count * f - (count > 0) * p
    (OpenAI's API reference).
    """
    logits = logits.float()
    if params.repetition_penalty != 1:
        seen = [i for i in {*prompt_ids, *sampled_ids} if i < len(logits)]  # virtual tokens have no logit
        places = torch.tensor(seen, dtype=torch.long, device=logits.device)
        found, penalty = logits[places], params.repetition_penalty
        logits = logits.index_put((places,), torch.where(found > 0, found / penalty, found * penalty))
    if sampled_ids and (params.presence_penalty or params.frequency_penalty):
        places = torch.tensor(sampled_ids, dtype=torch.long, device=logits.device)
        counts = torch.bincount(places, minlength=len(logits))[: len(logits)]
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if params.logit_bias:
        ids, values = zip(*params.logit_bias, strict=True)
        if outside := [i for i in ids if not 0 <= i < len(logits)]:
            raise ConfigError(f"logit_bias names token {outside[0]}, the base has tokens 0 to {len(logits) - 1}")
        places = torch.tensor(ids, dtype=torch.long, device=logits.device)
        logits = logits.index_add(0, places, torch.tensor(values, dtype=logits.dtype, device=logits.device))
    return logits


def _without(logits: Tensor, ids: Collection[int]) -> Tensor:
    """`logits` with some tokens impossible, unless nothing would be left."""
    places = torch.tensor([i for i in ids if i < len(logits)], dtype=torch.long, device=logits.device)
    left = logits.index_fill(0, places, -torch.inf)
    return left if bool(left.max() > -torch.inf) else logits


def truncated(probabilities: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """(V,) probabilities with all but the allowed tokens at 0, not renormalised. The likeliest token always stays.

    With several limits, top-p counts within the top k, as transformers does; of equally likely tokens the first stay.
    """
    if min_p > 0:
        few = truncated(probabilities, top_k, top_p)
        return few.masked_fill(few < min_p * few.max(), 0)
    if top_k == 0 and top_p >= 1.0:
        return probabilities
    ordered, order = _likeliest(probabilities, top_k or NUM_FIRST)
    mass = top_p * (ordered.sum() if top_k else probabilities.sum())
    if not top_k and ordered.sum() < mass:
        ordered, order = _likeliest(probabilities, len(probabilities))
    keep = ordered.cumsum(dim=0) - ordered < mass
    return torch.zeros_like(probabilities).scatter(0, order[keep], ordered[keep])


def _likeliest(values: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` largest of (V,) and their places: largest first, of equal ones the first place first."""
    num = min(num, len(values))
    places = (values >= values.topk(num).values[-1]).nonzero()[:, 0]
    ordered, order = values[places].sort(descending=True, stable=True)
    return ordered[:num], places[order[:num]]


def describe(logits: Tensor, token: int, num_top: int) -> TokenLogprob:
    """A chosen token's logprob under one row of raw logits (V,), and the `num_top` likeliest tokens at its place.

    Raw: before penalties, bias, structure and temperature, as OpenAI and vLLM report them. A token that is impossible
    there (-inf) is not among the likeliest.
    """
    logprobs = logits.float().log_softmax(dim=0)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, places = _likeliest(logprobs, num_top)
        pairs = zip(places.tolist(), values.tolist(), strict=True)
        top = tuple((place, value) for place, value in pairs if value > -torch.inf)
    return TokenLogprob(token, float(logprobs[token]), top)
