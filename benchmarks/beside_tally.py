"""What phases of traffic and of training on one server gave: their sums, percentiles, and ratios pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from statistics import median
from typing import Any

from load_client import Answer

KINDS = ("idle", "beside", "alone")
"""Traffic without a job, traffic beside a job, the job without traffic."""
PERCENTS = (50, 95, 99)
COUNTED = ("finished", "failed", "prompt_tokens", "generated_tokens")
"""What the server counts of what the clients see."""


@dataclass
class Phase:
    """What one phase gave. `first` and `each`: seconds to the first token and per further token of every answer."""

    kind: str
    seconds: float = 0.0
    asked: int = 0
    answered: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    steps: int = 0
    server_cpu_seconds: float = 0.0
    counted: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def take(self, answer: Answer, due: float) -> None:
        """One answer to a request that was due at that moment."""
        self.asked += 1
        used = answer.usage
        if not answer.done or answer.finish_reason is None or used is None or answer.num_chunks < 2:
            self.failures.append(f"{answer.status}: {answer.failure or answer.body or answer.text}")
            return
        self.answered += 1
        self.prompt_tokens += used["prompt_tokens"]
        self.generated_tokens += used["completion_tokens"]
        self.first.append(answer.first_at - due)
        self.each.append((answer.last_at - answer.first_at) / (used["completion_tokens"] - 1))

    def wrong(self) -> list[str]:
        """What is not as it must be: answers that did not come whole, counts that differ."""
        seen = dict(zip(COUNTED, (self.answered, 0, self.prompt_tokens, self.generated_tokens), strict=True))
        differ = [name for name in COUNTED if self.counted[name] != seen[name]]
        told = [f"{name}: the server counted {self.counted[name]:g}, the clients {seen[name]}" for name in differ]
        if self.failures:
            missing = f"{len(self.failures)} of {self.asked} answers did not come whole"
            told.append(f"{missing}: {self.failures[0]}")
        return [f"{self.kind}: {one}" for one in told]


Figure = Callable[[Phase], float]

TIMES: dict[str, Callable[[Phase], list[float]]] = {
    "seconds_to_first_token": lambda phase: phase.first,
    "seconds_per_token": lambda phase: phase.each,
}


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest rank: the least value that so many percent do not exceed; nan of nothing."""
    ordered = sorted(values) or [float("nan")]
    return ordered[ceil(len(ordered) * percent / 100) - 1]


def ratio(pairs: Sequence[tuple[Phase, Phase]], figure: Figure) -> dict[str, float | None]:
    """A figure of the first over that of the second: the median of the pairs, the least and the greatest.

    Pairs without the second say nothing; None when no pair says anything.
    """
    found = [figure(one) / figure(other) for one, other in pairs if figure(other) > 0]
    if not found:
        return {"median": None, "least": None, "greatest": None}
    return {"median": median(found), "least": min(found), "greatest": max(found)}


def tokens_per_second(phase: Phase) -> float:
    """Answered tokens over the time from the first request to the last answer."""
    return phase.generated_tokens / phase.seconds


def steps_per_second(phase: Phase) -> float:
    """Steps of the job."""
    return phase.steps / phase.seconds


def facts(phases: Mapping[str, Sequence[Phase]]) -> dict[str, Any]:
    """All figures of a setting: over all requests of a kind, and ratios of pairs."""
    beside_idle = list(zip(phases["beside"], phases["idle"], strict=True))
    beside_alone = list(zip(phases["beside"], phases["alone"], strict=True))
    told: dict[str, Any] = {}
    for name, values in TIMES.items():
        pooled = {kind: [time for phase in phases[kind] for time in values(phase)] for kind in ("idle", "beside")}
        told[name] = {kind: {f"p{p}": percentile(times, p) for p in PERCENTS} for kind, times in pooled.items()}
        told[name]["ratio"] = {
            f"p{p}": ratio(beside_idle, lambda phase, p=p, of=values: percentile(of(phase), p))  # type: ignore[misc]
            for p in PERCENTS
        }
    rates = {
        "tokens_per_second": (tokens_per_second, beside_idle),
        "steps_per_second": (steps_per_second, beside_alone),
    }
    for name, (figure, pairs) in rates.items():
        told[name] = {pairs[0][k].kind: median(figure(pair[k]) for pair in pairs) for k in (1, 0)}
        told[name]["ratio"] = ratio(pairs, figure)
    busy = {kind: median(p.server_cpu_seconds / p.seconds for p in phases[kind]) for kind in ("idle", "beside")}
    every = [asdict(phase) for kind in KINDS for phase in phases[kind]]
    return {
        **told,
        "server_cores": busy,
        "wrong": [one for ps in phases.values() for p in ps for one in p.wrong()],
        "phases": every,
    }


TIMES_SHOWN = {"seconds_to_first_token": "first token, ms", "seconds_per_token": "per token, ms"}
RATES_SHOWN = {"tokens_per_second": ("idle", "tokens a second"), "steps_per_second": ("alone", "steps a second")}


def table(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Two lines of times (p50 / p95 / p99) and two of rates for each setting; ratios are medians of the pairs."""
    lines = [f"{'setting':10} {'':16}{'without':>24}  {'beside':>26}  {'ratio':>24}   least to greatest"]
    for setting, told in settings.items():
        for name, title in TIMES_SHOWN.items():
            of, ratios = told[name], told[name]["ratio"]
            shown = [" / ".join(f"{1000 * of[kind][f'p{p}']:.3g}" for p in PERCENTS) for kind in ("idle", "beside")]
            shown.append(" / ".join(_short(ratios[f"p{p}"]["median"]) for p in PERCENTS))
            lines.append(_line(setting, title, shown, f"p95: {_range(ratios['p95'])}"))
        for name, (kind, title) in RATES_SHOWN.items():
            of = told[name]
            shown = [f"{of[kind]:.4g}", f"{of['beside']:.4g}", _short(of["ratio"]["median"])]
            lines.append(_line(setting, title, shown, _range(of["ratio"])))
    return lines


def _line(setting: str, title: str, shown: Sequence[str], spread: str) -> str:
    return f"{setting:10} {title:16}{shown[0]:>24}  {shown[1]:>26}  {shown[2]:>24}   {spread}"


def _range(spread: Mapping[str, float | None]) -> str:
    return f"{_short(spread['least'])} to {_short(spread['greatest'])}"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
