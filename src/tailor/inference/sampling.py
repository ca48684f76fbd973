"""Logits to a token: greedy, temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751 section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from tailor.inference.backend import SamplingParams


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The next token from one row of logits (V,). Draws exactly one random number when it samples."""
    if params.temperature == 0:
        return int(logits.argmax())
    # in float64 and relative to the largest: a tiny temperature ends in 0 and -inf, never in inf - inf or 0 / 0
    relative = (logits - logits.max()).double() / params.temperature
    probabilities = truncated(relative.softmax(dim=0), params.top_k, params.top_p)
    point = torch.rand((), generator=generator, dtype=torch.float64)
    cumulative = probabilities.cumsum(dim=0)
    return int(torch.searchsorted(cumulative, point * cumulative[-1], right=True).clamp(max=len(logits) - 1))


def truncated(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """(V,) probabilities with all but the allowed tokens at 0, not renormalised. The likeliest token always stays.

    With both limits, top-p counts within the top k, as transformers does.
    """
    if top_k == 0 and top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    if top_k:
        ordered, order = ordered[:top_k], order[:top_k]
    keep = ordered.cumsum(dim=0) - ordered < top_p * ordered.sum()
    return torch.zeros_like(probabilities).scatter(0, order[keep], ordered[keep])
