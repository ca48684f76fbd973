"""What a hosted model was asked and what that cost: counted per answer, shown with progress."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tailor.inference.hosted_endpoint import Prices

MILLION = 1_000_000
LIMITS = ("requests", "tokens")


@dataclass
class Usage:
    """Counts over all answers so far; threads add to them. `unreported` answers came without token counts."""

    prices: Prices | None = None
    requests: int = 0
    retries: int = 0
    unreported: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    limits: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, usage: Any, *, retries: int = 0, headers: Mapping[str, str] | None = None) -> None:
        """Count one answer by its `usage` (None: the endpoint told nothing) and note the limits in its headers."""
        prompt = _count(usage, "prompt_tokens")
        with self._lock:
            self.requests += 1
            self.retries += retries
            self.unreported += prompt is None
            self.prompt_tokens += prompt or 0
            self.completion_tokens += _count(usage, "completion_tokens") or 0
            self.cached_tokens += _count(getattr(usage, "prompt_tokens_details", None), "cached_tokens") or 0
            for what in LIMITS:
                if left := (headers or {}).get(f"x-ratelimit-remaining-{what}"):
                    self.limits[what] = left

    @property
    def cost(self) -> float | None:
        """US dollars, by the prices in the settings; None where there are none."""
        if self.prices is None:
            return None
        cached = self.prices.prompt if self.prices.cached is None else self.prices.cached
        fresh = self.prompt_tokens - self.cached_tokens
        dollars = fresh * self.prices.prompt + self.cached_tokens * cached
        return (dollars + self.completion_tokens * self.prices.completion) / MILLION

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        names = ("requests", "retries", "unreported", "prompt_tokens", "cached_tokens", "completion_tokens")
        return {**{name: getattr(self, name) for name in names}, "cost": self.cost}

    def told(self) -> str:
        """One line for people."""
        tried = f" ({self.retries} tried again)" if self.retries else ""
        cached = f" ({self.cached_tokens:,} cached)" if self.cached_tokens else ""
        parts = [
            f"{self.requests:,} requests{tried}",
            f"{self.prompt_tokens:,} prompt tokens{cached}",
            f"{self.completion_tokens:,} completion tokens",
            "no price is set" if self.cost is None else f"${self.cost:.4f}",
        ]
        if self.unreported:
            parts.append(f"{self.unreported:,} answers came without counts: the sums are too low")
        parts += [f"{left} {what} left in the rate limit" for what, left in self.limits.items()]
        return ", ".join(parts)


def _count(usage: Any, name: str) -> int | None:
    """A count as it came; None when it is not there or no number."""
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else None
