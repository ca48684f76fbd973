"""What the tally of a data file means: findings with severity, lines and a hint."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from tailor.recipes.check_rows import Tally, repeated
from tailor.techniques import TECHNIQUES

Severity = Literal["error", "warning", "info"]

ANSWERED = ("PromptCompletion", "Conversation")
TRAINABLE = (*ANSWERED, "Comparison", "Judged", "Rated")
IMBALANCE = 10.0
"""A label set whose largest label has this many times the rows of the smallest is reported as unbalanced."""

LENGTH_BIAS = 0.65
"""Share of pairs decided the same way by length from which a preference model could learn length instead."""

MIN_PAIRS = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. `error`: tune would refuse. `lines` are of the file at `path`; `details` is for programs."""

    severity: Severity
    code: str
    message: str
    hint: str | None = None
    lines: tuple[int, ...] = ()
    path: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token lengths of one side: how many rows, the spread, and `bins` as (up to this many tokens, rows)."""

    num_rows: int
    min: int
    median: float
    p90: int
    max: int
    bins: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Labels:
    """Completions that form a label set, most frequent first; `ratio` is largest to smallest."""

    counts: Mapping[str, int]
    ratio: float


@dataclass(frozen=True, slots=True)
class Suitability:
    """Whether the rows are enough for a technique: too few below `minimum`, enough from `comfortable`."""

    technique: str
    minimum: int
    comfortable: int
    scale: str
    verdict: Literal["too few", "few", "enough"]


def lengths(values: array[int], edges: Sequence[int]) -> Lengths | None:
    """The distribution of measured lengths; None when there are none."""
    measured = np.frombuffer(values, dtype=np.int32) if len(values) else np.empty(0, dtype=np.int32)
    measured = measured[measured >= 0]
    if not len(measured):
        return None
    below = np.searchsorted(np.sort(measured), edges, side="right")
    bins = tuple(zip(map(int, edges), map(int, np.diff(below, prepend=0)), strict=True))
    p90 = int(np.percentile(measured, 90, method="higher"))
    return Lengths(len(measured), int(measured.min()), float(np.median(measured)), p90, int(measured.max()), bins)


def bin_edges(longest: int) -> list[int]:
    """Powers of two that hold the longest row; at most ten."""
    top = max(longest - 1, 1).bit_length()
    return [1 << k for k in range(max(0, top - 9), top + 1)]


def label_set(tally: Tally) -> Labels | None:
    """The labels when completions are few, short and repeated (twice each on average), else None."""
    counts = tally.labels
    if not counts or tally.num_rows < 4 or 2 * len(counts) > tally.num_rows:
        return None
    ordered = dict(counts.most_common())
    sizes = list(ordered.values())
    return Labels(ordered, sizes[0] / sizes[-1])


def suitability(num_rows: int, chosen: str | None) -> list[Suitability]:
    """Every technique, or the chosen one, against its own claim of how many rows it takes."""
    found = []
    for name in [chosen] if chosen else TECHNIQUES:
        minimum, comfortable = TECHNIQUES[name].traits.rows
        scale = "single digits" if comfortable < 10 else "hundreds" if comfortable < 1000 else "thousands"
        verdict: Literal["too few", "few", "enough"] = "enough"
        if num_rows < comfortable:
            verdict = "too few" if num_rows < minimum else "few"
        found.append(Suitability(name, minimum, comfortable, scale, verdict))
    return found


def findings(tally: Tally, limit: int, chosen: str | None) -> list[Finding]:
    """All findings about the rows of one file."""
    found = [*_refused(tally), *_too_long(tally, limit), *_duplicates(tally), *_noted(tally)]
    labels = label_set(tally)
    found += _contradictions(tally, labels is not None)
    if labels is not None:
        found += _balance(labels)
    found += _length_bias(tally)
    if any(tally.kinds[kind] for kind in TRAINABLE):
        found += _too_few(suitability(tally.num_rows, chosen), tally.num_rows, chosen)
    return found


def leakage(tally: Tally, validation: Tally, path: str) -> list[Finding]:
    """Rows of the validation file whose prompt also stands in the training file."""
    found, told = [], set[int]()
    for how, train, aside in (
        ("the same prompt", tally.prompt, validation.prompt),
        ("the same prompt but for case and white space", tally.normalised_prompt, validation.normalised_prompt),
    ):
        first: dict[int, int] = {}
        wanted = set(aside)
        for line, key in zip(tally.line, train, strict=True):
            if key in wanted:
                first.setdefault(key, line)
        pairs = [
            (line, first[key])
            for line, key in zip(validation.line, aside, strict=True)
            if key in first and line not in told
        ]
        told.update(line for line, _ in pairs)
        if pairs:
            found.append(
                Finding(
                    "warning",
                    "leakage",
                    f"{_rows(len(pairs))} of the validation file {_have(len(pairs))} {how} as a training row: "
                    "their score shows memory, not skill",
                    "take them out of one side, or leave --validation away: the built-in split keeps prompts apart",
                    tuple(line for line, _ in pairs),
                    path,
                    {"pairs": [{"validation": line, "train": other} for line, other in pairs]},
                )
            )
    return found


def _refused(tally: Tally) -> Iterator[Finding]:
    for reason, where in tally.refused.items():
        special = "special token" in reason
        yield Finding(
            "error",
            "special_token" if special else "not_renderable",
            f"{_rows(len(where))} cannot be rendered for this base: {reason}",
            "write it differently, for instance with a space inside" if special else None,
            tuple(where),
        )


def _too_long(tally: Tally, limit: int) -> Iterator[Finding]:
    columns = zip(tally.line, tally.total_tokens, tally.completion_tokens, strict=True)
    over = [(line, total, completion) for line, total, completion in columns if total > limit]
    if not over:
        return
    share = len(over) / tally.num_rows
    if tally.kinds["Document"]:
        message = f"{_rows(len(over))} ({share:.1%}) are longer than {limit} tokens: they would be cut into pieces"
        yield Finding("info", "too_long", message, None, tuple(line for line, _, _ in over))
        return
    yield Finding(
        "warning",
        "too_long",
        f"{_rows(len(over))} ({share:.1%}) {_exceed(len(over))} {limit} tokens: "
        f"{'it' if len(over) == 1 else 'they'} would be truncated or refused",
        "set data.truncation to prompt (drop the start of the prompt) or drop (leave the rows out), or shorten them",
        tuple(line for line, _, _ in over),
        details={"share": share, "limit": limit, "tokens": {line: total for line, total, _ in over}},
    )
    if hopeless := tuple(line for line, _, completion in over if completion >= limit):
        yield Finding(
            "warning",
            "completion_too_long",
            f"{_rows(len(hopeless))} {_have(len(hopeless))} a completion that alone exceeds {limit} tokens",
            "data.truncation: prompt cannot help there; shorten the completion or drop the row",
            hopeless,
        )


def _duplicates(tally: Tally) -> Iterator[Finding]:
    exact = [[tally.line[k] for k in group] for group in repeated(tally.content)]
    near = []
    for group in repeated(tally.normalised_content):
        distinct: dict[int, int] = {}
        for k in group:
            distinct.setdefault(tally.content[k], tally.line[k])
        if len(distinct) > 1:
            near.append(list(distinct.values()))
    for code, how, groups in (
        ("duplicates", "repeat an earlier row exactly", exact),
        ("near_duplicates", "repeat an earlier row but for case and white space", near),
    ):
        if groups:
            again = sorted(line for group in groups for line in group[1:])
            yield Finding(
                "warning",
                code,
                f"{_rows(len(again))} {how if len(again) > 1 else how.replace('repeat', 'repeats')}",
                "a repeated row counts twice in training; remove the copies unless that is meant",
                tuple(again),
                details={"groups": groups},
            )


def _contradictions(tally: Tally, is_labels: bool) -> Iterator[Finding]:
    """The same prompt with different completions: a contradiction among labels, several references otherwise."""
    if not any(tally.kinds[kind] for kind in ANSWERED):
        return
    groups = []
    for group in repeated(tally.normalised_prompt):
        if len({tally.normalised_content[k] for k in group}) > 1:
            groups.append([tally.line[k] for k in group])
    if groups:
        yield Finding(
            "warning" if is_labels else "info",
            "same_prompt",
            f"{_count(len(groups), 'prompt')} {'stands' if len(groups) == 1 else 'stand'} in several rows "
            "with different completions",
            "decide which label is right" if is_labels else "fine when several answers are right",
            tuple(sorted(line for group in groups for line in group)),
            details={"groups": groups},
        )


_NOTES: dict[str, tuple[Severity, str, str | None]] = {
    "blank_prompt": ("warning", "an empty prompt: one-sided rows", "fill the prompt, or remove the rows"),
    "identical_pair": (
        "warning",
        "chosen and rejected that differ only in case or white space",
        "there is nothing to prefer; remove the rows",
    ),
    "last_turn_only": (
        "warning",
        "several answers of which this base can only train the last",
        "set data.trained_turns: last",
    ),
    "prompt_space": (
        "warning",
        "a prompt that ends in a space; this base has no chat template, and its words carry their leading space",
        "move the space to the start of the completion",
    ),
    "no_delimiter": (
        "warning",
        "a prompt that runs into its completion: this base has no chat template, so nothing stands between them",
        "end prompts with a line break or a cue such as 'Answer:'",
    ),
    "completion_space": (
        "info",
        "white space at the end of the completion, which the model will learn to write",
        "strip it unless it is meant",
    ),
}


def _noted(tally: Tally) -> Iterator[Finding]:
    for code, (severity, what, hint) in _NOTES.items():
        if where := tally.noted.get(code):
            yield Finding(severity, code, f"{_rows(len(where))} {_have(len(where))} {what}", hint, tuple(where))


def _balance(labels: Labels) -> Iterator[Finding]:
    counts = labels.counts
    single = [label for label, count in counts.items() if count == 1]
    sizes = list(counts.values())
    yield Finding(
        "warning" if labels.ratio >= IMBALANCE else "info",
        "label_balance",
        f"completions are {_count(len(counts), 'label')}: {sizes[0]} rows for the most frequent, {sizes[-1]} for the "
        f"rarest (ratio {labels.ratio:.1f}, median {statistics.median(sizes):g})",
        "report macro-F1 beside accuracy; collect rows for the rare labels" if labels.ratio >= IMBALANCE else None,
    )
    if single:
        yield Finding(
            "warning",
            "single_row_labels",
            f"{_count(len(single), 'label')} {_have(len(single))} a single row, which stands either in training "
            f"or in validation: {_quoted(single)}",
            "add rows, or merge the labels",
            details={"labels": single},
        )
    spellings: dict[str, list[str]] = defaultdict(list)
    for label in counts:
        spellings[" ".join(label.split()).casefold()].append(label)
    if variants := [group for group in spellings.values() if len(group) > 1]:
        yield Finding(
            "warning",
            "label_spellings",
            f"labels that differ only in case or white space: {'; '.join(map(_quoted, variants[:5]))}",
            "spell each label one way",
            details={"groups": variants},
        )


def _length_bias(tally: Tally) -> Iterator[Finding]:
    pairs = tally.pairs
    if not pairs.num_pairs:
        return
    share = pairs.chosen_longer / pairs.num_pairs
    other = pairs.rejected_longer / pairs.num_pairs
    ratio = pairs.chosen_tokens / max(pairs.rejected_tokens, 1)
    biased = pairs.num_pairs >= MIN_PAIRS and max(share, other) >= LENGTH_BIAS
    yield Finding(
        "warning" if biased else "info",
        "length_bias",
        f"chosen is longer than rejected in {share:.0%} of {_count(pairs.num_pairs, 'pair')}, shorter in {other:.0%} "
        f"({ratio:.2f} times its tokens)",
        "a model may learn length instead of quality; add pairs that length does not decide" if biased else None,
        details={"chosen_longer": share, "rejected_longer": other, "token_ratio": ratio},
    )


def _too_few(found: Iterable[Suitability], num_rows: int, chosen: str | None) -> Iterator[Finding]:
    short = [one for one in found if one.verdict == "too few" or (chosen and one.verdict == "few")]
    if short:
        listed = ", ".join(
            f"{one.technique} ({one.scale}: from {one.minimum}, better {one.comfortable})" for one in short
        )
        yield Finding(
            "warning" if chosen and short[0].verdict == "too few" else "info",
            "too_few_rows",
            f"{_rows(num_rows)} {'is' if num_rows == 1 else 'are'} few for {listed}",
            "prompting works with single digits; add rows for the others",
        )


def kinds_differ(train: Counter[str], validation: Counter[str], path: str) -> list[Finding]:
    """An error when the validation file holds other kinds of record than the training file."""
    if not train or not validation or (set(train) & set(validation)):
        return []
    message = f"the validation file holds {' and '.join(validation)}, the training file {' and '.join(train)}"
    return [Finding("error", "kinds_differ", message, "give both in the same format", path=path)]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _rows(number: int) -> str:
    return _count(number, "row")


def _have(number: int) -> str:
    return "has" if number == 1 else "have"


def _exceed(number: int) -> str:
    return "exceeds" if number == 1 else "exceed"


def _quoted(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 10} more" if len(labels) > 10 else ""
    return ", ".join(map(repr, labels[:10])) + more
