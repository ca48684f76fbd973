"""What train_throughput.py found, as a table of ratios, and which goals are met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Self

from train_worker import Job

LOSS_LIMIT = 1e-4
"""How far a loss of an fp32 step may be from TRL's."""


@dataclass
class Measured:
    """One system's repetitions on one workload with one technique. Memory in MiB.

    `baseline` is resident memory after loading, before the first step; `peak` is the highest of the whole process.
    """

    workload: str
    technique: str
    system: str
    configuration: str
    baseline: float | None = None
    first_loss: float | None = None
    peak: float = 0.0
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, system: str, configuration: str, said: Mapping[str, Any]) -> Self:
        """With what a worker says when it is warm."""
        names = job.workload.name, job.technique, system, configuration
        return cls(*names, baseline=said.get("baseline"), first_loss=said.get("first_loss"))

    def add(self, said: Mapping[str, Any]) -> None:
        """One more repetition."""
        self.seconds.append(said["seconds"])
        self.tokens.append(said["tokens"])
        self.peak = max(self.peak, said.get("peak", 0.0))
        if "flops" in said:
            self.flops.append(said["flops"])

    @property
    def speeds(self) -> list[float]:
        """Real tokens per second of every repetition."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def speed(self) -> float:
        """Their median."""
        return median(self.speeds)

    def over(self, other: Measured) -> list[float]:
        """How many times faster than the other, in every pair of repetitions."""
        return [ours / theirs for ours, theirs in zip(self.speeds, other.speeds, strict=True)]

    def line(self) -> str:
        """The latest repetition."""
        name = f"TRL {self.system} ({self.configuration})" if self.configuration else self.system
        return f"({self.workload}) {self.technique:14s} {name:26s} {self.speeds[-1]:8.0f} tokens/s"

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        return {**asdict(self), "tokens_per_second": self.speeds, "median": self.speed}


Found = Mapping[tuple[str, str, str], Measured]

SPEED_GOALS = {("a", "default"): 4.0, ("a", "best"): 1.5, ("b", "default"): 3.0, ("b", "best"): 1.5}
MEMORY_GOALS = {("a", "default"): 0.5, ("a", "best"): 1.0}
FLOOR_GOALS = {("a", "lora"): 0.5, ("a", "full"): 0.5, ("b", "full"): 0.5, ("c", "full"): 0.5}
OVER_FULL = {"lora": 1.25, "prompt_tuning": 1.1}
"""What is asked: against TRL with LoRA, of the floor, and of small techniques against full tuning."""


def goals(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Every goal whose systems were measured: what it asks, what was found, whether it is met."""
    found = _found(measured)
    reached = [
        _at_least(f"({workload}) LoRA: tokens/s over TRL {system}", median(pair[0].over(pair[1])), limit)
        for (workload, system), limit in SPEED_GOALS.items()
        if (pair := _pair(found, (workload, "lora", "tailor"), (workload, "lora", system)))
    ]
    for (workload, system), limit in MEMORY_GOALS.items():
        if pair := _pair(found, (workload, "lora", "tailor"), (workload, "lora", system)):
            value = pair[0].peak / pair[1].peak
            goal = f"({workload}) LoRA: peak memory over TRL {system}"
            reached.append({"goal": goal, "value": value, "limit": f"<= {limit}", "met": value <= limit})
    reached += [
        _at_least(f"({workload}) {technique}: share of the floor", median(pair[0].over(pair[1])), limit)
        for (workload, technique), limit in FLOOR_GOALS.items()
        if (pair := _pair(found, (workload, technique, "tailor"), (workload, technique, "floor")))
    ]
    reached += [
        _at_least(f"({workload}) {technique}: tokens/s over full tuning", median(pair[0].over(pair[1])), limit)
        for workload in dict.fromkeys(one.workload for one in measured)
        for technique, limit in OVER_FULL.items()
        if (pair := _pair(found, (workload, technique, "tailor"), (workload, "full", "tailor")))
    ]
    return reached


def _found(measured: Sequence[Measured]) -> Found:
    return {(one.workload, one.technique, one.system): one for one in measured}


def _pair(found: Found, ours: tuple[str, str, str], theirs: tuple[str, str, str]) -> tuple[Measured, Measured] | None:
    return (found[ours], found[theirs]) if ours in found and theirs in found else None


def _at_least(goal: str, value: float, limit: float) -> dict[str, Any]:
    return {"goal": goal, "value": value, "limit": f">= {limit}", "met": value >= limit}


def report(measured: Sequence[Measured], reached: Sequence[Mapping[str, Any]]) -> str:
    """The table and the goals. Ratios are tailor's over the row's system: median of the pairs, and every pair."""
    found = _found(measured)
    lines = [
        "",
        f"{'':3s} {'technique':14s} {'system':26s} {'tokens/s':>8s} {'peak MiB':>9s} {'loaded':>7s}  tailor over it",
    ]
    for one in measured:
        ours = found[one.workload, one.technique, "tailor"]
        name = f"TRL {one.system} ({one.configuration})" if one.configuration else one.system
        memory = f"{one.peak:9.0f} {one.baseline:7.0f}" if one.baseline is not None else f"{'':17s}"
        ratio = "" if one is ours else _ratios(ours, one)
        lines.append(f"({one.workload}) {one.technique:14s} {name:26s} {one.speed:8.0f} {memory}  {ratio}".rstrip())
    lines += ["", *_first_losses(measured, found)]
    for goal in reached:
        lines.append(f"{'met   ' if goal['met'] else 'missed'} {goal['goal']}: {goal['value']:.2f} ({goal['limit']})")
    return "\n".join(lines)


def _ratios(ours: Measured, other: Measured) -> str:
    pairs = ours.over(other)
    said = f"x{median(pairs):.2f} ({' '.join(f'{pair:.2f}' for pair in pairs)})"
    if other.peak:
        said += f", memory x{ours.peak / other.peak:.2f}"
    if other.flops:
        rates = [flops / seconds / 1e9 for flops, seconds in zip(other.flops, other.seconds, strict=True)]
        said += f", {median(rates):.0f} GFLOP/s"
    return said


def _first_losses(measured: Sequence[Measured], found: Found) -> Iterator[str]:
    """How far the first step's loss is from TRL's on the same rows; packs are made of other rows."""
    for one in measured:
        theirs, ours = one.first_loss, found[one.workload, one.technique, "tailor"].first_loss
        if one.system != "tailor" and one.configuration != "packed" and theirs is not None and ours is not None:
            off = abs(ours - theirs)
            yield f"({one.workload}) {one.technique}: first loss {ours:.5f}, TRL {one.configuration} {off:.1e} away"
