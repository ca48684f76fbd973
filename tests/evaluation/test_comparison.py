from __future__ import annotations

import json
from typing import Any

import pytest

from comparison_cases import BASES, SIZES, failed_cell, make_cells, make_manifest, make_probes, scored_cell
from tailor.evaluation.comparison import DESCRIPTIONS, MAX_DISAGREEMENTS, build_report
from tailor.evaluation.scores import METRICS
from tailor.metrics.bootstrap import crossed_interval

LORA, FULL, BASE = "tailor-nano/lora", "tailor-nano/full", "tailor-nano/base"
Report = dict[str, Any]


@pytest.fixture(scope="module")
def report() -> Report:
    return build_report(make_manifest(), make_cells(), make_probes())


def rows_of(report: Report) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in report["rows"]}


def right(number: int, of: int = 20) -> list[float]:
    return [1.0] * number + [0.0] * (of - number)


def test_every_metric_is_described() -> None:
    assert set(DESCRIPTIONS) == set(METRICS)


def test_a_report_is_json_and_the_same_every_time(report: Report) -> None:
    again = build_report(make_manifest(), make_cells(), make_probes())
    assert json.loads(json.dumps(report, allow_nan=False)) == again


def test_head(report: Report) -> None:
    manifest = make_manifest()
    assert report["schema_version"] == 1
    assert {key: report[key] for key in ("name", "created", "command", "versions", "machine")} == {
        key: manifest[key] for key in ("name", "created", "command", "versions", "machine")
    }
    assert report["data"] == {
        **manifest["data"],
        "kind": "labels",
        "reason": "labels: the references have 6 different short values that repeat",
    }
    assert report["settings"] == {
        "sizes": [8, 64, 275],
        "seeds": 1,
        "tune": True,
        "trials": 3,
        "rate": 0.9,
        "confidence": 0.95,
    }
    assert report["metric"]["name"] == "accuracy"
    assert report["metric"]["higher_is_better"] is True


def test_lines_stand_in_the_recipe_s_order_whatever_the_order_of_the_cells() -> None:
    cells = make_cells(BASES)[::-1]
    names = ["base", "prompting", "prompt_tuning", "lora", "full"]
    found = build_report(make_manifest(BASES), cells, make_probes(BASES))["rows"]
    assert {row["id"] for row in found[:3]} == {
        "baseline/majority",
        "baseline/nearest neighbour",
        "baseline/tf-idf + logistic regression",
    }
    assert [row["id"] for row in found[3:]] == [f"{base}/{name}" for base in BASES for name in names]


def test_a_line_holds_what_its_main_cell_measured(report: Report) -> None:
    row = rows_of(report)[LORA]
    cell = next(cell for cell in make_cells() if cell["name"] == "lora" and cell["main"])
    for key in ("base", "name", "kind", "settings", "traits", "num_parameters", "artifact", "artifact_bytes", "trials"):
        assert row[key] == cell[key], key
    assert row["metrics"] == cell["evaluation"]["metrics"]
    assert row["training"] == cell["training"]
    assert row["rows_used"] == {"train": 275, "validation": 31}
    assert row["parameter_share"] == cell["num_parameters"] / cell["base_parameters"]
    assert row["per_seed"] == [cell["evaluation"]["metrics"]["accuracy"]["mean"]]
    assert (row["status"], row["error"]) == ("ok", None)


def test_baselines_have_no_model(report: Report) -> None:
    row = rows_of(report)["baseline/majority"]
    keys = ("parameter_share", "base_parameters", "inference", "mixed_batch", "forgetting", "training", "artifact")
    assert [row[key] for key in keys] == [None] * len(keys)


def test_probes_become_ratios_and_prices(report: Report) -> None:
    rows = rows_of(report)
    lora, base = rows[LORA]["inference"], rows[BASE]["inference"]
    assert lora["ratio"]["time_to_first_token"] == pytest.approx(8.6 / 6.1)
    assert lora["merged_ratio"]["time_to_first_token"] == pytest.approx(6.2 / 6.1)
    # (8.6 ms + 5 × 3.3 ms) / 4 a request, at 0.9 dollars an hour
    assert lora["cost_per_1000"] == pytest.approx(0.0251 / 4 * 1000 * 0.9 / 3600)
    assert lora["ratio"]["cost_per_1000"] == pytest.approx((8.6 + 16.5) / (6.1 + 12.0))
    assert set(base["ratio"].values()) == {1.0}
    assert base["merged_ratio"] is None
    assert rows[FULL]["mixed_batch"] is None
    assert rows[LORA]["mixed_batch"] == {"passed": True, "max_difference": 2.4e-06, "same_tokens": True}
    assert rows[FULL]["forgetting"] == {"before": 21.4, "after": 39.8, "ratio": pytest.approx(39.8 / 21.4)}


def test_without_probes_nothing_is_made_up() -> None:
    for row in build_report(make_manifest(), make_cells(), [])["rows"]:
        assert (row["inference"], row["mixed_batch"], row["forgetting"]) == (None, None, None)
    empty = {"base": "tailor-nano", "latency": {}, "merged": {}, "mixed_batch": None, "forgetting": {}}
    probe = {**empty, "errors": {"lora": "no memory", "latency": "no clock"}}
    found = build_report(make_manifest(), make_cells(), [probe])
    assert "no latency probe on tailor-nano: no clock" in found["notes"]
    row = rows_of(found)[LORA]
    assert (row["inference"], row["mixed_batch"], row["forgetting"]) == (None, None, None)
    assert row["notes"] == ["not probed: no memory"]
    probe = make_probes()[0]
    del probe["latency"]["base"], probe["forgetting"]["base"]
    row = rows_of(build_report(make_manifest(recipe={}), make_cells(), [probe]))[LORA]
    assert set(row["inference"]["ratio"].values()) == {None}
    assert row["inference"]["cost_per_1000"] is None
    assert row["forgetting"] is None


def test_seeds_are_averaged() -> None:
    runs = [
        {"seconds": s, "num_tokens": t, "num_steps": 3, "peak_memory": None, "shared_with": ["x"], "stopped": None}
        for s, t in ((2.0, 10), (3.0, 11))
    ]
    cells = [
        scored_cell("lora", right(10), seed=0, training=runs[0], notes=["a", "b"]),
        scored_cell("lora", right(14), seed=1, training=runs[1], notes=["b"], main=False),
    ]
    found = build_report(make_manifest(num_seeds=2), cells, [])
    row = rows_of(found)[LORA]
    expected = crossed_interval([right(10), right(14)])
    assert row["metrics"]["accuracy"] == {"mean": 0.6, "low": expected.low, "high": expected.high, "n": 20}
    assert row["per_seed"] == [0.5, 0.7]
    assert row["training"] == {**runs[0], "seconds": 2.5, "num_tokens": 10}
    assert row["notes"] == ["a", "b"]
    assert found["curves"][0]["points"] == [
        {"size": 275, "mean": 0.6, "low": expected.low, "high": expected.high, "seconds": 2.5, "n_seeds": 2}
    ]


def test_a_seed_that_failed_is_noted_and_left_out() -> None:
    cells = [failed_cell("tailor-nano", "lora", 275, 0), scored_cell("lora", right(14), seed=1, main=False)]
    found = build_report(make_manifest(num_seeds=2), cells, [])
    row = rows_of(found)[LORA]
    assert (row["status"], row["per_seed"]) == ("ok", [0.7])
    assert row["notes"] == ["seed 0 failed: training needs more memory than there is"]
    assert found["failures"] == [{"id": LORA, "size": 275, "seed": 0, "error": cells[0]["error"]}]


def test_a_technique_that_fails_takes_its_row_and_not_the_report() -> None:
    found = build_report(make_manifest(), make_cells(failed="lora"), make_probes(without="lora"))
    row = rows_of(found)[LORA]
    assert row["status"] == "failed"
    assert row["error"]["code"] == "out_of_memory"
    assert (row["metrics"], row["per_seed"], row["inference"]) == ({}, [], None)
    alone = rows_of(build_report(make_manifest(), [failed_cell("tailor-nano", "lora", 275, 0)], []))[LORA]
    assert (alone["num_parameters"], alone["parameter_share"]) == (None, None)
    assert rows_of(found)[FULL]["status"] == "ok"
    lora = next(curve for curve in found["curves"] if curve["id"] == LORA)
    assert [point["size"] for point in lora["points"]] == [8, 64]


def test_curves_follow_the_sizes_and_the_base_stays_flat(report: Report) -> None:
    curves = {curve["id"]: curve["points"] for curve in report["curves"]}
    assert list(curves) == [row["id"] for row in report["rows"]]
    assert [point["size"] for point in curves[FULL]] == list(SIZES)
    assert curves[FULL][-1]["mean"] == rows_of(report)[FULL]["metrics"]["accuracy"]["mean"]
    assert curves[FULL][-1]["seconds"] == pytest.approx(38.0)
    flat = curves[BASE]
    assert [point["size"] for point in flat] == list(SIZES)
    assert len({point["mean"] for point in flat}) == 1
    assert {point["seconds"] for point in flat} == {None}


def test_an_interrupted_comparison_stands_at_the_largest_size_reached() -> None:
    cells = [cell for cell in make_cells() if cell["size"] < 275 or cell["kind"] != "technique"]
    found = build_report(make_manifest(status="interrupted"), cells, [])
    assert rows_of(found)[LORA]["rows_used"]["train"] == 64
    assert "the comparison is interrupted: what is missing here was not measured yet" in found["notes"]
    assert "no technique has come to 275 rows: the table stands at 64" in found["notes"]
    some = [cell for cell in make_cells() if cell["name"] != "full" or cell["size"] < 275]
    row = rows_of(build_report(make_manifest(status="running"), some, []))[FULL]
    assert (row["status"], row["metrics"], row["rows_used"]) == ("missing", {}, None)
    assert row["error"]["message"] == "not measured with 275 rows"


def test_nothing_measured_yet() -> None:
    found = build_report(make_manifest(status="running"), [], [])
    assert (found["rows"], found["curves"], found["disagreements"], found["data"]["kind"]) == ([], [], [], None)


def test_disagreements_are_the_rows_that_divide_most() -> None:
    # per row, how many of the four are right: 4, 3, 2, 1, 0, 2
    scores = {
        "base": [1, 0, 0, 0, 0, 1],
        "prompting": [1, 1, 0, 0, 0, 1],
        "lora": [1, 1, 1, 0, 0, 0],
        "full": [1, 1, 1, 1, 0, 0],
    }
    cells = [scored_cell("majority", [0] * 6), *(scored_cell(name, own) for name, own in scores.items())]
    found = build_report(make_manifest(), cells, [])["disagreements"]
    # two against two vary most, then three against one; rows on which all agree are none
    assert [row["source"] for row in found] == [f"rows.jsonl:{k}" for k in (3, 6, 2, 4)]
    assert found[0]["reference"] == "right"
    assert found[0]["answers"][LORA] == {"completion": "lora says 1", "answer": "right", "score": 1.0}
    assert set(found[0]["answers"]) == {f"tailor-nano/{name}" for name in scores}


def test_one_technique_s_peculiarities_do_not_fill_the_list() -> None:
    # one alone is off in rows 0 to 29, and only row 30 divides them evenly
    scores = {
        "base": [0] * 30 + [0],
        "prompting": [0] * 30 + [0],
        "lora": [0] * 30 + [1],
        "full": [1] * 30 + [1],
    }
    found = build_report(make_manifest(), [scored_cell(name, own) for name, own in scores.items()], [])
    assert [row["source"] for row in found["disagreements"]] == [f"rows.jsonl:{k}" for k in (31, 1, 2, 3, 4)]
    assert any(note.startswith("disagreements:") for note in found["notes"])


def test_a_full_list_of_disagreements(report: Report) -> None:
    found = report["disagreements"]
    assert len(found) == MAX_DISAGREEMENTS
    assert all(len({answer["score"] for answer in row["answers"].values()}) > 1 for row in found)


def test_a_metric_over_rows_together() -> None:
    found = build_report(make_manifest(metric="macro_f1"), make_cells(num_seeds=2), make_probes())
    assert any(note.startswith("macro_f1 exists only over the rows together") for note in found["notes"])
    assert all(entry["low"] is None for entry in found["verdict"]["differences"])
    assert "overlap" in found["verdict"]["noise"]
    assert found["disagreements"]  # by a metric that single rows have
    seeds = [cell for cell in make_cells(num_seeds=2) if cell["name"] == "lora" and cell["size"] == 275]
    bounds = [cell["evaluation"]["metrics"]["macro_f1"] for cell in seeds]
    own = rows_of(found)[LORA]["metrics"]["macro_f1"]
    assert (own["low"], own["high"]) == (min(b["low"] for b in bounds), max(b["high"] for b in bounds))


def test_one_size_and_no_baselines() -> None:
    cells = [cell for cell in make_cells(sizes=SIZES[-1:]) if cell["kind"] != "baseline"]
    found = build_report(make_manifest(sizes=[275]), cells, make_probes())
    assert found["verdict"]["pick"] == LORA
    assert found["crossovers"][0].startswith("Only one size")
    assert [len(curve["points"]) for curve in found["curves"]] == [1] * 5
