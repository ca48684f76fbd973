"""The rule of `tailor recommend`: from facts to ranked choices. No file is read here.

The ladder of Figure 1 of NVIDIA's "Selecting Large Language Model Customization Techniques" (data and effort against
accuracy) is climbed as far as rows, machine and base carry: the most accurate technique with enough rows comes first,
then the most accurate with few, then what lacks rows, beginning with what lacks least.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from tailor.evaluation.drawing.quantities import count, size
from tailor.techniques.technique import Traits

Changes = Literal["never", "monthly", "daily"]

SMALL_BASE = 1_000_000_000
"""Parameters below which a base is hardly steered by what stands in its prompt (Brown et al. 2020, arXiv:2005.14165,
figure 1.2, for shots; Lester et al. 2021, arXiv:2104.08691, figure 1, for virtual tokens), and training every weight
is cheap (docs/log.md: on 7 M parameters it did no worse than LoRA from 300 rows on)."""

TRAINING_BYTES = 16
"""Per trained weight: itself, its gradient and AdamW's two moments, in float32."""

HEADROOM = 1.25
"""Activations and everything else, relative to the weights."""

SHOTS = 4
"""Worked examples in a prompt (the default of prompting)."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of rows, base, machine and use. Tokens per row are medians; `memory` is in bytes, None: unknown.

    `rows` counts those with a completion to learn; `kind` and `labels` are theirs, as an evaluation sees them.
    """

    rows: int = 0
    kind: str | None = None
    labels: int = 0
    comparisons: int = 0
    judged: int = 0
    rated: int = 0
    attributes: tuple[str, ...] = ()
    documents: int = 0
    retrievals: int = 0
    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    longest_row: int = 0
    content_hash: str = ""
    base: str = "tailor-nano"
    base_parameters: int = 0
    context: int = 0
    memory: int | None = None
    gpu: bool = False
    changes: Changes = "never"
    customizations: int = 1

    @property
    def small(self) -> bool:
        """Whether the base is small (SMALL_BASE). One that tells no size (0) is a hosted one, and counts as large."""
        return 0 < self.base_parameters < SMALL_BASE


class Standing(IntEnum):
    """How well a technique suits the facts, best first."""

    ENOUGH = 0
    FEW = 1
    APART = 2
    TOO_FEW = 3
    WEAK = 4
    EXCLUDED = 5


@dataclass(frozen=True)
class Step:
    """A step of the ladder. `steers` says that it works through the prompt and leaves the base as it is."""

    family: str
    promise: str
    steers: bool


LADDER = (
    Step("prompt engineering", "trains nothing: the least effort, fair accuracy, longer prompts", True),
    Step("prompt learning", "trains a few vectors in front of the prompt: little effort, good accuracy", True),
    Step("parameter-efficient fine-tuning", "trains few added weights: moderate effort, better accuracy", False),
    Step("full fine-tuning", "trains every weight: the most effort, the best accuracy where rows allow", False),
)
"""From the least data, effort and accuracy to the most."""


def step_of(traits: Traits) -> int:
    """The index of a technique's step in LADDER."""
    if traits.defaults is None:
        return 0
    if not traits.frozen_base:
        return 3
    return 1 if traits.where in ("embedding", "attention") else 2


def rows_needed(traits: Traits, facts: Facts) -> tuple[int, int]:
    """(too few below, comfortable from). On a small base every weight can be trained from the smaller number on."""
    minimum, comfortable = traits.rows
    return (minimum, minimum) if facts.small and not traits.frozen_base else (minimum, comfortable)


Finding = tuple[Standing, str]
Check = Callable[[Facts, Traits], Finding | None]


def _rows(facts: Facts, traits: Traits) -> Finding:
    minimum, comfortable = rows_needed(traits, facts)
    rows = f"{facts.rows:,} row{'s' * (facts.rows != 1)}"
    if facts.rows >= comfortable:
        small = facts.small and not traits.frozen_base
        why = f" on a base of {count(facts.base_parameters)} parameters" if small else ""
        return Standing.ENOUGH, f"{rows}: comfortable from {comfortable:,}{why}"
    if facts.rows >= minimum:
        return Standing.FEW, f"{rows}: possible from {minimum:,}, comfortable from {comfortable:,}"
    return Standing.TOO_FEW, f"{rows}: too few, it takes {minimum:,} at least"


def _memory(facts: Facts, traits: Traits) -> Finding | None:
    weight = TRAINING_BYTES if not traits.frozen_base else 2 if facts.gpu else 4
    need = facts.base_parameters * weight * HEADROOM
    if facts.memory is None or need <= facts.memory:
        return None
    what = "training every weight of" if not traits.frozen_base else "holding"
    room = f"about {size(need)}, and there are {size(facts.memory)}"
    return Standing.EXCLUDED, f"does not fit: {what} {count(facts.base_parameters)} parameters takes {room}"


def _steering(facts: Facts, traits: Traits) -> Finding | None:
    if not (LADDER[step_of(traits)].steers and facts.small):
        return None
    small = f"a base of {count(facts.base_parameters)} parameters hardly follows what stands in its prompt"
    return Standing.WEAK, f"{small} (that takes about {count(SMALL_BASE)})"


def _context(facts: Facts, traits: Traits) -> Finding | None:
    need = (SHOTS + 1) * (facts.prompt_tokens + facts.completion_tokens)
    if step_of(traits) != 0 or need <= facts.context:
        return None
    return (
        Standing.WEAK,
        f"{SHOTS} worked examples and a prompt take {need:,.0f} tokens, the context has {facts.context:,}",
    )


def _side_by_side(facts: Facts, traits: Traits) -> Finding | None:
    if facts.customizations < 2 or traits.mixes:
        return None
    copies = f"{facts.customizations} customizations are {facts.customizations} whole copies of the base"
    room = size(facts.customizations * facts.base_parameters * (2 if facts.gpu else 4))
    return Standing.APART, f"{copies} ({room}) that cannot share a batch"


CHECKS: tuple[Check, ...] = (_rows, _memory, _steering, _context, _side_by_side)
"""Each looks at one thing; the worst finding is the technique's standing."""


@dataclass(frozen=True)
class Choice:
    """One thing to do; `available` says that this tailor can do it.

    `name` is a technique's and has a `standing`, or that of other advice, which may come with an `objective`.
    """

    name: str
    title: str
    available: bool
    reasons: tuple[str, ...]
    standing: Standing | None = None
    objective: str | None = None


def by_ladder(facts: Facts, techniques: Mapping[str, Traits]) -> list[Choice]:
    """The techniques by the ladder alone, best first."""
    placed = []
    for index, (name, traits) in enumerate(techniques.items()):
        findings = [finding for check in CHECKS if (finding := check(facts, traits)) is not None]
        standing = max(standing for standing, _ in findings)
        step = step_of(traits)
        lacking = traits.rows[0] if standing == Standing.TOO_FEW else 0
        # of one step the last comes first: the registry goes from less to more that is trained
        key = (standing, lacking, -step, not traits.merges, -index)
        worst_first = sorted(findings, key=lambda finding: -finding[0])
        reasons = [*(reason for _, reason in worst_first), LADDER[step].promise]
        if traits.merges and standing < Standing.TOO_FEW:
            reasons.append("merges into the base: no extra latency")
        title = f"{name} ({LADDER[step].family})"
        placed.append((key, Choice(name, title, True, tuple(reasons), standing)))
    return [choice for _, choice in sorted(placed, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Advice:
    """What rows of another kind, or knowledge that changes, ask for. `objective` is what tailor would need for it."""

    name: str
    title: str
    objective: str | None
    applies: Callable[[Facts], bool]
    reason: Callable[[Facts], str]


ADVICE = (
    Advice(
        "rag",
        "retrieval-augmented generation",
        None,
        lambda f: f.documents > 0 or f.retrievals > 0 or f.changes != "never",
        lambda f: _why_rag(f),
    ),
    Advice(
        "dpo",
        "direct preference optimisation",
        "dpo",
        lambda f: f.comparisons > 0,
        lambda f: f"{f.comparisons:,} preferences (chosen over rejected): it learns from the pairs themselves",
    ),
    Advice(
        "rlhf",
        "reinforcement learning with human feedback",
        "ppo",
        lambda f: f.comparisons > 0,
        lambda f: (
            f"{f.comparisons:,} preferences teach a reward model, and that the base (PPO); the usual scale is "
            "100,000 ranked answers, and fine-tuning on good answers comes first"
        ),
    ),
    Advice(
        "kto",
        "optimisation on yes/no judgements (KTO)",
        "kto",
        lambda f: f.judged > 0,
        lambda f: f"{f.judged:,} answers judged good or bad, without a counterpart each",
    ),
    Advice(
        "steerlm",
        "SteerLM",
        "attributes",
        lambda f: f.rated > 0,
        lambda f: f"{f.rated:,} answers rated for {', '.join(f.attributes)}: answers can be asked for by attribute",
    ),
    Advice(
        "pretraining",
        "continued pretraining",
        "pretraining",
        lambda f: f.documents > 0,
        lambda f: (
            f"{f.documents:,} documents teach the words of a domain, not how to answer; facts are better looked up"
        ),
    ),
)
"""In the order in which they are offered."""


def _why_rag(facts: Facts) -> str:
    found = []
    if facts.changes != "never":
        weights = (
            "faster than weights can follow" if facts.changes == "daily" else "and each change would mean training"
        )
        found.append(f"the knowledge changes {facts.changes}, {weights}: look it up when it is asked for")
    if facts.documents:
        found.append(f"{facts.documents:,} documents can be looked up as they are")
    if facts.retrievals:
        found.append(f"{facts.retrievals:,} questions with the passage that answers them show how good the search is")
    return "; ".join(found)


def advice(facts: Facts, objectives: Collection[str]) -> list[Choice]:
    """What is to be done beside or instead of learning from completions."""
    found = []
    for one in ADVICE:
        if one.applies(facts):
            available = one.objective in objectives
            found.append(Choice(one.name, one.title, available, (one.reason(facts),), objective=one.objective))
    return found
