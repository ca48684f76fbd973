"""Is the rule of `tailor recommend` any good? Its pick against always LoRA, always full, and the best in hindsight.

For every public data set and number of rows, the technique that the rule puts first (of those that were measured) gets
the score that a finished comparison measured for it. The rule is asked twice: alone, and with the comparisons of the
*other* data sets as evidence, so that it never sees its own answer. What beats what beyond noise is decided by paired
differences over the test rows; the final answer by a bootstrap over data sets.

    python benchmarks/recommend_rule.py DATA --reports HOME/comparisons [--names banking77 e2e ...]

The comparisons are made by benchmarks/comparisons.py with the same `--home HOME`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from public_data import DATA_SETS, prepare

from tailor.data.readers import read_records
from tailor.evaluation.scoreboard import Scoreboard
from tailor.metrics.bootstrap import interval
from tailor.objectives import OBJECTIVES
from tailor.recipes.base_facts import base_facts
from tailor.recipes.recommend import look, machine_memory
from tailor.recipes.recommend_evidence import Evidence, evidence, rank
from tailor.recipes.recommend_rule import Choice, Facts
from tailor.techniques import TECHNIQUES

STRATEGIES = ("rule", "rule with evidence", "always lora", "always full", "best in hindsight")


@dataclass(frozen=True)
class Measured:
    """A finished comparison of one data set on one base; `folder` holds the report and perhaps its cells."""

    name: str
    report: dict[str, Any]
    folder: Path
    base: str

    def evidence(self) -> list[Evidence]:
        """One piece per size."""
        return [one for one in evidence(self.report) if one.base == self.base]

    def outcome(self, first: str, second: str, size: int) -> str:
        """win, tie or loss of one technique against another at one size: paired over rows where they were kept."""
        if first == second:
            return "same"
        mean, tie = self._difference(first, second, size)
        better = mean > 0 if self.report["metric"]["higher_is_better"] else mean < 0
        return "tie" if tie else "win" if better else "loss"

    def _difference(self, first: str, second: str, size: int) -> tuple[float, bool]:
        cells = [json.loads(path.read_text("utf-8")) for path in sorted((self.folder / "cells").glob("*.json"))]
        if cells:
            board = Scoreboard(
                cells, self.report["metric"]["name"], confidence=self.report["settings"]["confidence"] or 0.95
            )
            found = board.difference(f"{self.base}/{first}", f"{self.base}/{second}", size)
            if found is not None:
                return found.mean, found.tie
        points = {
            curve["id"]: point for curve in self.report["curves"] for point in curve["points"] if point["size"] == size
        }
        one, other = points[f"{self.base}/{first}"], points[f"{self.base}/{second}"]
        return one["mean"] - other["mean"], one["low"] <= other["high"] and other["low"] <= one["high"]


@dataclass(frozen=True)
class Case:
    """One data set at one size: what was measured, what each strategy takes, and how the rule's picks fare."""

    name: str
    size: int
    metric: str
    scores: dict[str, float]
    picks: dict[str, str]
    outcomes: dict[str, str]


def cases(measured: Sequence[Measured], facts: dict[str, Facts]) -> list[Case]:
    """Every data set at every size at which LoRA and something else were measured."""
    traits = {name: one.traits for name, one in TECHNIQUES.items()}
    found = []
    for one in measured:
        others = [piece for other in measured if other.name != one.name for piece in other.evidence()]
        for piece in one.evidence():
            if "lora" not in piece.scores or len(piece.scores) < 2:
                continue
            known = replace(facts[one.name], rows=piece.size, kind=piece.kind)
            best = (max if piece.higher_is_better else min)(piece.scores, key=lambda name: piece.scores[name])
            picks = {
                "rule": _first(rank(known, traits, OBJECTIVES).choices, piece.scores),
                "rule with evidence": _first(rank(known, traits, OBJECTIVES, others).choices, piece.scores),
                "always lora": "lora",
                "always full": "full" if "full" in piece.scores else "lora",
                "best in hindsight": best,
            }
            outcomes = {who: one.outcome(pick, "lora", piece.size) for who, pick in picks.items()}
            found.append(Case(one.name, piece.size, piece.metric, dict(piece.scores), picks, outcomes))
    return found


def _first(choices: Sequence[Choice], scores: Mapping[str, float]) -> str:
    return next(choice.name for choice in choices if choice.name in scores)


def answer(who: str, found: Sequence[Case]) -> str:
    """Whether this strategy beats always LoRA, in one sentence. Data sets are resampled: sizes of one hang together."""
    gains: dict[str, list[float]] = {}
    for case in found:
        gains.setdefault(case.name, []).append(case.scores[case.picks[who]] - case.scores["lora"])
    counts = Counter(case.outcomes[who] for case in found)
    gain = interval([fmean(values) for values in gains.values()])
    told = (
        f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] on average over {gain.n} data set{'s' * (gain.n != 1)}; "
        f"beyond noise better in {counts['win']}, worse in {counts['loss']}, tied in {counts['tie']} "
        f"and the same in {counts['same']} of {len(found)} cases"
    )
    if gain.low > 0:
        return f"Does the pick of the {who} beat always LoRA? Yes: {told}."
    if gain.high < 0:
        return f"Does the pick of the {who} beat always LoRA? No, it is worse: {told}."
    return f"Does the pick of the {who} beat always LoRA? No, not beyond noise: {told}."


def show(found: Sequence[Case]) -> list[str]:
    """The cases, the strategies, the two answers."""
    lines = [f"{'data set':24s} {'rows':>6s} {'rule':14s} {'with evidence':14s} {'scores'}"]
    for case in found:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in sorted(case.scores.items(), key=lambda s: -s[1]))
        rule, informed = case.picks["rule"], case.picks["rule with evidence"]
        lines.append(f"{case.name:24s} {case.size:6d} {rule:14s} {informed:14s} {case.metric}: {scores}")
    lines += ["", f"{'strategy':20s} {'mean':>6s} {'regret':>7s} {'win':>4s} {'tie':>4s} {'loss':>5s} {'same':>5s}"]
    for who in STRATEGIES:
        mean = fmean(case.scores[case.picks[who]] for case in found)
        regret = fmean(case.scores[case.picks["best in hindsight"]] - case.scores[case.picks[who]] for case in found)
        counts = Counter(case.outcomes[who] for case in found)
        outcome = " ".join(f"{counts[what]:{n}d}" for what, n in (("win", 4), ("tie", 4), ("loss", 5), ("same", 5)))
        lines.append(f"{who:20s} {mean:6.3f} {regret:7.3f} {outcome}")
    return [
        *lines,
        "(win, tie, loss: against LoRA, paired over test rows)",
        "",
        *(answer(w, found) for w in STRATEGIES[:2]),
    ]


def load(reports: Path, names: Sequence[str], base: str) -> list[Measured]:
    """The reports that are there and whose scores lie between 0 and 1, higher being better."""
    found = []
    for name in names:
        path = reports / name / "report.json"
        if not path.is_file():
            print(f"{name}: no report")
            continue
        report = json.loads(path.read_text("utf-8"))
        one = Measured(name, report, path.parent, base)
        pieces = one.evidence()
        if not pieces or any(not 0 <= score <= 1 for piece in pieces for score in piece.scores.values()):
            print(f"{name}: left aside, {report['metric']['name']} is no score from 0 to 1 of techniques on {base}")
        elif not report["metric"]["higher_is_better"]:
            print(f"{name}: left aside, of {report['metric']['name']} less is better")
        else:
            found.append(one)
    return found


def main() -> None:
    """Ask the rule about what was measured, print the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--reports", type=Path, help="holds NAME/report.json, and cells for paired answers")
    parser.add_argument("--names", nargs="+", default=list(DATA_SETS), choices=list(DATA_SETS), metavar="NAME")
    parser.add_argument("--base", default="tailor-nano")
    parser.add_argument("--max-train", type=int, default=3000)
    parser.add_argument("--output", type=Path, help="write cases and answers as JSON")
    arguments = parser.parse_args()
    if arguments.folder is None or arguments.reports is None:
        print("skipped: this program needs the folder of the public data sets and --reports (see --help)")
        return
    measured = load(arguments.reports, arguments.names, arguments.base)
    if not measured:
        sys.exit("there is nothing to evaluate")
    memory, gpu = machine_memory()
    base, facts = base_facts(arguments.base), {}
    with tempfile.TemporaryDirectory() as work:
        for one in measured:
            data = prepare(arguments.folder, one.name, Path(work), max_train=arguments.max_train)
            facts[one.name] = look(read_records(data.train), base, data.answer_pattern, memory=memory, gpu=gpu)
    found = cases(measured, facts)
    lines = show(found)
    print("\n".join(lines))
    if arguments.output:
        answers = [answer(who, found) for who in STRATEGIES[:2]]
        kept = {
            "reports": [one.name for one in measured],
            "cases": [asdict(case) for case in found],
            "answers": answers,
        }
        arguments.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
