"""What follows from a comparison: who ties with the best, which one to take, where lines cross, in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from tailor.evaluation.scoreboard import Difference, Scoreboard

Row = Mapping[str, Any]
"""A line of the report's table."""

FORGETTING = 4 / 3
"""From here on the growth of perplexity on other text is worth a sentence."""

RESOLVABLE = 0.05
"""A difference that a person cares about, on metrics from 0 to 1: test rows that cannot show it are called few."""

FEW_ROWS = 30
"""Below this many test rows the bootstrap's intervals are too narrow to be relied on."""

PROMPT_LEARNING = {"prompt_tuning", "p_tuning", "prefix_tuning"}
"""Techniques that learn a prompt."""


def build_verdict(rows: Sequence[Row], board: Scoreboard, size: int) -> dict[str, Any]:
    """The report's `verdict`.

    `best` has the highest score among techniques and plain bases (the lowest, where lower is better). What differs from
    it by no more than noise is `tied`, baselines included. `pick` is a baseline that beats the best, if there is one;
    otherwise the cheapest (see `cost_order`) of those within one standard error of the best: the one-standard-error
    rule of Breiman et al. 1984, "Classification and Regression Trees", section 3.4.3. A tie alone would be too
    generous: the fewer the test rows, the more ties.
    """
    judged = _Verdict(rows, board, size)
    best, pick = judged.best, judged.pick
    return {
        "best": best["id"] if best else None,
        "tied": [row["id"] for row in judged.tied],
        "pick": pick["id"] if pick else None,
        "sentences": judged.sentences(),
        "differences": [
            {"id": name, "versus": best["id"], "mean": d.mean, "low": d.low, "high": d.high, "tie": d.tie}
            for name, d in judged.differences.items()
            if best
        ],
        "noise": _noise(rows, board),
    }


def cost_order(row: Row) -> tuple[int, int, int]:
    """What is cheaper sorts first.

    A baseline needs no language model; the plain base nothing besides itself; then what trains nothing; then what
    leaves the base frozen (one copy of it serves many tasks); then full tuning. Within each: the smaller base, then
    fewer stored parameters.
    """
    traits = row["traits"] or {}
    if row["kind"] != "technique":
        step = 0 if row["kind"] == "baseline" else 1
    elif row["num_parameters"] == 0:
        step = 2
    else:
        step = 3 if traits.get("frozen_base") else 4
    return step, row["base_parameters"] or 0, row["num_parameters"] or 0


COST_RULE = (
    "the cheapest is taken: no language model before the plain base, untrained before trained, a frozen base before "
    "full tuning, a smaller base before a larger one, then fewer stored parameters."
)


def find_crossovers(rows: Sequence[Row], board: Scoreboard, sizes: Sequence[int]) -> list[str]:
    """Sentences on where one kind of technique overtakes another: data and effort against accuracy.

    At every size the best of each kind stand for it. A crossing is a size from which on (at all larger sizes too) the
    paired difference is beyond noise.
    """
    titles = _titles(rows)
    found: list[str] = []
    measured = [size for size in sizes if any(board.cells(r["id"], size) for r in rows if r["kind"] == "technique")]
    if len(measured) < 2:
        return ["Only one size was measured: several (--sizes 8,64,all) show where techniques cross."]
    for base in dict.fromkeys(row["base"] for row in rows if row["base"] is not None):
        kinds: dict[str, list[str]] = {"untrained": [], "prompt learning": [], "other": [], "full": []}
        for row in rows:
            if row["base"] == base:
                kinds[_kind(row)].append(row["id"])
        kinds["trained"] = kinds["prompt learning"] + kinds["other"] + kinds["full"]
        for above, below, words in (
            ("trained", "untrained", "Prompting stops being enough"),
            ("prompt learning", "untrained", "Prompt learning pays"),
            ("other", "prompt learning", "More than a learned prompt pays"),
            ("full", "other", "Full tuning overtakes"),
        ):
            found += _crossing(kinds[above], kinds[below], words, board, measured, titles)
    return found or [f"No crossing was seen between {measured[0]} and {measured[-1]} rows."]


def _kind(row: Row) -> str:
    types = {settings["type"] for settings in row["settings"]}
    if row["kind"] == "base" or row["num_parameters"] == 0:
        return "untrained"
    if not (row["traits"] or {}).get("frozen_base", True):
        return "full"
    return "prompt learning" if types & PROMPT_LEARNING and types <= PROMPT_LEARNING | {"prompting"} else "other"


def _crossing(
    above: Sequence[str],
    below: Sequence[str],
    words: str,
    board: Scoreboard,
    sizes: Sequence[int],
    titles: Mapping[str, str],
) -> list[str]:
    duels = [(size, *duel) for size in sizes if (duel := _duel(above, below, board, size)) is not None]
    start = next((k for k in range(len(duels)) if all(ahead for *_, ahead in duels[k:])), None)
    if start is None:
        return []
    size, first, second, difference, _ = duels[start]
    since = f"already with {size} rows, the fewest measured" if start == 0 else f"from {size} rows on"
    return [f"{words} {since}: {titles[first]} is ahead of {titles[second]} by {_apart(difference)}."]


def _duel(
    above: Sequence[str], below: Sequence[str], board: Scoreboard, size: int
) -> tuple[str, str, Difference, bool] | None:
    """The best of either side, how far apart they are, and whether the first is ahead beyond noise."""
    first, second = _top(above, board, size), _top(below, board, size)
    difference = board.difference(first, second, size) if first and second else None
    if first is None or second is None or difference is None:
        return None
    return first, second, difference, board.beats(first, second, size)


def _top(names: Sequence[str], board: Scoreboard, size: int) -> str | None:
    scores = {name: score["mean"] for name in names if (score := board.score(name, size))}
    return max(scores, key=lambda name: board.gain(scores[name]), default=None)


class _Verdict:
    """The verdict over the lines that have the deciding metric."""

    def __init__(self, rows: Sequence[Row], board: Scoreboard, size: int) -> None:
        self.rows, self.board, self.size = rows, board, size
        self.titles = _titles(rows)
        self.scored = [row for row in rows if row["status"] == "ok" and row["metrics"].get(board.metric)]
        models = [row for row in self.scored if row["kind"] != "baseline"]
        self.best = max(models, key=self._quality, default=None)
        self.differences: dict[str, Difference] = {}
        for row in self.scored:
            if self.best is not None and row is not self.best:
                found = board.difference(row["id"], self.best["id"], size)
                if found is not None:
                    self.differences[row["id"]] = found
        ties = {name for name, difference in self.differences.items() if difference.tie}
        self.tied = [row for row in self.scored if row is self.best or row["id"] in ties]
        self.pick = self._pick()

    def _quality(self, row: Row) -> float:
        return self.board.gain(row["metrics"][self.board.metric]["mean"])

    def _pick(self) -> Row | None:
        if self.best is None:
            return None
        better = [row for row in self.scored if self.board.beats(row["id"], self.best["id"], self.size)]
        if better:  # only a baseline can be better than the best of the others
            return max(better, key=self._quality)
        return min(filter(self._near, self.tied), key=lambda row: (cost_order(row), -self._quality(row)))

    def _near(self, row: Row) -> bool:
        return row is self.best or self.board.near(self.differences[row["id"]])

    def sentences(self) -> list[str]:
        if self.best is None or self.pick is None:
            return ["Nothing can be compared: neither a base nor a technique has a score.", *self._failures()]
        return [
            *self._headline(self.best, self.pick),
            *self._other_ties(self.best, self.pick),
            *self._against_base(),
            *self._forgetting(self.best, self.pick),
            *self._failures(),
            *self._few_rows(),
        ]

    def _score(self, row: Row) -> str:
        return f"{self.board.metric} {_interval(row['metrics'][self.board.metric])}"

    def _headline(self, best: Row, pick: Row) -> list[str]:
        title, score = self.titles[best["id"]], self._score(best)
        own = self.titles[pick["id"]]
        if not any(row["kind"] == "technique" for row in self.scored):
            beside = f", and {own} {self._score(pick)}" if pick is not best else ""
            return [f"No technique has a score: {title} alone reaches {score}{beside}."]
        if pick["kind"] == "baseline":
            return [self._baseline_headline(best, pick)]
        if pick["kind"] == "base" and best is pick:
            return [f"Nothing needs training for this: {title} is best as it is, with {score}."]
        plain = self._plain(best)
        against = f" against {_number(plain)} for {self._plain_title(best)}" if plain is not None else ""
        lead = f"{_sentence(title)} is best: {score}{against}."
        if pick is best:
            return [lead]
        tie = f"{_sentence(own)} ties with it ({self._noise_of(pick)}) and {_saving(pick, best)}: take {own}."
        return [f"{lead} {tie}"]

    def _baseline_headline(self, best: Row, pick: Row) -> str:
        title, own = self.titles[best["id"]], self.titles[pick["id"]]
        difference = self.differences[pick["id"]]
        lead = self._needs_no_tuning(best)
        if difference.tie:
            return (
                f"{lead}, as far as {self._num_rows()} test rows show: {own} reaches "
                f"{self._score(pick)} without a language model, and ties with the best, {title}, "
                f"{self._score(best)} ({self._noise_of(pick)})."
            )
        return (
            f"{lead}: {own} reaches {self._score(pick)} without a language model, more than "
            f"the best of the others, {title}, {self._score(best)}."
        )

    def _needs_no_tuning(self, best: Row) -> str:
        """Where a text follows the label, a baseline copies it from a training row: the score speaks of the label."""
        cells = self.board.cells(best["id"], self.size)
        kind = cells[0]["evaluation"].get("kind") if cells else None
        if kind in ("labels and text", "answers and text"):
            return f"For the {self.board.metric} alone no model needs tuning (a baseline's texts are copies)"
        return "No model needs tuning for this"

    def _noise_of(self, row: Row) -> str:
        return f"difference {_apart(self.differences[row['id']])} is within the noise"

    def _plain_row(self, row: Row) -> Row | None:
        return next((r for r in self.scored if r["kind"] == "base" and r["base"] == row["base"]), None)

    def _plain(self, row: Row) -> float | None:
        plain = self._plain_row(row)
        return None if plain is None or plain is row else float(plain["metrics"][self.board.metric]["mean"])

    def _plain_title(self, row: Row) -> str:
        plain = self._plain_row(row)
        return self.titles[plain["id"]] if plain else "the base"

    def _other_ties(self, best: Row, pick: Row) -> list[str]:
        """Those near enough to be taken, but no cheaper than the pick; then those that are too far behind for it."""
        others = [row for row in self.tied if row is not best and row is not pick]
        sentences: list[str] = []
        for near, behind in ((True, ""), (False, ", but more than one standard error behind it")):
            alike = [row for row in others if self._near(row) is near]
            if names := [f"{self.titles[row['id']]} ({_apart(self.differences[row['id']])})" for row in alike]:
                opening = "Also within" if sentences or pick is not best else "Within"
                sentences.append(f"{opening} the noise of the best{behind}: {_listed(names)}.")
        return sentences

    def _against_base(self) -> list[str]:
        """Bases on which no technique, or not every technique, is better than doing nothing."""
        sentences = []
        for plain in (row for row in self.scored if row["kind"] == "base"):
            name = self.titles[plain["id"]]
            own = [row for row in self.scored if row["kind"] == "technique" and row["base"] == plain["base"]]
            found = {row["id"]: self.board.difference(row["id"], plain["id"], self.size) for row in own}
            if own and all(difference is not None and difference.tie for difference in found.values()):
                sentences.append(f"Every technique ties with {name}: no difference is beyond the noise.")
            worse = [self.titles[r["id"]] for r in own if self.board.beats(plain["id"], r["id"], self.size)]
            if worse:
                sentences.append(f"Worse than {name}, beyond the noise: {_listed(worse)}.")
        return sentences

    def _forgetting(self, best: Row, pick: Row) -> list[str]:
        sentences = []
        for row in dict.fromkeys((pick["id"], best["id"])):
            found = next(r for r in self.rows if r["id"] == row)["forgetting"]
            if found and found["ratio"] > FORGETTING:
                sentences.append(
                    f"{_sentence(self.titles[row])} forgets: its perplexity on other text grows from "
                    f"{_number(found['before'])} to {_number(found['after'])} ({found['ratio']:.1f} times)."
                )
        return sentences

    def _failures(self) -> list[str]:
        return [
            f"{_sentence(self.titles[row['id']])} failed: {(row['error'] or {}).get('message', 'no reason is known')}."
            for row in self.rows
            if row["status"] == "failed"
        ]

    def _num_rows(self) -> int:
        return int(self.scored[0]["metrics"][self.board.metric]["n"])

    def _few_rows(self) -> list[str]:
        """The smallest difference that this many test rows can show: half the width of a typical interval."""
        n = self._num_rows()
        few = [f"With only {n} test rows all intervals are rough."] if n < FEW_ROWS else []
        widths = [d.high - d.low for d in self.differences.values() if d.low is not None and d.high is not None]
        half = median(widths) / 2 if widths else 0.0
        if half <= RESOLVABLE:
            return few
        wanted = n * (half / RESOLVABLE) ** 2  # widths shrink with the square root of the number of rows
        rough = round(wanted, 1 - len(str(int(wanted))))
        return [
            *few,
            f"With {n} test rows, differences below about {half:.2f} cannot be told from noise; to see {RESOLVABLE} "
            f"takes about {rough:,.0f} rows.",
        ]


def _titles(rows: Sequence[Row]) -> dict[str, str]:
    """What a sentence calls each line; with several bases it names the base."""
    several = len({row["base"] for row in rows if row["base"] is not None}) > 1
    titles = {}
    for row in rows:
        if row["kind"] == "baseline":
            titles[row["id"]] = f"the {row['name']} baseline"
        elif row["kind"] == "base":
            titles[row["id"]] = f"the base {row['base']}" if several else "the base"
        else:
            titles[row["id"]] = f"{row['name']} on {row['base']}" if several else row["name"]
    return titles


def _saving(pick: Row, best: Row) -> str:
    """Why the pick is cheaper than the best."""
    if pick["kind"] == "base":
        return "needs no tuning"
    if pick["num_parameters"] == 0:
        return "trains nothing"
    share = (pick["num_parameters"] or 0) / best["num_parameters"] if best["num_parameters"] else 1.0
    if 0 < share < 1:
        return (
            f"stores {100 * share:.0f} % of the parameters"
            if share >= 0.01
            else "stores less than 1 % of the parameters"
        )
    if (pick["base_parameters"] or 0) < (best["base_parameters"] or 0):
        return "runs on a smaller base"
    return "costs less" if cost_order(pick) < cost_order(best) else "costs as much"


def _apart(difference: Difference) -> str:
    """The size of a difference, with its interval turned the same way."""
    if difference.low is None or difference.high is None:
        return _number(abs(difference.mean))
    sign = 1 if difference.mean >= 0 else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return _interval({"mean": sign * difference.mean, "low": low, "high": high})


def _noise(rows: Iterable[Row], board: Scoreboard) -> str:
    share = f"{100 * board.confidence:g} % interval"
    if board.paired:
        drawn = "rows and seeds" if any(len(row["per_seed"]) > 1 for row in rows) else "rows"
        rule = f"the {share} of their difference on the same test rows includes 0 (paired bootstrap over {drawn})"
        among = "within one standard error of the best"
    else:
        rule = f"the {share}s of their {board.metric} overlap (it exists only over the rows together)"
        among = "that tie"
    return f"Two tie when {rule}. Of those {among} {COST_RULE}"


def _interval(score: Mapping[str, float]) -> str:
    digits = 3 if 0 < score["high"] - score["low"] < 0.05 else 2
    mean, low, high = (_number(score[key], digits) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _number(value: float, digits: int = 2) -> str:
    """Two decimals below 10, one above; never -0.00."""
    return f"{round(value, digits) + 0.0:.{digits}f}" if abs(value) < 10 else f"{value:.1f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _sentence(title: str) -> str:
    """The beginning of a sentence: a technique's name keeps its spelling."""
    return f"T{title[1:]}" if title.startswith("the ") else title
