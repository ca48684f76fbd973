from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from comparison_cases import BASES, failed_cell, make_cells, make_manifest, make_probes, scored_cell

from tailor.evaluation.comparison import build_report
from tailor.evaluation.verdict import cost_order
from tailor.metrics.bootstrap import paired_difference

N = 40
BASE, PROMPTING, TABLE = "tailor-nano/base", "tailor-nano/prompting", "tailor-nano/prompt_tuning"
LORA, FULL = "tailor-nano/lora", "tailor-nano/full"


def right(number: int, of: int = N) -> list[float]:
    """The first `number` rows are right, so that a difference between two is a difference in single rows."""
    return [1.0] * number + [0.0] * (of - number)


def verdict(cells: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]] = (), **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = build_report(make_manifest(**changes), cells, probes)["verdict"]
    return found


def scored(**numbers: int) -> list[dict[str, Any]]:
    return [scored_cell(name, right(number)) for name, number in numbers.items()]


def test_a_clear_winner() -> None:
    found = verdict(scored(base=4, prompting=6, lora=12, full=36))
    assert (found["best"], found["tied"], found["pick"]) == (FULL, [FULL], FULL)
    assert found["sentences"][0].startswith("full is best: accuracy 0.90 [0.")
    assert found["sentences"][0].endswith("] against 0.10 for the base.")
    by_id = {entry["id"]: entry for entry in found["differences"]}
    expected = paired_difference(right(12), right(36))
    assert by_id[LORA] == {
        "id": LORA,
        "versus": FULL,
        "mean": pytest.approx(-0.6),
        "low": expected.low,
        "high": expected.high,
        "tie": False,
    }
    assert set(by_id) == {BASE, PROMPTING, LORA}
    assert "95 % interval" in found["noise"]
    assert "over rows)" in found["noise"]


def test_the_cheapest_of_those_that_tie_is_taken() -> None:
    # one row apart: its interval includes 0, since most resamples of a row in forty miss it or hit it
    found = verdict(scored(base=4, prompt_tuning=29, lora=29, full=30))
    assert (found["best"], found["pick"]) == (FULL, TABLE)
    assert found["tied"] == [TABLE, LORA, FULL]
    assert "prompt_tuning ties with it (difference 0.03 [0.00, 0.07] is within the noise)" in found["sentences"][0]
    assert found["sentences"][0].endswith("and stores less than 1 % of the parameters: take prompt_tuning.")
    assert found["sentences"][1] == "Also within the noise of the best: lora (0.03 [0.00, 0.07])."


def test_untrained_before_trained_and_a_smaller_base_before_a_larger() -> None:
    def row(kind: str = "technique", parameters: int = 0, frozen: bool = True, base: int = 100) -> dict[str, Any]:
        return {
            "kind": kind,
            "num_parameters": parameters,
            "base_parameters": base,
            "traits": {"frozen_base": frozen} if kind == "technique" else None,
        }

    ordered = [
        row("baseline", base=0),
        row("base"),
        row("base", base=200),
        row(),
        row(parameters=5),
        row(parameters=9),
        row(parameters=1, base=200),
        row(parameters=100, frozen=False),
    ]
    assert sorted([*ordered[4:], *ordered[:4]], key=cost_order) == ordered


def test_the_base_can_be_best_as_it_is() -> None:
    found = verdict(scored(base=20, prompting=20, lora=4))
    assert (found["best"], found["pick"]) == (BASE, BASE)
    assert found["sentences"][0].startswith("Nothing needs training for this: the base is best as it is, with accuracy")
    assert "Worse than the base, beyond the noise: lora." in found["sentences"]


def test_every_technique_ties_with_the_base() -> None:
    found = verdict(scored(base=20, prompting=20, lora=21))
    assert (found["best"], found["pick"]) == (LORA, BASE)
    assert found["sentences"][0].endswith("and needs no tuning: take the base.")
    assert "Every technique ties with the base: no difference is beyond the noise." in found["sentences"]


def test_no_model_needs_tuning_where_a_baseline_does_as_well() -> None:
    ties = verdict(scored(majority=29, base=4, full=30))
    assert (ties["best"], ties["pick"]) == (FULL, "baseline/majority")
    assert ties["tied"] == ["baseline/majority", FULL]
    assert ties["sentences"][0].startswith("No model needs tuning for this, as far as 40 test rows show: the majority")
    better = verdict(scored(majority=39, base=4, full=20))
    assert (better["best"], better["tied"], better["pick"]) == (FULL, [FULL], "baseline/majority")
    assert better["sentences"][0].startswith(
        "No model needs tuning for this: the majority baseline reaches accuracy 0.9"
    )
    assert "more than the best of the others, full, accuracy 0.50 [" in better["sentences"][0]


def test_forgetting_is_said_of_the_pick_and_the_best() -> None:
    sentences = verdict(make_cells(), make_probes())["sentences"]
    assert "full forgets: its perplexity on other text grows from 21.4 to 39.8 (1.9 times)." in sentences
    assert not any(sentence.startswith("lora forgets") for sentence in sentences)  # 1.17 times is less than a third


def test_failures_are_said() -> None:
    cells = [*scored(base=4, full=30), failed_cell("tailor-nano", "lora", 275, 0)]
    found = verdict(cells)
    assert "lora failed: training needs more memory than there is." in found["sentences"]
    assert LORA not in [entry["id"] for entry in found["differences"]]


def test_nothing_to_compare() -> None:
    found = verdict([failed_cell("tailor-nano", "lora", 275, 0)])
    assert (found["best"], found["pick"], found["tied"], found["differences"]) == (None, None, [], [])
    assert found["sentences"][0].startswith("Nothing can be compared")
    alone = verdict([*scored(base=4), failed_cell("tailor-nano", "lora", 275, 0)])
    assert alone["best"] == BASE
    assert alone["sentences"][0].startswith("No technique has a score: the base alone reaches accuracy 0.10 [")
    beside = verdict(scored(majority=30, base=4))
    assert beside["sentences"][0].startswith("No technique has a score: the base alone reaches accuracy 0.10 [")
    assert ", and the majority baseline accuracy 0.75 [" in beside["sentences"][0]
    assert verdict([])["best"] is None


def test_few_rows_say_what_they_can_tell_apart() -> None:
    few = verdict([scored_cell("base", right(2, 10)), scored_cell("lora", right(7, 10))])["sentences"]
    found = paired_difference(right(2, 10), right(7, 10))
    half = (found.high - found.low) / 2
    assert "With only 10 test rows all intervals are rough." in few
    wanted = float(f"{10 * (half / 0.05) ** 2:.1g}")
    assert few[-1].startswith(f"With 10 test rows, differences below about {half:.2f} cannot be told from noise")
    assert few[-1].endswith(f"to see 0.05 takes about {wanted:.0f} rows.")
    many = verdict([scored_cell("base", right(200, 2000)), scored_cell("lora", right(1000, 2000))])["sentences"]
    assert not any("cannot be told from noise" in sentence for sentence in many)


def test_several_bases_are_named() -> None:
    cells = [
        *scored(base=4, lora=10),
        scored_cell("base", right(5), base="big", base_parameters=9_000_000),
        scored_cell("lora", right(36), base="big", base_parameters=9_000_000),
    ]
    found = verdict(cells)
    assert (found["best"], found["pick"]) == ("big/lora", "big/lora")
    assert found["sentences"][0].startswith("lora on big is best: accuracy 0.90 [")
    assert found["sentences"][0].endswith("against 0.12 for the base big.")
    assert {entry["versus"] for entry in found["differences"]} == {"big/lora"}


def test_lower_is_better() -> None:
    cells = [scored_cell("base", [9.0] * N, "perplexity"), scored_cell("lora", [3.0] * N, "perplexity")]
    found = verdict(cells, metric="perplexity")
    assert found["best"] == LORA
    assert found["sentences"][0] == "lora is best: perplexity 3.00 [3.00, 3.00] against 9.00 for the base."
    assert (found["differences"][0]["mean"], found["differences"][0]["low"]) == (6.0, None)


def crossovers(**numbers: tuple[int, ...]) -> list[str]:
    cells = [
        scored_cell(name, right(number), size=size)
        for name, by_size in numbers.items()
        for size, number in zip((8, 64, 275), by_size, strict=False)
    ]
    found: list[str] = build_report(make_manifest(), cells, [])["crossovers"]
    return found


def test_crossings_are_those_beyond_noise_and_last() -> None:
    found = crossovers(base=(4,), prompting=(6, 6, 6), prompt_tuning=(4, 16, 17), lora=(1, 17, 28), full=(0, 10, 39))
    assert [sentence.split(" by ")[0] for sentence in found] == [
        "Prompting stops being enough from 64 rows on: lora is ahead of prompting",
        "Prompt learning pays from 64 rows on: prompt_tuning is ahead of prompting",
        "More than a learned prompt pays from 275 rows on: lora is ahead of prompt_tuning",
        "Full tuning overtakes from 275 rows on: full is ahead of lora",
    ]
    assert found[0].endswith("by 0.28 [0.15, 0.42].")


def test_a_lead_that_is_lost_again_is_no_crossing() -> None:
    assert crossovers(prompting=(6, 6, 20), lora=(1, 17, 20)) == ["No crossing was seen between 8 and 275 rows."]
    assert crossovers(lora=(10, 10, 10), full=(10, 11, 11)) == ["No crossing was seen between 8 and 275 rows."]
    always = crossovers(prompting=(2, 2, 2), lora=(20, 20, 20))
    assert always[0].startswith("Prompting stops being enough already with 8 rows, the fewest measured: lora")


def test_one_size_shows_no_crossing() -> None:
    assert crossovers(base=(3,), lora=(10,))[0].startswith("Only one size was measured")


def test_crossings_are_seen_on_every_base() -> None:
    report = build_report(make_manifest(BASES, 2), make_cells(BASES, 2), make_probes(BASES))
    assert any("lora on tailor-nano" in sentence for sentence in report["crossovers"])
    assert any("lora on tailor-micro" in sentence for sentence in report["crossovers"])
    assert "rows and seeds" in report["verdict"]["noise"]
