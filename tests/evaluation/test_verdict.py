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


def swapped(lost: int, won: int, against: int, of: int = N) -> list[float]:
    """Against `right(against)`: right on `won` rows that it misses, wrong on `lost` rows that it has."""
    return [1.0] * (against - lost) + [0.0] * lost + [1.0] * won + [0.0] * (of - against - won)


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


def test_the_cheapest_within_one_standard_error_is_taken_and_not_the_cheapest_that_ties() -> None:
    # against full, of 40 rows:
    # lora loses 5 and wins 4: mean -1/40 = -0.025, standard error sqrt((9/40 - 0.025**2) / 40) = 0.075, 0.3 of it apart
    # prompt_tuning loses 2: mean -2/40 = -0.05, standard error sqrt((2/40 - 0.05**2) / 40) = 0.034, 1.5 of it apart;
    # its interval still holds 0, since (38/40)**40 = 13 % of the resamples have neither row
    lora = scored_cell("lora", swapped(5, 4, against=30))
    found = verdict([*scored(base=4, prompt_tuning=28, full=30), lora])
    assert (found["best"], found["pick"]) == (FULL, LORA)
    assert found["tied"] == [TABLE, LORA, FULL]
    means = {entry["id"]: entry["mean"] for entry in found["differences"]}
    assert (means[LORA], means[TABLE]) == (pytest.approx(-0.025), pytest.approx(-0.05))
    assert found["sentences"][0].startswith("full is best: accuracy 0.75 [")
    assert " against 0.10 for the base. lora ties with it (difference 0.03 [-0.1" in found["sentences"][0]
    assert found["sentences"][0].endswith("] is within the noise) and stores 9 % of the parameters: take lora.")
    assert found["sentences"][1] == (
        "Also within the noise of the best, but more than one standard error behind it: "
        "prompt_tuning (0.05 [0.00, 0.12])."
    )


def test_of_several_within_one_standard_error_the_others_are_named() -> None:
    cells = [scored_cell(name, swapped(5, 4, against=30)) for name in ("prompt_tuning", "lora")]
    found = verdict([*scored(base=4, full=30), *cells])
    assert (found["best"], found["pick"]) == (FULL, TABLE)
    assert found["sentences"][0].endswith("and stores less than 1 % of the parameters: take prompt_tuning.")
    assert found["sentences"][1].startswith("Also within the noise of the best: lora (0.03 [-0.1")


def test_the_best_is_taken_where_the_ties_are_more_than_one_standard_error_behind_or_cost_more() -> None:
    behind = verdict(scored(base=4, lora=28, full=30))
    assert (behind["best"], behind["tied"], behind["pick"]) == (FULL, [LORA, FULL], FULL)
    assert behind["sentences"][0].endswith("] against 0.10 for the base.")
    assert behind["sentences"][1] == (
        "Within the noise of the best, but more than one standard error behind it: lora (0.05 [0.00, 0.12])."
    )
    dearer = verdict([*scored(base=4, prompt_tuning=28, lora=30), scored_cell("full", swapped(5, 4, against=30))])
    assert (dearer["best"], dearer["tied"], dearer["pick"]) == (LORA, [TABLE, LORA, FULL], LORA)
    assert dearer["sentences"][1].startswith("Within the noise of the best: full (0.03 [-0.1")
    assert dearer["sentences"][2].startswith("Also within the noise of the best, but more than one standard error")


def test_the_rule_of_the_pick_is_told_as_it_was_followed() -> None:
    paired = verdict(scored(base=4, full=30))["noise"]
    assert "Of those within one standard error of the best the cheapest is taken: no language model" in paired
    cells = [scored_cell(name, [0.5] * N, "macro_f1") for name in ("lora", "full")]
    for cell, mean, low, high in zip(cells, (0.5, 0.7), (0.4, 0.6), (0.6, 0.8), strict=True):
        cell["evaluation"]["metrics"]["macro_f1"] |= {"mean": mean, "low": low, "high": high}
    unpaired = verdict(cells, metric="macro_f1")  # intervals that touch tie, and have no standard error
    assert (unpaired["best"], unpaired["pick"]) == (FULL, LORA)
    assert "Of those that tie the cheapest is taken: no language model" in unpaired["noise"]


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
    told = "Every technique ties with the base: no difference is beyond the noise."
    # loses 3 rows and wins 2: mean -1/40 = -0.025, standard error sqrt((5/40 - 0.025**2) / 40) = 0.056
    same = [scored_cell(name, swapped(3, 2, against=21)) for name in ("base", "prompting")]
    near = verdict([*same, *scored(lora=21)])
    assert (near["best"], near["pick"]) == (LORA, BASE)
    assert near["sentences"][0].endswith("and needs no tuning: take the base.")
    assert told in near["sentences"]
    # two rows behind and none ahead: 1.5 standard errors, as above
    behind = verdict(scored(base=19, prompting=19, lora=21))
    assert (behind["best"], behind["pick"]) == (LORA, LORA)
    assert not any("take the base" in sentence for sentence in behind["sentences"])
    assert behind["sentences"][1].startswith("Within the noise of the best, but more than one standard error behind it")
    assert told in behind["sentences"]


def test_no_model_needs_tuning_where_a_baseline_does_as_well() -> None:
    ties = verdict([*scored(base=4, full=30), scored_cell("majority", swapped(5, 4, against=30))])
    assert (ties["best"], ties["pick"]) == (FULL, "baseline/majority")
    assert ties["tied"] == ["baseline/majority", FULL]
    assert ties["sentences"][0].startswith("No model needs tuning for this, as far as 40 test rows show: the majority")
    assert ", and ties with the best, full, accuracy 0.75 [" in ties["sentences"][0]
    ahead = verdict(scored(majority=32, base=4, full=30))  # 1.5 standard errors ahead: a tie, and by no means too far
    assert (ahead["best"], ahead["tied"], ahead["pick"]) == (FULL, ["baseline/majority", FULL], "baseline/majority")
    assert ahead["sentences"][0].startswith("No model needs tuning for this, as far as 40 test rows show: the majority")
    better = verdict(scored(majority=39, base=4, full=20))
    assert (better["best"], better["tied"], better["pick"]) == (FULL, [FULL], "baseline/majority")
    assert better["sentences"][0].startswith(
        "No model needs tuning for this: the majority baseline reaches accuracy 0.9"
    )
    assert "more than the best of the others, full, accuracy 0.50 [" in better["sentences"][0]


def test_a_baseline_more_than_one_standard_error_behind_makes_no_tuning_needless() -> None:
    found = verdict(scored(majority=28, base=4, full=30))
    assert (found["tied"], found["pick"]) == (["baseline/majority", FULL], FULL)
    assert found["sentences"][0].startswith("full is best: accuracy 0.75 [")
    assert found["sentences"][1] == (
        "Within the noise of the best, but more than one standard error behind it: "
        "the majority baseline (0.05 [0.00, 0.12])."
    )
    assert not any("No model needs tuning" in sentence for sentence in found["sentences"])


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
