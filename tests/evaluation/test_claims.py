from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from comparison_cases import SETTINGS, failed_cell, make_cells, make_manifest, make_probes, scored_cell
from tailor.evaluation.claims import CLAIMS, TECHNIQUES_CLAIMED
from tailor.evaluation.comparison import build_report

PROMPTING, TABLE, LORA, FULL = (f"tailor-nano/{name}" for name in ("prompting", "prompt_tuning", "lora", "full"))
Claims = dict[str, dict[str, dict[str, Any]]]


def claims(cells: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]] = ()) -> Claims:
    report = build_report(make_manifest(), cells, probes)
    return {entry["column"]: entry["cells"] for entry in report["claims"]}


@pytest.fixture(scope="module")
def found() -> Claims:
    return claims(make_cells(), make_probes())


def right(number: int, of: int = 40) -> list[float]:
    return [1.0] * number + [0.0] * (of - number)


def test_the_table_is_whole() -> None:
    assert len(CLAIMS) == 9
    assert all(set(words) == set(TECHNIQUES_CLAIMED) for words in CLAIMS.values())
    assert CLAIMS["Same model architecture"]["lora"] == "No in training, Yes in inference"
    assert [CLAIMS["Accuracy"][name] for name in TECHNIQUES_CLAIMED] == ["Fair", *["Good"] * 2, *["Better"] * 3, "Best"]


def test_every_technique_has_a_cell_and_no_other_line(found: Claims) -> None:
    assert list(found) == list(CLAIMS)
    assert all(list(cells) == [f"tailor-nano/{name}" for name in SETTINGS] for cells in found.values())
    assert all(set(cell) == {"claim", "measured", "agrees", "why"} for c in found.values() for cell in c.values())


def test_frozen_weights_and_architecture(found: Claims) -> None:
    frozen, same = found["Frozen model weights"], found["Same model architecture"]
    assert [frozen[name]["measured"] for name in (PROMPTING, LORA, FULL)] == ["Yes", "Yes", "No"]
    assert [same[name]["measured"] for name in (PROMPTING, TABLE, LORA, FULL)] == [
        "Yes",
        "Yes",
        "No in training, Yes in inference",
        "Yes",
    ]
    assert all(cell["agrees"] for cell in (*frozen.values(), *same.values()))


@pytest.mark.parametrize(
    ("share", "measured", "agrees"),
    [
        (0, "Zero (0 %, 0)", False),
        (9, "Limited (0.9 %, 9)", False),
        (10, "Moderate (1 %, 10)", True),
        (199, "Moderate (19.9 %, 199)", True),
        (200, "Large (20 %, 200)", False),
    ],
)
def test_added_parameters(share: int, measured: str, agrees: bool) -> None:
    cell = scored_cell("lora", right(10), num_parameters=share, base_parameters=1000)
    found = claims([cell])["New added parameters"][LORA]
    assert (found["measured"], found["agrees"]) == (measured, agrees)


def test_latency_and_computation_are_ratios_to_the_base(found: Claims) -> None:
    latency = found["Extra inference latency"]
    # 14.9 / 6.1 and 2.7 / 2.4; 8.0 / 6.1 = 1.31
    assert latency[PROMPTING]["measured"] == (
        "High (2.44 × to the first token, 1.13 × per token); "
        "once what requests begin with is computed, 2.44 × to the first token"
    )
    assert latency[TABLE]["measured"].startswith("Moderate (1.31 × to the first token")
    assert latency[LORA]["measured"] == (
        "Zero merged (1.02 × to the first token, 1.00 × per token); "
        "moderate unmerged (1.41 × to the first token, 1.38 × per token); "
        "once what requests begin with is computed, 1.41 × to the first token"
    )
    assert all(cell["agrees"] for cell in latency.values())
    computation = found["Extra inference computation cost"]
    assert computation[PROMPTING]["measured"] == "High (4.73 × operations per request)"  # 123 tokens against 26
    assert computation[FULL]["agrees"]


def test_latency_without_a_merged_measurement_is_taken_as_it_is() -> None:
    probes = make_probes()
    probes[0]["merged"] = {}
    latency = claims(make_cells(), probes)["Extra inference latency"][LORA]
    assert latency["measured"].startswith("Moderate (1.41")
    assert latency["agrees"] is False


def test_multi_task_is_tested(found: Claims) -> None:
    mixing = found["Multi-task in one inference batch"]
    assert (mixing[LORA]["claim"], mixing[LORA]["agrees"]) == ("No", False)
    assert mixing[LORA]["measured"] == "Yes (largest difference 2.4e-06 nats per token)"
    assert mixing[TABLE]["agrees"]
    assert (mixing[FULL]["measured"], mixing[FULL]["agrees"]) == ("No", True)
    probes = make_probes()
    mixed = probes[0]["mixed_batch"]
    mixed |= {"passed": False}
    mixed["per_name"]["prompt_tuning"] |= {"passed": False, "max_difference": 0.3}
    again = claims(make_cells(), probes)["Multi-task in one inference batch"]
    assert again[TABLE]["measured"] == "No (largest difference 3.0e-01 nats per token)"
    assert again[TABLE]["agrees"] is False
    assert again[PROMPTING]["agrees"]


def test_accuracy_agrees_unless_a_difference_beyond_noise_is_against_the_order() -> None:
    cells = [scored_cell(name, right(k)) for name, k in {"prompting": 30, "prompt_tuning": 12, "lora": 31}.items()]
    accuracy = claims(cells)["Accuracy"]
    assert accuracy[PROMPTING]["measured"].endswith("rank 1 of 3")
    assert accuracy[TABLE]["measured"].endswith("rank 3 of 3")
    # prompting is claimed fair and beats the good one; against lora, claimed better, it is one row short: no matter
    assert (accuracy[PROMPTING]["agrees"], accuracy[TABLE]["agrees"], accuracy[LORA]["agrees"]) == (False, False, True)
    assert accuracy[PROMPTING]["why"] == "prompting is better than prompt_tuning beyond the noise"
    alone = claims(cells[:1])["Accuracy"][PROMPTING]
    assert alone["agrees"] is None
    assert alone["measured"].startswith("0.75 [")


def test_ranks_are_shared_by_ties_and_follow_the_scores() -> None:
    # every row of prompt_tuning that is right is right with lora; full is right on other rows, which makes it noisy
    scores = {"lora": right(20), "prompt_tuning": right(14), "full": [0.0] * 28 + [1.0] * 12}
    accuracy = claims([scored_cell(name, own) for name, own in scores.items()])["Accuracy"]
    ranks = [accuracy[name]["measured"].rsplit(", ", 1)[1] for name in (LORA, TABLE, FULL)]
    assert ranks == ["rank 1 of 3", "rank 2 of 3", "rank 2 of 3"]


def test_data_requested_is_the_smallest_size_near_its_own_best() -> None:
    numbers = {"prompting": (20, 20, 20), "lora": (10, 36, 39), "full": (5, 8, 39), "prompt_tuning": (5, 5, 6)}
    cells = [
        scored_cell(name, right(k), size=size)
        for name, by_size in numbers.items()
        for size, k in zip((8, 64, 275), by_size, strict=True)
    ]
    data = claims([scored_cell("base", right(5)), *cells])["Training data requested"]
    assert [data[name]["measured"] for name in (PROMPTING, LORA, FULL)] == ["8 rows", "64 rows", "275 rows"]
    assert all(data[name]["agrees"] for name in (PROMPTING, LORA, FULL))
    assert data[TABLE]["agrees"] is None  # one row better than the base: it has not learned
    assert "not better than the plain base" in data[TABLE]["why"]


def test_data_requested_against_the_claim() -> None:
    numbers = {"prompt_tuning": (5, 5, 30), "full": (30, 30, 30)}
    cells = [
        scored_cell(name, right(k), size=size)
        for name, by_size in numbers.items()
        for size, k in zip((8, 64, 275), by_size, strict=True)
    ]
    data = claims([scored_cell("base", right(2)), *cells])["Training data requested"]
    assert (data[TABLE]["agrees"], data[FULL]["agrees"]) == (False, False)
    assert data[TABLE]["why"].endswith("full reaches it with 8")
    assert claims([scored_cell("full", right(9))])["Training data requested"][FULL]["measured"] is None


def test_training_cost_is_relative_to_the_most_expensive(found: Claims) -> None:
    cost = found["Training computation cost"]
    assert cost[PROMPTING]["measured"] == "Zero (nothing is trained)"
    assert cost[TABLE]["measured"] == "Moderate (37.4 %, 14.2 s)"  # 14.2 / 38
    assert cost[TABLE]["agrees"] is False
    assert cost[TABLE]["why"].endswith("its share of a pass with lora")
    assert (cost[LORA]["agrees"], cost[FULL]["agrees"]) == (True, True)
    training = {"seconds": 3.0, "num_tokens": 1, "num_steps": 1, "peak_memory": None, "shared_with": []}
    alone = claims([scored_cell("lora", right(9), num_parameters=5, training=training)])
    assert alone["Training computation cost"][LORA]["measured"] == "3.0 s"
    assert alone["Training computation cost"][LORA]["agrees"] is None


def test_claims_are_found_by_the_technique_not_by_the_entry_s_name() -> None:
    renamed = scored_cell("my own", right(9), settings=[{"type": "lora", "rank": 2}])
    both = scored_cell("both", right(9), settings=[{"type": "lora"}, {"type": "prompt_tuning"}])
    zero_shot = scored_cell("plea", right(9), settings=[{"type": "prompting", "shots": 0, "system": "Be good."}])
    accuracy = claims([renamed, both, zero_shot])["Accuracy"]
    assert accuracy["tailor-nano/my own"]["claim"] == "Better"
    for name in ("both", "plea"):
        cell = accuracy[f"tailor-nano/{name}"]
        assert (cell["claim"], cell["agrees"]) == (None, None)
        assert cell["measured"].startswith("0.23 [")
        assert cell["why"].startswith("the table makes no claim")


def test_what_was_not_measured_stays_unknown() -> None:
    found = claims([scored_cell("lora", right(9)), failed_cell("tailor-nano", "full", 275, 0)])
    for column in ("Extra inference latency", "Extra inference computation cost", "Multi-task in one inference batch"):
        assert (found[column][LORA]["measured"], found[column][LORA]["agrees"]) == (None, None)
    assert found["Training computation cost"][LORA]["agrees"] is None
    assert all((cells[FULL]["measured"], cells[FULL]["agrees"]) == (None, None) for cells in found.values())
    bare = claims([scored_cell("lora", right(9), traits=None, num_parameters=None)])
    for column in ("Frozen model weights", "Same model architecture", "New added parameters"):
        assert (bare[column][LORA]["measured"], bare[column][LORA]["agrees"]) == (None, None)
