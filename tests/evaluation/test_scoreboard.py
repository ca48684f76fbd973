from __future__ import annotations

import numpy as np
import pytest

from comparison_cases import scored_cell
from tailor.errors import ConfigError
from tailor.evaluation.scoreboard import Difference, Scoreboard, row_id
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


def test_near_is_up_to_one_standard_error_worse() -> None:
    # a 95 % interval is 2 * 1.96 = 3.92 standard errors wide: 0.392 is wide enough for 0.1, 0.388 is not (0.099)
    board = Scoreboard([], "accuracy")
    assert board.near(Difference(-0.1, -0.2961, 0.0961, tie=True))
    assert not board.near(Difference(-0.1, -0.294, 0.094, tie=True))
    assert board.near(Difference(0.1, -0.094, 0.294, tie=True))  # better, however far
    assert board.near(Difference(0.0, 0.0, 0.0, tie=True))
    # a 50 % interval is 2 * 0.6745 = 1.349 standard errors wide: that of 0.1 is 0.1349 wide
    half = Scoreboard([], "accuracy", confidence=0.5)
    assert half.near(Difference(-0.1, -0.168, -0.032, tie=False))
    assert not half.near(Difference(-0.1, -0.167, -0.033, tie=False))


def test_near_turns_with_the_metric_where_lower_is_better() -> None:
    board = Scoreboard([], "perplexity")
    assert not board.near(Difference(0.1, -0.094, 0.294, tie=True))
    assert board.near(Difference(0.1, -0.0961, 0.2961, tie=True))
    assert board.near(Difference(-0.1, -0.294, 0.094, tie=True))


def test_near_is_a_tie_where_there_is_no_standard_error() -> None:
    board = Scoreboard([], "macro_f1")
    assert board.near(Difference(-0.4, None, None, tie=True))
    assert not board.near(Difference(-0.01, None, None, tie=False))


def test_near_of_measured_rows() -> None:
    # of 40 rows lora misses 5 that full has and has 4 that full misses: -0.025, standard error 0.075
    # base misses 2 and has none: -0.05, standard error 0.034
    full = [1.0] * 30 + [0.0] * 10
    lora, base = [1.0] * 25 + [0.0] * 5 + [1.0] * 4 + [0.0] * 6, [1.0] * 28 + [0.0] * 12
    board = Scoreboard([scored_cell("full", full), scored_cell("lora", lora), scored_cell("base", base)], "accuracy")
    close, apart = board.difference(LORA, FULL, 275), board.difference(BASE, FULL, 275)
    assert close is not None
    assert apart is not None
    assert (close.tie, board.near(close), board.near(close.turned())) == (True, True, True)
    assert (apart.tie, board.near(apart), board.near(apart.turned())) == (True, False, True)


def test_failed_cells_have_no_score_and_unknown_metrics_are_refused() -> None:
    broken = scored_cell("lora", ALL, status="failed", evaluation=None, outcomes=[])
    assert Scoreboard([broken], "accuracy").score(LORA, 275) is None
    with pytest.raises(ConfigError, match="acuracy"):
        Scoreboard([broken], "acuracy")
