"""Logits to a token: greedy, temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751 section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from tailor.inference.backend import SamplingParams


def choose(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The next token from one row of logits (V,). Draws exactly one random number when it samples."""
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = truncated((logits / params.temperature).softmax(dim=0), params.top_k, params.top_p)
    point = torch.rand((), generator=generator, dtype=torch.float64)
    cumulative = probabilities.double().cumsum(dim=0)
    return int(torch.searchsorted(cumulative, point * cumulative[-1], right=True).clamp(max=len(logits) - 1))


def truncated(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """(V,) probabilities with all but the allowed tokens at 0, not renormalised. The likeliest token always stays."""
    if top_k == 0 and top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(descending=True, stable=True)
    keep = ordered.cumsum(dim=0) - ordered < top_p
    if top_k:
        keep[top_k:] = False
    return torch.zeros_like(probabilities).scatter(0, order[keep], ordered[keep])
