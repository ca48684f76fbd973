from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from report_cases import empty_report, make_report
from tailor.cli.output import draw
from tailor.evaluation.drawing.terminal import MAX_NOTES, render_comparison


def lines(report: dict[str, Any], width: int = 110) -> list[str]:
    stream = io.StringIO()
    draw(Console(file=stream, width=width, color_system=None, markup=False, emoji=False), render_comparison(report))
    return stream.getvalue().splitlines()


def test_the_headline_comes_first_then_the_table() -> None:
    report = make_report()
    found = lines(report)
    assert found[0] == report["verdict"]["sentences"][0]
    assert found[len(report["verdict"]["sentences"])].strip() == "cards: accuracy on 90 test rows"
    assert any(line.strip().startswith("lora (take this)") for line in found)


@pytest.mark.parametrize("num_bases", [1, 2])
def test_tables_fit_into_110_columns_with_every_score_on_one_line(num_bases: int) -> None:
    report = make_report(num_bases, num_bases)
    found = lines(report)
    sentences = {*report["verdict"]["sentences"], *report["crossovers"]}
    drawn = [line for line in found if line not in sentences and not line.startswith("note: ")]
    assert max(map(len, drawn)) <= 110
    for row in report["rows"]:
        accuracy = row["metrics"]["accuracy"]
        interval = f"{accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        assert any(interval in line for line in drawn)


def test_a_line_holds_quality_cost_training_and_forgetting() -> None:
    found = lines(make_report())
    line = next(line for line in found if line.strip().startswith("full") and "best" in line and "is" not in line)
    for part in ("$0.00114 ×1.01", "38 s", "1.31 M", "×1.86"):
        assert part in line


def test_learning_curves_are_a_table_of_their_own_when_there_are_several_sizes() -> None:
    report = make_report()
    found = lines(report)
    assert any("64 rows" in line for line in found)
    assert set(report["crossovers"]) <= set(found)
    assert not any("64 rows" in line for line in lines(make_report(sizes=[275])) if "note" not in line)


def test_what_failed_and_what_is_noted_comes_last() -> None:
    report = make_report(num_seeds=2, failed="full")
    found = lines(report)
    told = "training needs more memory than there is (lower batch_size)"
    assert f"failed: full with 275 rows, seed 0: {told}" in found
    assert f"failed: full with 275 rows, seed 1: {told}" in found
    assert found[-1] == "note: 3 rows are duplicates of others and were left out"
    report["notes"] = [f"remark {k}" for k in range(MAX_NOTES + 3)]
    assert lines(report)[-1] == "note: 4 more notes stand in the written report"


def test_texts_of_the_data_cannot_command_the_terminal() -> None:
    report = make_report()
    report["rows"][4]["name"] = "\x1b[31m[bold]red:smile:[/bold]"
    report["notes"] = ["\x1b]0;title\x07 line\nbreak"]
    text = "\n".join(lines(report))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "note: \\x1b]0;title\\x07 line break" in text
    assert "[bold]" in text.replace("\n", "").replace(" ", "")


def test_a_comparison_without_results_says_so() -> None:
    report = empty_report()
    found = lines(report)
    assert found[0] == report["verdict"]["sentences"][0]
    assert "note: the comparison is interrupted: what is missing here was not measured yet" in found
