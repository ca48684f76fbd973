"""What a prompt search came to, told on rows that it has not seen: the best prompt beside the one it began with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from tailor.metrics.bootstrap import interval, paired_difference
from tailor.recipes.prompt_score import Candidate, Row, Scorer
from tailor.recipes.prompt_search import Search
from tailor.recipes.prompt_settings import PromptRecipe

Verdict = Literal["better", "no improvement beyond noise", "worse", "start is best"]
ROUNDING = 1e-12


def held_out(
    recipe: PromptRecipe,
    scorer: Scorer,
    rows: Sequence[Row],
    start: Candidate,
    best: Candidate,
    drawn: Candidate | None,
) -> dict[str, Any]:
    """Scores of start, best and drawn shots on the held-out rows, and paired differences of the best from the others.

    `drawn` is what `tailor tune -t prompting` makes without a search; None where no shots are allowed.
    """
    named = {"start": start, "best": best, **({"drawn": drawn} if drawn is not None else {})}
    asked = {candidate.key: candidate for candidate in named.values()}
    answers = dict(zip(asked, scorer.answers(list(asked.values()), rows, "held-out rows"), strict=True))
    found = {name: answers[candidate.key] for name, candidate in named.items()}
    around = partial(interval, confidence=recipe.confidence, seed=recipe.seed)
    apart = partial(paired_difference, confidence=recipe.confidence, seed=recipe.seed)
    report: dict[str, Any] = {
        name: {
            "origin": named[name].origin,
            "score": dataclasses.asdict(around(each.scores)),
            "prompt_tokens": round(each.prompt_tokens, 1),
            "calls_per_row": named[name].calls_per_row,
        }
        for name, each in found.items()
    }
    for other in ("start", "drawn"):
        if other in found:
            difference = apart(found["best"].scores, found[other].scores)
            report[f"best_minus_{other}"] = dataclasses.asdict(difference)
    return report


def verdict_of(start: Candidate, best: Candidate, report: dict[str, Any]) -> Verdict:
    """Whether the best prompt is better than the start, as far as the held-out rows can tell."""
    if best.key == start.key:
        return "start is best"
    difference = report["best_minus_start"]
    if difference["low"] > ROUNDING:
        return "better"
    return "worse" if difference["high"] < -ROUNDING else "no improvement beyond noise"


def sentence(report: dict[str, Any]) -> str:
    """The verdict in words."""
    held, metric, verdict = report["held_out"], report["metric"], report["verdict"]
    rows, selection = report["rows"]["held_out"], report["selection"]
    if verdict == "start is best":
        return (
            f"No prompt did better than the one it began with on the {report['rows']['selection']} selection rows "
            f"({metric} {selection['start']:.3f}): nothing is saved."
        )
    d = held["best_minus_start"]
    change = f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] {metric} on {rows} held-out rows"
    if verdict == "better":
        return f"Better than the prompt it began with: {change}."
    if verdict == "worse":
        return f"Worse than the prompt it began with: {change}. The search was misled by its selection rows; not saved."
    return f"No improvement beyond noise: {change}."


def build_report(
    recipe: PromptRecipe,
    search: Search,
    best: Candidate,
    found: dict[str, Any],
    facts: dict[str, Any],
    num_search_calls: int,
) -> dict[str, Any]:
    """The whole report, as JSON knows it."""
    scorer, start = search.scorer, search.start
    report: dict[str, Any] = {
        "name": recipe.name,
        "base": recipe.base.name,
        "metric": scorer.metric,
        **facts,
        "calls": {
            "budget": recipe.budget,
            "search": num_search_calls,
            "held_out": scorer.journal.num_calls - num_search_calls,
        },
        "selection": {"start": search.mean(start), "best": search.mean(best), "num_prompts": len(search.candidates)},
        "rounds": search.history,
        "held_out": found,
        "verdict": verdict_of(start, best, found),
        "prompt": None if best.technique is None else best.technique.model_dump(mode="json"),
    }
    report["notes"] += _notes(report)
    return report


def _notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know beside the verdict."""
    notes = []
    if not max(line["score"] for told in report["rounds"] for line in told["prompts"]):
        notes.append(
            f"every prompt scores 0 in {report['metric']}, so nothing tells them apart: take another metric (of labels "
            "label_accuracy, of texts token_f1), or a base that can follow a prompt"
        )
    held, selection = report["held_out"], report["selection"]
    best = held["best"]["score"]["mean"]
    if report["verdict"] != "start is best" and selection["best"] > best:
        notes.append(
            f"the best of {selection['num_prompts']} prompts scores {selection['best']:.3f} on the rows it was chosen "
            f"by and {best:.3f} on the held-out rows: the first number is flattered by the choice"
        )
    drawn = held.get("best_minus_drawn")
    if drawn and report["verdict"] == "better" and drawn["low"] <= ROUNDING:
        notes.append(
            "not beyond noise better than shots drawn at random, as `tailor tune -t prompting` makes them without a "
            f"search ({drawn['mean']:+.3f} [{drawn['low']:+.3f}, {drawn['high']:+.3f}])"
        )
    return notes
