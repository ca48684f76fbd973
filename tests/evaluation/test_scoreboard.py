from __future__ import annotations

import numpy as np
import pytest
from comparison_cases import scored_cell

from tailor.errors import ConfigError
from tailor.evaluation.scoreboard import Scoreboard, row_id
from tailor.metrics.bootstrap import crossed_difference, crossed_interval, paired_difference

LORA, FULL, BASE = "tailor-nano/lora", "tailor-nano/full", "tailor-nano/base"
ALL, HALF, NONE = [1.0] * 8, [1.0, 0.0] * 4, [0.0] * 8


def test_lines_are_called_by_base_and_name() -> None:
    assert row_id(scored_cell("lora", ALL)) == LORA
    assert row_id(scored_cell("majority", ALL)) == "baseline/majority"


def test_one_seed_keeps_the_evaluation_s_own_interval() -> None:
    cell = scored_cell("lora", HALF)
    cell["evaluation"]["metrics"]["accuracy"]["low"] = 0.125  # as another seed of the bootstrap might have it
    board = Scoreboard([cell, scored_cell("full", ALL)], "accuracy")
    assert board.score(LORA, 275) == cell["evaluation"]["metrics"]["accuracy"]
    found = board.difference(FULL, LORA, 275)
    expected = paired_difference(ALL, HALF)
    assert found is not None
    assert (found.mean, found.low, found.high) == (expected.mean, expected.low, expected.high)
    assert board.beats(FULL, LORA, 275)
    assert not board.beats(LORA, FULL, 275)


def test_several_seeds_are_resampled_with_the_rows() -> None:
    cells = [scored_cell("lora", scores, seed=seed) for seed, scores in ((1, ALL), (0, HALF))]
    board = Scoreboard([*cells, scored_cell("full", NONE)], "accuracy", confidence=0.9, seed=3)
    expected = crossed_interval([HALF, ALL], confidence=0.9, seed=3)
    assert board.score(LORA, 275) == {"mean": 0.75, "low": expected.low, "high": expected.high, "n": 8}
    found, paired = board.difference(LORA, FULL, 275), crossed_difference([HALF, ALL], [NONE], confidence=0.9, seed=3)
    assert found is not None
    assert (found.mean, found.low, found.high) == (paired.mean, paired.low, paired.high)
    assert [cell["seed"] for cell in board.cells(LORA, 275)] == [0, 1]


def test_the_plain_base_has_one_score_for_all_sizes() -> None:
    board = Scoreboard([scored_cell("base", HALF), scored_cell("lora", ALL, size=8)], "accuracy")
    score = board.score(BASE, 8)
    assert score is not None
    assert score["mean"] == 0.5
    assert board.beats(LORA, BASE, 8)
    assert board.score(LORA, 275) is None
    assert board.difference(LORA, BASE, 275) is None
    assert not board.beats(LORA, BASE, 275)


def test_equal_scores_tie() -> None:
    board = Scoreboard([scored_cell("lora", HALF), scored_cell("full", HALF)], "accuracy")
    found = board.difference(LORA, FULL, 275)
    assert found is not None
    assert (found.mean, found.tie) == (0.0, True)


def test_rounding_does_not_make_a_difference() -> None:
    thirds = [[0.1] * 4, [0.2] * 4, [0.3] * 4]
    cells = [scored_cell("lora", scores, "token_f1", seed=seed) for seed, scores in enumerate(thirds)]
    cells.append(scored_cell("full", [np.mean(thirds)] * 4, "token_f1"))
    found = Scoreboard(cells, "token_f1").difference(LORA, FULL, 275)
    assert found is not None
    assert found.tie


def test_lower_is_better() -> None:
    lora, full = scored_cell("lora", [2.0, 2.0], "perplexity"), scored_cell("full", [5.0, 5.0], "perplexity")
    board = Scoreboard([lora, full], "perplexity")
    assert not board.higher_is_better
    assert board.beats(LORA, FULL, 275)
    assert board.gain(-3.0) == 3.0


def test_a_metric_over_rows_together_ties_where_intervals_overlap() -> None:
    lora, full = scored_cell("lora", [0.5, 0.5], "macro_f1"), scored_cell("full", [0.9, 0.9], "macro_f1")
    for cell, low, high in ((lora, 0.4, 0.6), (full, 0.6, 1.0)):
        cell["evaluation"]["metrics"]["macro_f1"] |= {"low": low, "high": high}
    board = Scoreboard([lora, full], "macro_f1")
    found = board.difference(LORA, FULL, 275)
    assert not board.paired
    assert found is not None
    assert (found.mean, found.low, found.high, found.tie) == (pytest.approx(-0.4), None, None, True)
    full["evaluation"]["metrics"]["macro_f1"]["low"] = 0.61
    assert Scoreboard([lora, full], "macro_f1").beats(FULL, LORA, 275)
    again = scored_cell("full", [0.7, 0.7], "macro_f1", seed=1)
    assert Scoreboard([lora, full, again], "macro_f1").score(FULL, 275) == {
        "mean": pytest.approx(0.8),
        "low": 0.61,
        "high": 1.0,
        "n": 2,
    }


def test_failed_cells_have_no_score_and_unknown_metrics_are_refused() -> None:
    broken = scored_cell("lora", ALL, status="failed", evaluation=None, outcomes=[])
    assert Scoreboard([broken], "accuracy").score(LORA, 275) is None
    with pytest.raises(ConfigError, match="acuracy"):
        Scoreboard([broken], "acuracy")
