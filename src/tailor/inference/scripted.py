"""A backend that follows a script: for tests, yours included, and for dry runs of pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tailor.inference.backend import Completion, Request
from tailor.models.dropout import stable_seed

Script = Callable[[Request], str]


class ScriptedBackend:
    """Answers with `script(request)`; scores and embeddings are made up from hashes of the texts, always the same."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One scripted completion per request; every request is kept in `requests`."""
        self.requests += requests
        texts = [self.script(request) for request in requests]
        return [Completion(text, (), (), "stop", 0, text) for text in texts]

    def logprobs(self, requests: Sequence[Request], completions: Sequence[str]) -> list[Tensor]:
        """One number per word, in (-10, 0), from a hash of request and word."""
        return [
            torch.tensor([-10.0 * _unit(f"{request.messages}/{word}") for word in completion.split()])
            for request, completion in zip(requests, completions, strict=True)
        ]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(num_texts, 16) unit vectors; texts that share words are near each other."""
        rows = [sum((_vector(word) for word in text.lower().split()), torch.zeros(16)) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1) if rows else torch.empty(0, 16)


def _unit(key: str) -> float:
    return stable_seed(key) / (1 << 63)


def _vector(word: str) -> Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(stable_seed(word)))
