"""The report of a comparison, from its cells and probes alone: every number once, ready to be drawn.

Nothing is made up: what was not measured is None. An interrupted comparison has a report too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pvariance
from typing import Any

from tailor.evaluation.claims import build_claims
from tailor.evaluation.scoreboard import Scoreboard, row_id
from tailor.evaluation.verdict import build_verdict, find_crossovers

SCHEMA_VERSION = 1

MAX_DISAGREEMENTS = 12
"""Rows shown where techniques disagree."""

MAX_LONE = MAX_DISAGREEMENTS // 3
"""Of these, rows where all but one agree."""

DESCRIPTIONS = {
    "accuracy": "share of test rows whose answer is right",
    "macro_f1": "F1 of every label, averaged over the labels",
    "label_accuracy": "share of test rows where the right label is the most probable one",
    "exact_match": "share of test rows whose answer is the reference, letter by letter",
    "token_f1": "words shared with the reference: F1, averaged over test rows",
    "rouge1": "words shared with the reference: ROUGE-1 F1, averaged over test rows",
    "rouge2": "pairs of words shared with the reference: ROUGE-2 F1, averaged over test rows",
    "rougeL": "longest common sequence of words with the reference: ROUGE-L F1, averaged over test rows",
    "bleu": "BLEU of all answers against their references, from 0 to 100",
    "chrf": "chrF of all answers against their references, from 0 to 100",
    "perplexity": "how surprised the model is by the references, per token: 1 is not at all",
}
_RATIOS = (
    "time_to_first_token",
    "time_to_first_shared",
    "seconds_per_token",
    "prompt_tokens",
    "seconds_per_request",
    "flops_per_request",
    "cost_per_1000",
)
_TIMES = ("seconds", "pass_seconds")
_COUNTS = ("num_tokens", "num_steps", "peak_memory")

Json = Mapping[str, Any]


def build_report(manifest: Json, cells: Sequence[Json], probes: Sequence[Json]) -> dict[str, Any]:
    """Everything that a drawing of the comparison shows.

    The table stands at the largest size that any technique has reached. Scores are averaged over seeds; their
    intervals resample rows and seeds. Raises ConfigError for an unknown metric.
    """
    recipe = manifest.get("recipe") or {}
    evaluation = recipe.get("evaluation") or {}
    confidence = evaluation.get("confidence", 0.95)
    board = Scoreboard(cells, manifest["metric"], confidence=confidence, seed=evaluation.get("seed", 0))
    sizes = sorted(manifest.get("sizes") or {cell["size"] for cell in cells})
    size = _table_size(sizes, cells)
    rows = [_row(name, cells, board, size) for name in _order(recipe, cells)]
    _add_probes(rows, probes, recipe.get("rate"))
    disagreements = _disagreements(rows, board, size)
    measured: Json = next((cell["evaluation"] for cell in cells if cell["evaluation"]), {})
    return {
        "schema_version": SCHEMA_VERSION,
        **{key: manifest.get(key) for key in ("name", "created", "command", "versions", "machine")},
        "data": {**manifest.get("data", {}), "kind": measured.get("kind"), "reason": measured.get("reason")},
        "settings": {
            "sizes": sizes,
            **{key: recipe.get(key) for key in ("seeds", "tune", "trials", "rate")},
            "confidence": confidence,
        },
        "metric": {
            "name": board.metric,
            "higher_is_better": board.higher_is_better,
            "description": DESCRIPTIONS.get(board.metric, board.metric),
        },
        "rows": rows,
        "claims": build_claims(rows, board, sizes, size),
        "verdict": build_verdict(rows, board, size),
        "curves": [_curve(row["id"], board, sizes) for row in rows],
        "crossovers": find_crossovers(rows, board, sizes),
        "disagreements": disagreements,
        "failures": [
            {"id": row_id(cell), "size": cell["size"], "seed": cell["seed"], "error": cell["error"]}
            for cell in cells
            if cell["status"] == "failed"
        ],
        "notes": [*_notes(manifest, board, sizes, size, bool(disagreements)), *_probe_notes(rows, probes)],
    }


def _table_size(sizes: Sequence[int], cells: Sequence[Json]) -> int:
    """The largest size that any technique has reached; an interrupted comparison may not have come to the last."""
    reached = {cell["size"] for cell in cells if cell["kind"] == "technique"}
    return max((size for size in sizes if size in reached), default=max(sizes, default=0))


def _order(recipe: Json, cells: Sequence[Json]) -> list[str]:
    """The lines: baselines, then for every base itself and the techniques in the recipe's order."""
    bases = [base["name"] for base in recipe.get("base") or ()]
    names = ["base", *(entry["name"] for entry in recipe.get("techniques") or ())]

    def place(cell: Json) -> tuple[int, int, int]:
        base = -1 if cell["base"] is None else _index(bases, cell["base"])
        return cell["kind"] != "baseline", base, _index(names, cell["name"])

    return list(dict.fromkeys(row_id(cell) for cell in sorted(cells, key=place)))


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _row(name: str, cells: Sequence[Json], board: Scoreboard, size: int) -> dict[str, Any]:
    own = [cell for cell in cells if row_id(cell) == name]
    done = board.cells(name, size)
    failed = [c for c in own if c["status"] == "failed" and (c["size"] == size or c["kind"] == "base")]
    failed.sort(key=lambda cell: int(cell["seed"]))
    main = (done or failed or own)[0]
    counted = next((cell for cell in (main, *own) if cell["status"] == "ok"), None)  # what failed was not counted
    parameters, base_parameters = counted["num_parameters"] if counted else None, main["base_parameters"]
    known = parameters is not None and bool(base_parameters)
    scores = [cell["evaluation"]["metrics"].get(board.metric) for cell in done]
    status, error = ("ok", None) if done else ("failed", failed[0]["error"]) if failed else ("missing", _missing(size))
    return {
        "id": name,
        **{key: main[key] for key in ("base", "name", "kind", "settings", "traits")},
        "status": status,
        "error": error,
        "notes": _row_notes(done, failed),
        "num_parameters": parameters,
        "base_parameters": base_parameters,
        "parameter_share": parameters / base_parameters if known else None,
        "artifact": main["artifact"],
        "artifact_bytes": main["artifact_bytes"],
        "metrics": {key: board.score(name, size, key) for cell in done[:1] for key in cell["evaluation"]["metrics"]},
        "per_seed": [score["mean"] for score in scores if score],
        "rows_used": main["rows"] if done or failed else None,
        "training": _training(done),
        "trials": list(main["trials"]),
        "inference": None,
        "mixed_batch": None,
        "forgetting": None,
    }


def _missing(size: int) -> dict[str, Any]:
    return {"code": "not_measured", "message": f"not measured with {size} rows", "hint": None}


def _row_notes(done: Sequence[Json], failed: Sequence[Json]) -> list[str]:
    notes = [note for cell in done for note in (*cell["notes"], *cell["evaluation"].get("notes", ()))]
    notes += [note for cell in failed for note in cell["notes"]]
    if done:
        notes += [f"seed {cell['seed']} failed: {(cell['error'] or {}).get('message')}" for cell in failed]
    return list(dict.fromkeys(notes))


def _training(cells: Sequence[Json]) -> dict[str, Any] | None:
    """The first seed's training, with what it cost averaged over the seeds."""
    runs = [cell["training"] for cell in cells if cell["training"]]
    if not runs:
        return None
    means = {key: _mean(run[key] for run in runs) for key in (*_TIMES, *_COUNTS) if key in runs[0]}
    counts = {key: round(mean) for key in _COUNTS if (mean := means.get(key)) is not None}
    return {**runs[0], **means, **counts}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _add_probes(rows: Sequence[dict[str, Any]], probes: Sequence[Json], rate: float | None) -> None:
    """Write what was probed into the rows of its base."""
    found = {probe["base"]: probe for probe in probes}
    for row in rows:
        probe = found.get(row["base"])
        if probe is None or row["base"] is None or row["status"] != "ok":
            continue
        name = row["name"]
        row["inference"] = _inference(name, probe, rate)
        row["mixed_batch"] = _mixed(name, probe.get("mixed_batch"))
        row["forgetting"] = _forgetting(name, probe.get("forgetting") or {})
        if error := (probe.get("errors") or {}).get(name):
            row["notes"].append(f"not probed: {error}")


def _probe_notes(rows: Sequence[Json], probes: Sequence[Json]) -> list[str]:
    """What kept a whole probe from being made; errors of single techniques stand in their rows."""
    names = {row["name"] for row in rows}
    found = [(probe["base"], *item) for probe in probes for item in (probe.get("errors") or {}).items()]
    return [f"no {what} probe on {base}: {error}" for base, what, error in found if what not in names]


def _inference(name: str, probe: Json, rate: float | None) -> dict[str, Any] | None:
    latency = probe.get("latency") or {}
    if not latency.get(name):
        return None
    own, plain = _priced(latency[name], rate), _priced(latency.get("base") or {}, rate)
    merged = (probe.get("merged") or {}).get(name)
    return {
        **own,
        "ratio": _ratio(own, plain),
        "merged_ratio": _ratio(_priced(merged, rate), plain) if merged else None,
    }


def _priced(latency: Json, rate: float | None) -> dict[str, Any]:
    """With the price of a thousand requests at `rate` US dollars per hour of the machine."""
    seconds = latency.get("seconds_per_request")
    price = None if seconds is None or rate is None else seconds * rate / 3600 * 1000
    return {**latency, "cost_per_1000": price}


def _ratio(own: Json, plain: Json) -> dict[str, float | None]:
    return {key: own[key] / plain[key] if own.get(key) is not None and plain.get(key) else None for key in _RATIOS}


def _mixed(name: str, mixed: Json | None) -> dict[str, Any] | None:
    """What came of this technique's requests in the mixed batch."""
    own = (mixed or {}).get("per_name", {}).get(name)
    if mixed is None or own is None:
        return None
    return {
        "passed": own.get("passed", mixed["passed"]),
        **{k: own[k] for k in ("max_difference", "same_tokens")},
    }


def _forgetting(name: str, found: Json) -> dict[str, float] | None:
    if not (found.get(name) and found.get("base")):
        return None
    before, after = found["base"]["perplexity"], found[name]["perplexity"]
    return {"before": before, "after": after, "ratio": after / before}


def _curve(name: str, board: Scoreboard, sizes: Sequence[int]) -> dict[str, Any]:
    points = []
    for size in sizes:
        if (score := board.score(name, size)) is None:
            continue
        cells = board.cells(name, size)
        seconds = _mean(cell["training"]["seconds"] for cell in cells if cell["training"])
        bounds = {key: score[key] for key in ("mean", "low", "high")}
        points.append({"size": size, **bounds, "seconds": seconds, "n_seeds": len(cells)})
    return {"id": name, "points": points}


def _disagreements(rows: Sequence[Json], board: Scoreboard, size: int) -> list[dict[str, Any]]:
    """The test rows on which the techniques (and plain bases) score most differently, by the variance of their scores.

    At most a third of them are rows where all but one agree (given at least four to compare): one technique's
    peculiarities must not hide the others' differences. Equal variances keep the order of the data.
    """
    outcomes = {
        row["id"]: board.cells(row["id"], size)[0]["outcomes"]
        for row in rows
        if row["kind"] != "baseline" and row["status"] == "ok"
    }
    outcomes = {name: found for name, found in outcomes.items() if found}
    metric = _row_metric(board, outcomes)
    if metric is None or len(outcomes) < 2:
        return []
    columns = list(zip(*([row["scores"][metric] for row in found] for found in outcomes.values()), strict=True))
    chosen: list[int] = []
    num_lone = 0
    for k in sorted(range(len(columns)), key=lambda k: -pvariance(columns[k])):
        lone = len(outcomes) >= 4 and _all_but_one(columns[k])
        if len(chosen) == MAX_DISAGREEMENTS or len(set(columns[k])) == 1:
            break
        if lone and num_lone == MAX_LONE:
            continue
        num_lone += lone
        chosen.append(k)
    return [_disagreement(k, outcomes, metric) for k in chosen]


def _row_metric(board: Scoreboard, outcomes: Mapping[str, Sequence[Json]]) -> str | None:
    """The metric that decides, or the first that every row of every technique has."""
    scores = [row["scores"] for found in outcomes.values() for row in found]
    shared = [name for name in (board.metric, *(scores[0] if scores else ())) if all(name in s for s in scores)]
    return shared[0] if shared else None


def _all_but_one(scores: Sequence[float]) -> bool:
    return max(scores.count(score) for score in scores) == len(scores) - 1


def _disagreement(k: int, outcomes: Mapping[str, Sequence[Json]], metric: str) -> dict[str, Any]:
    first = next(iter(outcomes.values()))[k]
    answers = {
        name: {"completion": found[k]["completion"], "answer": found[k]["answer"], "score": found[k]["scores"][metric]}
        for name, found in outcomes.items()
    }
    return {**{key: first[key] for key in ("source", "prompt", "reference")}, "answers": answers}


def _notes(manifest: Json, board: Scoreboard, sizes: Sequence[int], size: int, disagree: bool) -> list[str]:
    notes = []
    if manifest.get("status", "finished") != "finished":
        notes.append(f"the comparison is {manifest['status']}: what is missing here was not measured yet")
    if sizes and size < max(sizes):
        notes.append(f"no technique has come to {max(sizes)} rows: the table stands at {size}")
    if not board.paired:
        notes.append(f"{board.metric} exists only over the rows together: differences have no paired interval")
    if disagree:
        notes.append(
            "disagreements: the test rows whose scores vary most between the techniques and the base, at most "
            f"{MAX_DISAGREEMENTS}; at most {MAX_LONE} of them are rows where only one stands apart"
        )
    return notes
