"""What is said of the techniques, beside what was measured here.

The table is "Comparison of Approaches" in NVIDIA's "Mastering LLM Techniques: Customization". Its words for amounts
have no numbers; the thresholds that turn measured numbers into the same words are in this file, and every word comes
with its number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tailor.evaluation.scoreboard import Scoreboard

Row = Mapping[str, Any]

TECHNIQUES_CLAIMED = ("prompting", "prompt_tuning", "p_tuning", "adapter", "lora", "ia3", "full")
"""The table's columns, by this project's names. Its prompting is few-shot."""

AFTER_MERGING = "No in training, Yes in inference"

CLAIMS: dict[str, dict[str, str]] = {
    column: dict(zip(TECHNIQUES_CLAIMED, words, strict=True))
    for column, words in {
        "Frozen model weights": ("Yes", "Yes", "Yes", "Yes", "Yes", "Yes", "No"),
        "Same model architecture": ("Yes", "Yes", "Yes", "No", AFTER_MERGING, "No", "Yes"),
        "New added parameters": ("Zero", "Limited", "Limited", "Moderate", "Moderate", "Limited", "Large"),
        "Extra inference latency": ("High", "Moderate", "Moderate", "Limited", "Zero", "Limited", "Zero"),
        "Extra inference computation cost": ("High", "Moderate", "Moderate", "Limited", "Zero", "Limited", "Zero"),
        "Multi-task in one inference batch": ("Yes", "Yes", "Yes", "No", "No", "No", "No"),
        "Accuracy": ("Fair", "Good", "Good", "Better", "Better", "Better", "Best"),
        "Training data requested": ("Minimum", "Limited", "Limited", "Moderate", "Moderate", "Moderate", "High"),
        "Training computation cost": ("Zero", "Limited", "Limited", "Moderate", "Moderate", "Moderate", "High"),
    }.items()
}

ACCURACY_ORDER = ("Fair", "Good", "Better", "Best")
DATA_ORDER = ("Minimum", "Limited", "Moderate", "High")

PARAMETER_WORDS = ((0.0, "Zero"), (0.01, "Limited"), (0.20, "Moderate"))
"""Stored parameters as a share of the base's: none, less than 1 %, less than 20 %; beyond that Large."""

EXTRA_WORDS = ((1.1, "Zero"), (1.3, "Limited"), (2.0, "Moderate"))
"""Time or operations as a multiple of the plain base's, up to and including; beyond that High."""

TRAINING_WORDS = ((0.25, "Limited"), (0.75, "Moderate"))
"""Training time as a share of the most expensive technique's of the same base, less than; from there on High."""

ENOUGH = 0.9
"""The rows that a technique asks for: the fewest with which it reaches this share of its own best score."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """A measured value in words and numbers. `agrees` None: compare the word with the claim's, where there is one."""

    measured: str | None
    why: str
    word: str | None = None
    agrees: bool | None = None


@dataclass(frozen=True)
class _Measured:
    """The comparison at one size, as the claims look at it."""

    rows: Sequence[Row]
    board: Scoreboard
    sizes: Sequence[int]
    size: int

    def rivals(self, row: Row) -> list[Row]:
        """The other techniques on the same base that have results."""
        return [
            other
            for other in self.rows
            if other["base"] == row["base"]
            and other["kind"] == "technique"
            and other["status"] == "ok"
            and other is not row
        ]

    def base_id(self, row: Row) -> str | None:
        """The line of the plain base under this one."""
        return next((r["id"] for r in self.rows if r["kind"] == "base" and r["base"] == row["base"]), None)


def build_claims(rows: Sequence[Row], board: Scoreboard, sizes: Sequence[int], size: int) -> list[dict[str, Any]]:
    """The report's `claims`: for each of the table's nine properties, claim, measured value and agreement by line.

    A line that has no place in the table (several techniques on one slot, zero-shot prompting, techniques that the
    table leaves out) shows what was measured, and no claim. `agrees` is None where there is nothing to compare.
    """
    found = _Measured(rows, board, sizes, size)
    techniques = [row for row in rows if row["kind"] == "technique"]
    return [
        {"column": column, "cells": {row["id"]: _cell(column, row, found) for row in techniques}} for column in CLAIMS
    ]


def claim_of(column: str, row: Row) -> str | None:
    """The table's word for the technique of this line, found by its settings' type."""
    settings = row["settings"]
    if len(settings) != 1:
        return None
    if settings[0]["type"] == "prompting" and settings[0].get("shots") == 0:
        return None
    return CLAIMS[column].get(settings[0]["type"])


def _cell(column: str, row: Row, found: _Measured) -> dict[str, Any]:
    claim = claim_of(column, row)
    if row["status"] != "ok":
        return {"claim": claim, "measured": None, "agrees": None, "why": "not measured: it did not finish"}
    finding = _MEASURES[column](row, found)
    agrees = finding.agrees
    if claim is None:
        agrees = None
    elif finding.word is not None:
        agrees = finding.word.casefold() == claim.casefold()
    why = finding.why if claim is not None else f"the table makes no claim for this; {finding.why}"
    return {"claim": claim, "measured": finding.measured, "agrees": agrees, "why": why}


def _unknown(why: str) -> _Finding:
    return _Finding(None, f"not measured: {why}")


def _frozen(row: Row, found: _Measured) -> _Finding:
    if not row["traits"]:
        return _unknown("nothing is known of what it trains")
    trains = row["traits"].get("trains")
    word = "Yes" if row["traits"]["frozen_base"] else "No"
    return _Finding(word, f"what is trained: {trains}", word)


def _architecture(row: Row, found: _Measured) -> _Finding:
    traits = row["traits"]
    if not traits:
        return _unknown("nothing is known of what it changes")
    if not traits["frozen_base"]:
        return _Finding("Yes", "the weights change and the modules stay", "Yes")
    if set(traits["where"].split(", ")) <= {"text", "embedding"}:
        return _Finding("Yes", f"it works on the {traits['where']}, before the first layer", "Yes")
    if traits["merges"]:
        return _Finding(AFTER_MERGING, "it adds modules in training that merge into the base's weights", AFTER_MERGING)
    return _Finding("No", f"it adds to the base at: {traits['where']}", "No")


def _parameters(row: Row, found: _Measured) -> _Finding:
    share = row["parameter_share"]
    if share is None:
        return _unknown("its parameters were not counted")
    word = "Zero" if share == 0 else next((w for limit, w in PARAMETER_WORDS if share < limit), "Large")
    scale = "none is zero, less than 1 % limited, less than 20 % moderate, more is large"
    return _Finding(
        f"{word} ({_percent(share)}, {row['num_parameters']:,})", f"of the base's parameters: {scale}", word
    )


def _latency(row: Row, found: _Measured) -> _Finding:
    keys = {"time_to_first_token": "to the first token", "seconds_per_token": "per token"}
    finding = _extra(row, keys, "time")
    shared = ((row["inference"] or {}).get("ratio") or {}).get("time_to_first_shared")
    if shared is None or finding.measured is None:
        return finding
    text = f"{finding.measured}; once what requests begin with is computed, {shared:.2f} × to the first token"
    return replace(finding, measured=text)


def _computation(row: Row, found: _Measured) -> _Finding:
    return _extra(row, {"flops_per_request": "operations per request"}, "computation")


def _extra(row: Row, keys: Mapping[str, str], what: str) -> _Finding:
    """What it costs beside the plain base; merged where the technique merges and that was measured."""
    inference = row["inference"]
    plain = _in_words(inference["ratio"], keys) if inference else None
    if plain is None:
        return _unknown(f"no probe of its {what}")
    scale = "up to 1.1 times the plain base is zero, 1.3 limited, 2 moderate, more is high"
    if len(keys) > 1:
        scale = f"the slower of the two decides: {scale}"
    merged = _in_words(inference["merged_ratio"], keys) if inference["merged_ratio"] else None
    if merged is None:
        return _Finding(f"{plain[0]} ({plain[1]})", scale, plain[0])
    text = f"{merged[0]} merged ({merged[1]}); {plain[0].lower()} unmerged ({plain[1]})"
    return _Finding(text, f"taken merged; {scale}", merged[0])


def _in_words(ratio: Mapping[str, float | None], keys: Mapping[str, str]) -> tuple[str, str] | None:
    known = {words: value for key, words in keys.items() if (value := ratio.get(key)) is not None}
    if len(known) < len(keys):
        return None
    word = next((word for limit, word in EXTRA_WORDS if max(known.values()) <= limit), "High")
    return word, ", ".join(f"{value:.2f} × {words}" for words, value in known.items())


def _mixing(row: Row, found: _Measured) -> _Finding:
    mixed = row["mixed_batch"]
    if mixed is None:
        if row["traits"] and not row["traits"].get("mixes", True):
            return _Finding("No", "it has the base for itself, so its requests cannot stand beside others", "No")
        return _unknown("no probe with several techniques in one batch")
    apart = f"largest difference {mixed['max_difference']:.1e} nats per token"
    if mixed["passed"]:
        return _Finding(
            f"Yes ({apart})", "tested: in one batch with others its answers are those it gives alone", "Yes"
        )
    return _Finding(
        f"No ({apart})", "tested: in one batch with others its answers differ from those it gives alone", "No"
    )


def _accuracy(row: Row, found: _Measured) -> _Finding:
    """Agrees unless a paired difference beyond noise stands against the table's order."""
    board, score = found.board, row["metrics"].get(found.board.metric)
    if score is None:
        return _unknown(f"it has no {board.metric}")
    rivals = [other for other in found.rivals(row) if other["metrics"].get(board.metric)]
    rank = _ranks([row, *rivals], found)[row["id"]]
    name = "" if board.metric == "accuracy" else f"{board.metric} "
    text = f"{name}{score['mean']:.2f} [{score['low']:.2f}, {score['high']:.2f}], rank {rank} of {1 + len(rivals)}"
    against, compared = [], 0
    for other in rivals:
        claimed = _claimed_order("Accuracy", ACCURACY_ORDER, row, other)
        if claimed == 0:
            continue
        compared += 1
        better, worse = (row, other) if claimed > 0 else (other, row)
        if board.beats(worse["id"], better["id"], found.size):
            against.append(f"{worse['name']} is better than {better['name']} beyond the noise")
    if not compared:
        return _Finding(text, "no other technique of another rank was measured")
    why = "; ".join(against) or "no difference beyond the noise stands against the order that is claimed"
    return _Finding(text, why, agrees=not against)


def _ranks(rows: Sequence[Row], found: _Measured) -> dict[str, int]:
    """Ranks that those share who tie with the best of their group: never better than somebody with a higher score."""
    board = found.board
    ranks: dict[str, int] = {}
    leader, first = "", 1
    ordered = sorted(rows, key=lambda row: -board.gain(row["metrics"][board.metric]["mean"]))
    for place, row in enumerate(ordered, 1):
        if not leader or board.beats(leader, row["id"], found.size):
            leader, first = row["id"], place
        ranks[row["id"]] = first
    return ranks


def _claimed_order(column: str, order: Sequence[str], row: Row, other: Row) -> int:
    """Above 0 when `row` is claimed to come after `other` in `order`; 0 when alike, or when either has no claim."""
    own, its = claim_of(column, row), claim_of(column, other)
    return 0 if own is None or its is None else order.index(own) - order.index(its)


def _data(row: Row, found: _Measured) -> _Finding:
    """Agrees unless one that is said to ask for fewer rows needs more than this one, or the reverse."""
    rows = _rows_needed(row, found)
    if rows is None:
        return _unknown("it takes results with at least two sizes (--sizes)")
    text = f"{rows} rows"
    if not _learned(row, found):
        return _Finding(text, "it is not better than the plain base beyond the noise, so this says little")
    against, compared = [], 0
    for other in found.rivals(row):
        claimed = _claimed_order("Training data requested", DATA_ORDER, row, other)
        its = _rows_needed(other, found)
        if claimed == 0 or its is None or not _learned(other, found):
            continue
        compared += 1
        if (rows - its) * claimed < 0:
            against.append(f"{other['name']} reaches it with {its}")
    if not compared:
        return _Finding(text, f"reaches {100 * ENOUGH:g} % of its own best; nothing of another rank to compare with")
    why = "; ".join(against) or "none that is said to ask for fewer needs more, or the reverse"
    return _Finding(text, f"reaches {100 * ENOUGH:g} % of its own best; {why}", agrees=not against)


def _rows_needed(row: Row, found: _Measured) -> int | None:
    """The smallest measured size with `ENOUGH` of its own best score; None with fewer than two sizes."""
    scores = {size: score["mean"] for size in found.sizes if (score := found.board.score(row["id"], size))}
    if len(scores) < 2:
        return None
    if found.board.higher_is_better:
        return min(size for size, score in scores.items() if score >= ENOUGH * max(scores.values()))
    return min(size for size, score in scores.items() if score * ENOUGH <= min(scores.values()))


def _learned(row: Row, found: _Measured) -> bool:
    """Whether any size made it better than the plain base; what trains nothing need not be."""
    base = found.base_id(row)
    return (
        row["num_parameters"] == 0
        or base is None
        or any(found.board.beats(row["id"], base, size) for size in found.sizes)
    )


def _training_cost(row: Row, found: _Measured) -> _Finding:
    if row["num_parameters"] == 0:
        return _Finding("Zero (nothing is trained)", "it trains nothing", "Zero")
    seconds = _seconds(row)
    others = [time for other in found.rivals(row) if (time := _seconds(other)) is not None]
    if seconds is None:
        return _unknown("its training was not timed")
    if not others:
        return _Finding(f"{seconds:.1f} s", "no other training on this base to compare with")
    share = seconds / max(seconds, *others)
    word = next((word for limit, word in TRAINING_WORDS if share < limit), "High")
    scale = "of the longest training on this base: less than 25 % is limited, less than 75 % moderate, more is high"
    if partners := (row["training"] or {}).get("shared_with"):
        scale += f"; its share of a pass with {', '.join(partners)}"
    return _Finding(f"{word} ({_percent(share)}, {seconds:.1f} s)", scale, word)


def _seconds(row: Row) -> float | None:
    return row["training"]["seconds"] if row["training"] else None


def _percent(share: float) -> str:
    """Three digits, down to a thousandth of a percent."""
    return f"{100 * share:.3g} %" if share == 0 or share >= 1e-5 else "less than 0.001 %"


_MEASURES: dict[str, Callable[[Row, _Measured], _Finding]] = {
    "Frozen model weights": _frozen,
    "Same model architecture": _architecture,
    "New added parameters": _parameters,
    "Extra inference latency": _latency,
    "Extra inference computation cost": _computation,
    "Multi-task in one inference batch": _mixing,
    "Accuracy": _accuracy,
    "Training data requested": _data,
    "Training computation cost": _training_cost,
}
