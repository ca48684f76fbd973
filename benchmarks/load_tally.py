"""What the clients of a load test saw, judged against what each model answers alone and against the server's counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from load_client import Answer

NEAR = 1e-4
"""Two best logprobs nearer than this may change places with the batch."""
FLAT = 0.05
"""How much of its memory the server may gain in the second half."""
ASIDE = "Please answer in the same words as the letter that came with the parcel in the second week of the month. "
PROMPTS = (
    ("Where is my parcel?", 24),
    ("The bill of last month is wrong.", 32),
    ("Écris « grüße » à 東京 🙂 s'il te plaît.", 32),
    ("Hello", 8),
    ("Tell me a story of a dog and a fox.", 64),
    (ASIDE * 6 + "Where is it?", 16),
    (ASIDE * 6 + "Who sent it?", 16),
    ("List: a, b, c", 40),
)
"""What is asked, and the most tokens of the answer. Two of them begin alike."""

Key = tuple[str, int]
"""A model and the number of a prompt."""


@dataclass(frozen=True)
class Known:
    """What a model answers alone. From byte `doubtful` on it may go another way."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    doubtful: float


def doubtful_from(tokens: Sequence[Mapping[str, Any]]) -> float:
    """The first byte of a token whose two best are so near that another batch may choose otherwise."""
    end = 0
    for token in tokens:
        best, second = (top["logprob"] for top in token["top_logprobs"])
        if best - second < NEAR:
            return end
        end += len(token["bytes"])
    return float("inf")


def judge(answer: Answer, key: Key, known: Mapping[Key, Known]) -> str:
    """What became of a greedy answer: ok, near_tie, lost, truncated, mixed_up, wrong."""
    own = known[key]
    if not answer.done or answer.finish_reason is None or answer.usage is None:
        return "lost"
    used = answer.usage["prompt_tokens"], answer.usage["completion_tokens"]
    if (answer.text, answer.finish_reason, *used) == (own.text, own.finish_reason, own.prompt_tokens, used[1]):
        return "ok" if used[1] == own.completion_tokens else "wrong"
    mine, theirs = own.text.encode(), answer.text.encode()
    pairs = zip(mine, theirs, strict=False)
    first = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))
    if first >= own.doubtful and used[0] == own.prompt_tokens:
        return "near_tie"
    if mine.startswith(theirs):
        return "truncated"
    others = {one.text for other, one in known.items() if other != key}
    return "mixed_up" if answer.text in others else "wrong"


@dataclass
class Tally:
    """What the clients saw. `departed` has (prompt, least, most generated) tokens of each answer that was left."""

    known: Mapping[Key, Known]
    asked: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    departed: list[tuple[int, int, int]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)

    def count(self, kind: str, key: Key, answer: Answer) -> None:
        """One request for an answer."""
        self.asked[kind] += 1
        own, most = self.known[key], PROMPTS[key[1]][1]
        if answer.left:
            longest = most if kind == "sampled" else own.completion_tokens
            self.departed.append((own.prompt_tokens, answer.num_chunks, longest))
            self.outcomes["left"] += 1
            return
        self.statuses[str(answer.status)] += 1
        if kind == "sampled":
            whole = answer.done and answer.finish_reason is not None and answer.usage is not None
            outcome = "lost" if not whole else "sampled"
            short = whole and answer.finish_reason == "length" and answer.usage["completion_tokens"] < most  # type: ignore[index]
            outcome = "truncated" if short else outcome
        else:
            outcome = judge(answer, key, self.known)
        if outcome == "lost" and answer.status == 503 and answer.body is not None:
            outcome = "told_to_come_back"
        self.outcomes[outcome] += 1
        if outcome not in ("ok", "near_tie", "sampled", "told_to_come_back") and len(self.failures) < 20:
            self.failures.append(f"{outcome}: {kind} {key}: {answer.failure or answer.text!r} not {own.text!r}")
        if answer.usage is not None:
            self.tokens["prompt"] += answer.usage["prompt_tokens"]
            self.tokens["completion"] += answer.usage["completion_tokens"]
            self.tokens["cached"] += answer.usage["prompt_tokens_details"]["cached_tokens"]
        if answer.num_chunks:
            self.first.append(answer.first_at - answer.asked_at)
        if answer.num_chunks > 1 and answer.usage is not None:
            self.each.append((answer.last_at - answer.first_at) / (answer.usage["completion_tokens"] - 1))


def accounts(tally: Tally, metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """[least, what the server counted, most] of everything that it counts. Only departures leave room."""
    ended = sum(tally.outcomes[name] for name in ("ok", "near_tie", "sampled", "wrong", "mixed_up", "truncated"))
    left = len(tally.departed)
    prompts, seen, longest = (sum(one[k] for one in tally.departed) for k in range(3))
    done, spoken = tally.tokens["prompt"], tally.tokens["completion"]
    at_least = sum(one[1] > 0 for one in tally.departed)

    def counted(name: str) -> float:
        return metrics[f"tailor_{name}"]

    ends = counted("finished") + counted("cancelled") + counted("failed")
    return {
        "requests": [ended + at_least, counted("requests"), ended + left],
        "requests that ended": [counted("requests"), ends, counted("requests")],
        "finished": [ended, counted("finished"), ended + left],
        "failed": [0, counted("failed"), 0],
        "prompt tokens": [done, counted("prompt_tokens"), done + prompts],
        "cached tokens": [tally.tokens["cached"], counted("cached_tokens"), tally.tokens["cached"] + prompts],
        "generated tokens": [spoken + seen, counted("generated_tokens"), spoken + longest],
        "bytes of keys and values in use": [0, counted("kv_bytes_used"), 0],
        "running and waiting": [0, counted("running") + counted("waiting"), 0],
        "answers 4xx": [_refusals(tally), _http(metrics, "4"), _refusals(tally)],
        "answers 5xx": [tally.statuses["503"], _http(metrics, "5"), tally.statuses["503"]],
    }


def _refusals(tally: Tally) -> int:
    return sum(num for status, num in tally.statuses.items() if status.startswith("4"))


def _http(metrics: Mapping[str, float], kind: str) -> float:
    """Answers of one kind of status; those whose client left early (499) are nobody's refusal."""
    pattern = re.compile(rf'tailor_http_requests_total{{.*status="({kind}\d\d)"}}')
    found = ((match.group(1), value) for name, value in metrics.items() if (match := pattern.match(name)))
    return sum(value for status, value in found if status != "499")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """50, 90, 99 and the largest."""
    ordered = sorted(values) or [float("nan")]
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99, 100)}


def summary(tally: Tally, seconds: float, metrics: Mapping[str, float], tracebacks: int) -> dict[str, Any]:
    """All figures, and under `failed` what must not be."""
    samples = [value for _, value in tally.memory]
    middle, last = (samples[len(samples) * a // 10 : len(samples) * b // 10] or samples for a, b in ((5, 6), (9, 10)))
    growth = median(last) / median(middle) - 1
    sums = accounts(tally, metrics)
    bad = [name for name in ("lost", "mixed_up", "truncated", "wrong", "wrongly_refused") if tally.outcomes[name]]
    bad += [name for name, (least, found, most) in sums.items() if not least <= found <= most]
    bad += ["growing memory"] * (growth > FLAT) + ["tracebacks"] * (tracebacks > 0)
    texts = [[one.text for key, one in tally.known.items() if key[1] == k] for k in range(len(PROMPTS))]
    return {
        "seconds": seconds,
        "asked": dict(tally.asked),
        "outcomes": {name: tally.outcomes[name] for name in ("lost", "mixed_up", "truncated")} | dict(tally.outcomes),
        "statuses": dict(tally.statuses),
        "distinct_texts_per_prompt": [f"{len(set(of))} of {len(of)}" for of in texts],
        "requests_per_second": tally.asked.total() / seconds,
        "generated_tokens_per_second": metrics["tailor_generated_tokens"] / seconds,
        "seconds_to_first_token": percentiles(tally.first),
        "seconds_per_token": percentiles(tally.each),
        "accounts": sums,
        "server_bytes": {f"{k * 25}%": samples[min(len(samples) - 1, len(samples) * k // 4)] for k in range(5)},
        "server_bytes_most": max(samples),
        "growth_in_second_half": growth,
        "tracebacks": tracebacks,
        "failures": tally.failures,
        "failed": bad,
    }
