"""What a comparison leaves behind, made up: a manifest, cells and probes of the shapes that `tailor compare` writes.

All numbers are drawn with a fixed seed. `full` is best, `lora` is close behind it, prompting helps a little.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tailor.metrics.bootstrap import Interval, interval
from tailor.metrics.classification import macro_f1

BASES = ("tailor-nano", "tailor-micro")
SIZES = (8, 64, 275)
NUM_TEST = 90
LABELS = ("card lost", "card arrival", "exchange rate", "top up failed", "refund", "pin blocked")
BASE_PARAMETERS = {"tailor-nano": 1_312_000, "tailor-micro": 5_240_000}
TRAITS: dict[str, dict[str, Any]] = {
    "prompting": {"trains": "nothing", "where": "text", "frozen_base": True, "merges": False, "mixes": True},
    "prompt_tuning": {"trains": "prompt table", "where": "embedding", "frozen_base": True, "merges": False},
    "lora": {"trains": "B·A per target", "where": "linear layers", "frozen_base": True, "merges": True, "mixes": True},
    "full": {"trains": "every weight", "where": "everywhere", "frozen_base": False, "merges": False, "mixes": False},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "prompting": {"type": "prompting", "shots": 4, "selection": "random"},
    "prompt_tuning": {"type": "prompt_tuning", "num_virtual_tokens": 20, "init": "text"},
    "lora": {"type": "lora", "rank": 8, "alpha": 16.0},
    "full": {"type": "full"},
}
ACCURACY: dict[str, tuple[float, float, float]] = {  # at the three sizes
    "base": (0.23, 0.23, 0.23),
    "prompting": (0.28, 0.30, 0.31),
    "prompt_tuning": (0.22, 0.36, 0.41),
    "lora": (0.24, 0.42, 0.63),
    "full": (0.20, 0.43, 0.66),
    "majority": (0.17, 0.17, 0.17),
    "nearest neighbour": (0.25, 0.33, 0.38),
    "tf-idf + logistic regression": (0.22, 0.36, 0.45),
}
SHARE = {"prompting": 0.0, "prompt_tuning": 0.00195, "lora": 0.094, "full": 1.0}
SECONDS = {"prompt_tuning": 14.2, "lora": 21.5, "full": 38.0}
LATENCY: dict[str, tuple[float, float, float]] = {  # time to first token (ms), per token (ms), prompt tokens
    "base": (6.1, 2.4, 21.0),
    "prompting": (14.9, 2.7, 118.0),
    "prompt_tuning": (8.0, 2.5, 41.0),
    "lora": (8.6, 3.3, 21.0),
    "full": (6.2, 2.4, 21.0),
}
BASELINES = ("majority", "nearest neighbour", "tf-idf + logistic regression")


def make_manifest(bases: Sequence[str] = BASES[:1], num_seeds: int = 1, **changes: Any) -> dict[str, Any]:
    """comparison.json of a finished run; `changes` replace whole blocks."""
    return {
        "name": "cards",
        "created": "2026-03-01T12:00:00+00:00",
        "status": "finished",
        "command": "tailor compare cards.jsonl --sizes 8,64,all" + "".join(f" --base {base}" for base in bases),
        "versions": {"python": "3.12.3", "tailor": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "machine": {
            "system": "Linux 6.8 x86_64",
            "cpu": "Example CPU @ 2.60GHz",
            "cores": 2,
            "memory": 16 * 2**30,
            "device": "cpu",
            "dtype": "float32",
            "num_threads": 2,
        },
        "recipe": {
            "name": "cards",
            "base": [{"name": base} for base in bases],
            "techniques": [{"name": name, "technique": [settings]} for name, settings in SETTINGS.items()],
            "sizes": [8, 64, "all"],
            "seeds": num_seeds,
            "tune": True,
            "trials": 3,
            "rate": 0.9,
            "evaluation": {"metrics": "auto", "confidence": 0.95, "seed": 0},
        },
        "data": {
            "train": "cards.jsonl",
            "validation": None,
            "test": None,
            "content_hash": "5d41402abc4b2a76b9719d911017c592",
            "num_rows": 396,
            "num_train": 275,
            "num_validation": 31,
            "num_test": NUM_TEST,
            "notes": ["3 rows are duplicates of others and were left out"],
        },
        "metric": "accuracy",
        "sizes": list(SIZES),
        **changes,
    }


def make_cells(
    bases: Sequence[str] = BASES[:1], num_seeds: int = 1, failed: str | None = None, sizes: Sequence[int] = SIZES
) -> list[dict[str, Any]]:
    """Every cell of the run, smallest size first. The technique called `failed` ran out of memory at the last size."""
    cells = [baseline_cell(name, size, seed) for name in BASELINES for size in sizes for seed in range(num_seeds)]
    for base in bases:
        cells.append(technique_cell(base, "base", sizes[-1], 0))
        for size in sizes:
            for seed in range(num_seeds):
                for name in SETTINGS:
                    broken = name == failed and size == sizes[-1]
                    make = failed_cell if broken else technique_cell
                    cells.append(make(base, name, size, seed))
    return cells


def baseline_cell(name: str, size: int, seed: int) -> dict[str, Any]:
    """A cell that needs no language model."""
    return _cell(None, name, "baseline", size, seed) | _answered(None, name, size, seed)


def technique_cell(base: str, name: str, size: int, seed: int) -> dict[str, Any]:
    """A cell that went well: a technique's, or the plain base's."""
    cell = _cell(base, name, "base" if name == "base" else "technique", size, seed)
    cell |= _answered(base, name, size, seed)
    if name in SETTINGS:
        cell |= {"artifact": f"cards-{name}" if cell["main"] else None}
        cell |= {"artifact_bytes": 4 * cell["num_parameters"] + 812 if cell["main"] else None}
    if name in SECONDS:
        cell |= {"training": _training(name, size), "trials": _trials(name)}
    return cell


def failed_cell(base: str, name: str, size: int, seed: int) -> dict[str, Any]:
    """A cell of a technique that did not finish."""
    error = {"code": "out_of_memory", "message": "training needs more memory than there is", "hint": "lower batch_size"}
    return _cell(base, name, "technique", size, seed) | {"status": "failed", "error": error}


def scored_cell(name: str, scores: Sequence[float], metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    """A cell whose test rows have exactly these scores, for sums that can be done by hand; `changes` replace values."""
    kind = {"base": "base", "majority": "baseline"}.get(name, "technique")
    found = interval(scores)
    outcomes = [
        {
            "source": f"rows.jsonl:{k + 1}",
            "prompt": f"prompt {k}",
            "reference": "right",
            "completion": f"{name} says {score}",
            "answer": "right" if score == 1 else "wrong",
            "scores": {metric: float(score)},
            "finish_reason": "stop",
        }
        for k, score in enumerate(scores)
    ]
    evaluation = _evaluation_of({metric: _as_dict(found)}, len(scores))
    cell = _cell("tailor-nano", name, kind, 275, 0) | {"outcomes": outcomes, "evaluation": evaluation}
    return cell | ({"base": None} if kind == "baseline" else {}) | changes


def make_probes(bases: Sequence[str] = BASES[:1], without: str | None = None) -> list[dict[str, Any]]:
    """One per base, over all techniques but `without` (the one that failed)."""
    names = [name for name in ("base", *SETTINGS) if name != without]
    probes = []
    for base in bases:
        scale = BASE_PARAMETERS[base] / BASE_PARAMETERS["tailor-nano"]
        latency = {name: _latency(*LATENCY[name], scale) for name in names}
        alike = {"passed": True, "max_difference": 2.4e-06, "same_tokens": True}
        mixed = [name for name in names if name not in ("base", "full")]
        probes.append(
            {
                "base": base,
                "latency": latency,
                "merged": {"lora": _latency(6.2, 2.4, 21.0, scale)} if "lora" in names else {},
                "mixed_batch": {
                    "names": mixed,
                    **alike,
                    "per_name": {name: dict(alike) for name in mixed},
                    "num_requests": 8 * len(mixed),
                },
                "forgetting": {
                    name: {"perplexity": perplexity, "num_tokens": 2048}
                    for name, perplexity in {
                        "base": 21.4,
                        "prompting": 21.4,
                        "prompt_tuning": 22.9,
                        "lora": 25.1,
                        "full": 39.8,
                    }.items()
                    if name in names
                },
                "errors": {},
            }
        )
    return probes


def _cell(base: str | None, name: str, kind: str, size: int, seed: int) -> dict[str, Any]:
    parameters = BASE_PARAMETERS[base] if base else None
    validation = max(16, round(size * 31 / 275)) if kind == "technique" else 0
    traits = {"peft": name in ("lora", "prompt_tuning"), "mixes": True} | TRAITS[name] if name in TRAITS else None
    return {
        "base": base,
        "name": name,
        "kind": kind,
        "size": size,
        "seed": seed,
        "main": size == SIZES[-1] and seed == 0,
        "status": "ok",
        "error": None,
        "settings": [SETTINGS[name]] if name in SETTINGS else [],
        "traits": traits,
        "num_parameters": round(SHARE.get(name, 0.0) * (parameters or 0)),
        "base_parameters": parameters,
        "rows": {"train": 0, "validation": 0} if kind == "base" else {"train": size, "validation": validation},
        "training": None,
        "trials": [],
        "evaluation": None,
        "outcomes": [],
        "artifact": None,
        "artifact_bytes": None,
        "notes": [],
    }


def _answered(base: str | None, name: str, size: int, seed: int) -> dict[str, Any]:
    target = ACCURACY[name][SIZES.index(size)] + (0.06 if base == "tailor-micro" and name != "base" else 0.0)
    row_numbers = list(range(NUM_TEST))
    own = random.Random(f"{base}/{name}/{size}/{seed}")
    hard = {k: random.Random(f"row {k}").random() + 0.45 * own.random() for k in row_numbers}
    right = set(sorted(row_numbers, key=hard.__getitem__)[: round(target * NUM_TEST) + own.choice((-1, 0, 0, 1))])
    outcomes = []
    for k in row_numbers:
        reference = LABELS[k % len(LABELS)]
        answer = reference if k in right else own.choice([label for label in LABELS if label != reference])
        if name == "base" and k % 7 == 0 and k not in right:
            answer = "I am not sure what you <mean>"
        outcomes.append(
            {
                "source": f"cards.jsonl:{4 * k + 2}",
                "prompt": f"Message {k}: something about my {reference.split()[0]} & what to do with it?",
                "reference": reference,
                "completion": answer,
                "answer": answer,
                "scores": {"accuracy": float(answer == reference), "perplexity": 1.5 + 6 * (1 - target) * own.random()},
                "finish_reason": "stop",
            }
        )
    return {"outcomes": outcomes, "evaluation": _evaluation(outcomes)}


def _evaluation(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    accuracy = interval([row["scores"]["accuracy"] for row in outcomes], num_resamples=300)
    f1 = macro_f1([row["answer"] for row in outcomes], [row["reference"] for row in outcomes], LABELS)
    perplexity = sum(row["scores"]["perplexity"] for row in outcomes) / len(outcomes)
    metrics = {
        "accuracy": _as_dict(accuracy),
        "macro_f1": _as_dict(Interval(f1, f1 - 0.08, f1 + 0.08, len(outcomes))),
        "perplexity": _as_dict(Interval(perplexity, 0.9 * perplexity, 1.1 * perplexity, len(outcomes))),
    }
    return _evaluation_of(metrics, len(outcomes))


def _evaluation_of(metrics: dict[str, Any], num_rows: int) -> dict[str, Any]:
    return {
        "artifact": None,
        "kind": "labels",
        "reason": "labels: the references have 6 different short values that repeat",
        "num_rows": num_rows,
        "metrics": metrics,
        "notes": [],
        "seconds": 3.2,
    }


def _as_dict(score: Interval) -> dict[str, Any]:
    return {"mean": score.mean, "low": score.low, "high": score.high, "n": score.n}


def _training(name: str, size: int) -> dict[str, Any]:
    share = size / SIZES[-1]
    partner = {"lora": "prompt_tuning", "prompt_tuning": "lora"}.get(name)
    return {
        "seconds": SECONDS[name] * (0.2 + 0.8 * share),
        "pass_seconds": (35.7 if partner else 38.0) * (0.2 + 0.8 * share),
        "num_tokens": 7_000 + 120 * size,
        "num_steps": 40 + size,
        "peak_memory": 310_000_000 if name == "full" else 190_000_000,
        "shared_with": [partner] if partner else [],
        "stopped": "early stopping" if name == "full" else None,
        "best_step": 30 + size,
        "validation_loss": 0.9 - 0.4 * share,
        "learning_rate": {"prompt_tuning": 0.009, "lora": 0.001, "full": 0.0001}[name],
    }


def _trials(name: str) -> list[dict[str, Any]]:
    middle = _training(name, SIZES[-1])["learning_rate"]
    losses: list[float | None] = [0.62, 0.5, None]
    return [
        {"label": f"learning_rate {factor * middle:g}", "validation_loss": loss, "chosen": loss == 0.5}
        for factor, loss in zip((0.3, 1.0, 3.0), losses, strict=True)
    ]


def _latency(first: float, token: float, prompt_tokens: float, scale: float) -> dict[str, Any]:
    completion_tokens = 5.0
    return {
        "time_to_first_token": scale * first / 1000,
        "time_to_first_shared": scale * first / 1000,
        "seconds_per_token": scale * token / 1000,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "seconds_per_request": scale * (first + completion_tokens * token) / 4000,
        "flops_per_request": 2 * scale * BASE_PARAMETERS["tailor-nano"] * (prompt_tokens + completion_tokens),
        "num_requests": 16,
    }
