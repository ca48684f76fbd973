"""What finished comparisons measured, as evidence for `tailor recommend`, and how it overrules the ladder.

What was measured on the same rows decides. What was measured on similar rows decides when the difference is not small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tailor.evaluation.drawing.quantities import score
from tailor.recipes.recommend_rule import Choice, Facts, Standing, advice, by_ladder
from tailor.techniques.technique import Traits

SIMILAR_SIZE = 4.0
"""Measurements with up to so many times more or fewer rows (or parameters of the base) are taken as similar."""

MARGIN = 0.02
"""Share of the best score by which a technique must lead in similar comparisons, noise aside, to be put first."""


@dataclass(frozen=True)
class Evidence:
    """What one comparison measured on one base with `size` rows: `scores` by technique, in any order.

    `same_rows` says that these very rows were compared. `pick` is the verdict's choice among the techniques at this
    size; `untrained` is set where it chose what trains nothing instead (the plain base, a classifier); `headline` is
    its first sentence. `errors` are half the widths of the scores' intervals, 0 where they are not known.
    """

    comparison: str
    same_rows: bool
    kind: str
    base: str
    base_parameters: int
    size: int
    metric: str
    higher_is_better: bool
    scores: Mapping[str, float]
    errors: Mapping[str, float] = field(default_factory=dict)
    pick: str | None = None
    untrained: str | None = None
    headline: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """Every score as a share of the best; {} where nothing was learned at all."""
        good = [score for score in self.scores.values() if score > 0]
        if not good:
            return {}
        best = max(good) if self.higher_is_better else min(good)
        if self.higher_is_better:
            return {name: max(score, 0.0) / best for name, score in self.scores.items()}
        return {name: best / score for name, score in self.scores.items() if score > 0}

    def lead(self, name: str, other: str) -> tuple[float, float]:
        """By which share of the best score `name` leads `other`, and how much of that may be noise.

        The noise is that of two independent intervals: more than the paired difference over the same rows has.
        """
        shares = self.shares
        best = max(self.scores.values()) if self.higher_is_better else min(s for s in self.scores.values() if s > 0)
        noise = math.hypot(self.errors.get(name, 0.0), self.errors.get(other, 0.0)) / best
        return shares[name] - shares[other], noise


@dataclass(frozen=True)
class Ranking:
    """The choices, best first, who decided the first technique, and what was measured before in a sentence or two."""

    choices: tuple[Choice, ...]
    decided_by: Literal["rule", "same rows", "similar rows"]
    measured: tuple[str, ...] = ()

    @property
    def first_technique(self) -> str | None:
        """The technique to try first; None when there are no rows to learn from."""
        return next((choice.name for choice in self.choices if choice.standing is not None), None)


def rank(
    facts: Facts,
    techniques: Mapping[str, Traits],
    objectives: Collection[str],
    evidence: Sequence[Evidence] = (),
) -> Ranking:
    """What to try, best first. `techniques` and `objectives` are those this tailor has."""
    found = by_ladder(facts, techniques) if facts.rows else []
    others = advice(facts, objectives)
    ranking = _by_measurement(facts, found, evidence) if found else Ranking((), "rule")
    ahead = [choice for choice in others if choice.name == "rag" and facts.changes == "daily"]
    behind = [choice for choice in others if choice not in ahead]
    return replace(ranking, choices=(*ahead, *ranking.choices, *behind))


def _by_measurement(facts: Facts, choices: list[Choice], evidence: Sequence[Evidence]) -> Ranking:
    names = {choice.name for choice in choices}
    same = [one for one in evidence if one.same_rows and names & set(one.scores)]
    own = [one for one in same if one.base == facts.base]
    elsewhere = {one.comparison: one for one in same if one.base != facts.base}
    if own:
        ranking = _by_own(choices, max(own, key=lambda one: one.size))
    else:
        ranking = _by_similar(choices, similar(facts, evidence))
    more = (f"{one.comparison} measured these rows on {one.base}: {one.headline}" for one in elsewhere.values())
    return replace(ranking, measured=(*ranking.measured, *more))


def _possible(choice: Choice) -> bool:
    return choice.standing not in (Standing.EXCLUDED, Standing.APART)


def _by_own(choices: list[Choice], own: Evidence) -> Ranking:
    """The verdict's order. What does not fit, or cannot be served side by side, stays behind what does."""

    def key(choice: Choice) -> tuple[bool, bool, bool, float]:
        measured = choice.name in own.scores
        gain = own.scores[choice.name] * (-1 if own.higher_is_better else 1) if measured else 0.0
        return not _possible(choice), not measured, choice.name != own.pick, gain

    told = []
    for choice in sorted(choices, key=key):
        found = [f"measured on these rows: {_score(own, choice.name)}"] if choice.name in own.scores else []
        told.append(replace(choice, reasons=(*found, *choice.reasons)))
    if own.untrained is not None:
        told.insert(0, Choice(own.untrained, own.untrained, True, (own.headline,)))
    sentence = f"{own.comparison} measured these rows, with {own.size:,} to learn from: {own.headline}"
    return Ranking(tuple(told), "same rows", (sentence,))


def _score(evidence: Evidence, name: str) -> str:
    return f"{evidence.metric} {score(evidence.scores[name])}"


def similar(facts: Facts, evidence: Sequence[Evidence]) -> list[Evidence]:
    """Measurements of the same kind of task with similarly many rows on a similarly large base, closest first.

    Of each comparison and base the closest size counts.
    """
    near: dict[tuple[str, str], tuple[float, Evidence]] = {}
    for one in evidence:
        distance = abs(math.log(max(one.size, 1) / max(facts.rows, 1)))
        bases = abs(math.log(max(one.base_parameters, 1) / max(facts.base_parameters, 1)))
        alike = one.kind == facts.kind and max(distance, bases) <= math.log(SIMILAR_SIZE)
        key = (one.comparison, one.base)
        if alike and one.shares and (key not in near or distance < near[key][0]):
            near[key] = (distance, one)
    return [one for _, one in sorted(near.values(), key=lambda pair: pair[0])]


def _by_similar(choices: list[Choice], found: Sequence[Evidence]) -> Ranking:
    first = choices[0]
    counted = [one for one in found if first.name in one.shares]
    leads: dict[str, tuple[float, float]] = {}
    for choice in filter(_possible, choices[1:]):
        pairs = [one.lead(choice.name, first.name) for one in counted if choice.name in one.shares]
        if pairs:
            leads[choice.name] = fmean(lead for lead, _ in pairs), math.hypot(*(n for _, n in pairs)) / len(pairs)
    if not leads:
        return Ranking(tuple(choices), "rule")
    best = max(leads, key=lambda name: leads[name][0])
    lead, noise = leads[best]
    told = (_told(counted, [first.name, *leads]),)
    if lead < max(MARGIN, noise):
        return Ranking(tuple(choices), "rule", told)
    why = f"put before {first.name}, which the rule alone would try first, because it did better where it was measured"
    moved = [replace(choice, reasons=(why, *choice.reasons)) for choice in choices if choice.name == best]
    return Ranking((*moved, *(choice for choice in choices if choice.name != best)), "similar rows", told)


def _told(counted: Sequence[Evidence], names: Sequence[str]) -> str:
    closest, more = counted[0], len(counted) - 1
    which = f"{closest.comparison} ({closest.kind}, {closest.size:,} rows)"
    others = f" and {more} more of this kind" if more else ""
    means = {name: fmean(one.shares[name] for one in counted if name in one.shares) for name in names}
    shares = [f"{name} {100 * means[name]:.0f} %" for name in sorted(means, key=lambda name: -means[name])]
    return f"similar rows were measured in {which}{others}; share of the best score: {', '.join(shares)}"


def measured(folder: Path, content_hash: str = "") -> tuple[list[Evidence], list[str]]:
    """What the reports under `folder` (`*/report.json`) measured, newest first, and which of them cannot be read.

    A report whose training file has `content_hash` (SHA-256) is about the same rows.
    """
    found: list[tuple[str, list[Evidence]]] = []
    unread = []
    for path in sorted(folder.glob("*/report.json")):
        try:
            report = json.loads(path.read_bytes())
            found.append((str(report["created"]), list(evidence(report, content_hash))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            unread.append(f"{path} is left aside: not a report of a comparison ({type(error).__name__}: {error})")
    newest = sorted(found, key=lambda pair: pair[0], reverse=True)
    return [one for _, parts in newest for one in parts], unread


def evidence(report: Mapping[str, Any], content_hash: str = "") -> Iterator[Evidence]:
    """One piece per base and size; the verdict goes with the largest size. Raises KeyError, TypeError for no report.

    Of entries that vary one technique the best counts; entries that combine techniques have no place on the ladder.
    """
    data, metric = report["data"], report["metric"]
    same = bool(content_hash) and str(data["content_hash"]).split("+")[0] == content_hash
    higher = bool(metric["higher_is_better"])
    rows = {row["id"]: row for row in report["rows"] if row["kind"] == "technique" and len(row["settings"]) == 1}
    types = {key: str(row["settings"][0]["type"]) for key, row in rows.items()}
    scores: dict[tuple[str, int], dict[str, float]] = {}
    errors: dict[tuple[str, int], dict[str, float]] = {}
    for curve in report["curves"]:
        if curve["id"] not in rows:
            continue
        name, base = types[curve["id"]], str(rows[curve["id"]]["base"])
        for point in curve["points"]:
            if point["mean"] is None:
                continue
            at, score = scores.setdefault((base, int(point["size"])), {}), float(point["mean"])
            if name not in at or (score > at[name]) == higher:
                at[name] = score
                low, high = point.get("low"), point.get("high")
                known = low is not None and high is not None
                errors.setdefault((base, int(point["size"])), {})[name] = (high - low) / 2 if known else 0.0
    parameters = {str(row["base"]): int(row["base_parameters"] or 0) for row in rows.values()}
    verdict = report["verdict"]
    picked = {row["id"]: row for row in report["rows"]}.get(verdict["pick"])
    largest = max((size for _, size in scores), default=0)
    for (base, size), by_name in scores.items():
        decided = picked if size == largest and picked is not None and picked["base"] in (base, None) else None
        yield Evidence(
            comparison=str(report["name"]),
            same_rows=same,
            kind=str(data["kind"]),
            base=base,
            base_parameters=parameters[base],
            size=size,
            metric=str(metric["name"]),
            higher_is_better=higher,
            scores=by_name,
            errors=errors[base, size],
            pick=types.get(decided["id"]) if decided is not None else None,
            untrained=_untrained(decided) if decided is not None else None,
            headline=str(verdict["sentences"][0]) if verdict["sentences"] else "",
        )


def _untrained(row: Mapping[str, Any]) -> str | None:
    """The name of a line that is no technique."""
    names = {"base": "the plain base", "baseline": f"{row['name']} (no language model)"}
    return names.get(row["kind"])
