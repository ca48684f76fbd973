from __future__ import annotations

import re
from typing import Any

import pytest

from report_cases import empty_report, make_report
from tailor.evaluation.drawing.markdown import escaped, render_markdown
from tailor.evaluation.drawing.quantities import score


def tables(markdown: str) -> list[list[list[str]]]:
    """The cells of every table, cut at the bars that are not escaped; code is left out."""
    text = re.sub(r"^(`{3,})sh\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


@pytest.mark.parametrize("case", [{}, {"num_bases": 2, "num_seeds": 2}, {"failed": "full"}, {"metric": "perplexity"}])
def test_tables_are_tables_and_hold_every_score(case: dict[str, Any]) -> None:
    report = make_report(**case)
    markdown = render_markdown(report)
    found = tables(markdown)
    assert len(found) > 8
    for header, rule, *lines in found:
        assert {len(line) for line in (rule, *lines)} == {len(header)}
        assert lines
        assert all(re.fullmatch(":---|---:", cell) for cell in rule)
    for row in report["rows"]:
        for metric in row["metrics"].values():
            assert score(metric["mean"]) in markdown
    assert markdown.startswith("# cards\n\n**")
    assert report["command"] in markdown
    assert report["data"]["content_hash"] in markdown
    assert "None" not in markdown


def test_the_first_table_says_what_to_take() -> None:
    report = make_report()
    header, _, *lines = tables(render_markdown(report))[0]
    assert header[:3] == ["Technique", "Accuracy", "Against the best"]
    pick = next(row["name"] for row in report["rows"] if row["id"] == report["verdict"]["pick"])
    assert [line[0] for line in lines if line[0].startswith("**")] == [f"**{pick}**"]


def test_what_failed_is_told() -> None:
    markdown = render_markdown(make_report(failed="full"))
    assert "| full | 275 | 0 | training needs more memory than there is | lower batch_size |" in markdown
    assert "– for full: failed: training needs more memory than there is" in markdown


def test_sections_without_data_are_left_out() -> None:
    headings = re.findall("^## (.*)$", render_markdown(empty_report()), re.MULTILINE)
    assert headings == ["Comparison", "How this was measured", "Notes"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b", "a \\| b"),
        ("one\r\ntwo\tthree", "one<br>two three"),
        ("<script>", "\\<script>"),
        ("[link](x) `code` **bold**", "\\[link](x) \\`code\\` \\*\\*bold\\*\\*"),
        ("prompt_tuning _emphasis_", "prompt_tuning \\_emphasis\\_"),
        ("# head", "\\# head"),
        ("1. first", "1\\. first"),
        ("- item\n> quote", "\\- item<br>\\> quote"),
        ("&lt; AT&T", "\\&lt; AT&T"),
        ("back\\slash", "back\\\\slash"),
        ("a\x00b", "a\\\\x00b"),
        ("", ""),
        ("−0.5 of 3.2", "−0.5 of 3.2"),
    ],
)
def test_texts_are_shown_as_they_are(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_hostile_texts_stay_in_their_cells() -> None:
    nasty = ["a | b\nc", "``` \n# x", "<script>alert(1)</script>", "", "\x07\u202e", "| --- |\n| --- |"]
    report = make_report()
    shape = [(len(table), len(table[0])) for table in tables(render_markdown(report))]
    for k, found in enumerate(report["disagreements"]):
        found["prompt"], found["reference"] = nasty[k % len(nasty)], nasty[(k + 1) % len(nasty)]
        for j, answer in enumerate(found["answers"].values()):
            answer["completion"] = answer["answer"] = nasty[(k + j) % len(nasty)]
    report["command"] = "tailor compare '```'\n```\nx"
    for row in report["rows"]:
        row["notes"] = nasty
    markdown = render_markdown(report)
    assert [(len(table), len(table[0])) for table in tables(markdown)] == shape
    assert "````sh\ntailor compare '```'\n```\nx\n````" in markdown
    assert not re.search(r"(?<!\\)<(?!br>)", markdown)
    assert "\x07" not in markdown
