from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from report_cases import empty_report, make_report
from tailor.evaluation.drawing import html as report_html
from tailor.evaluation.drawing.html import render_html
from tailor.evaluation.drawing.quantities import score

VOID = {"meta", "link", "input", "br"}
NASTY = (
    '<script>alert("x")</script>',
    'it\'s "quoted" ]]> --> <!-- & &amp;',
    "W" * 3000,
    "مرحبا \u202eevil",
    "a\x00b\x1b[31m\ud800",
    "",
    "first\r\nsecond | third",
)


class Page(HTMLParser):
    """What stands on a page; fails where elements do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parents: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.parents.append(self.open[-1] if self.open else "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def spaced(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


CASES: dict[str, dict[str, Any]] = {
    "one base": {},
    "two bases": {"num_bases": 2, "num_seeds": 2},
    "a failure": {"num_seeds": 2, "failed": "full"},
    "one size": {"sizes": [275]},
    "lower is better": {"metric": "perplexity"},
    "unpaired": {"metric": "macro_f1"},
}


@pytest.fixture(scope="module", params=CASES)
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return make_report(**CASES[request.param])


def test_the_page_is_well_formed_and_accessible(report: dict[str, Any]) -> None:
    html = render_html(report)
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert sorted(ids) == sorted(set(ids))
    for _, attributes in page.elements:
        named = (attributes.get("aria-labelledby") or "").split()
        target = [(attributes.get("href") or "")[1:]] if (attributes.get("href") or "").startswith("#") else []
        assert set(named + target) <= set(ids)
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) == len(page.all("thead"))
    assert all(
        attributes.get("tabindex") == "0" for attributes in page.all("div") if attributes.get("role") == "region"
    )
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert [page.elements.count((name, {})) for name in ("main", "header")] == [1, 1]


def test_regions_are_told_apart_by_their_names(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    names = [attributes["aria-label"] for attributes in page.all("div") if attributes.get("role") == "region"]
    assert all(names)
    assert sorted(names, key=str) == sorted(set(names), key=str)


def test_every_table_has_as_many_cells_as_headers_in_every_line(report: dict[str, Any]) -> None:
    html = render_html(report)
    tables = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    assert tables
    for table in tables:
        counts = {len(re.findall(r"<t[hd][ >]", line)) for line in re.findall(r"<tr.*?</tr>", table, re.DOTALL)}
        assert len(counts) == 1


def test_nothing_is_fetched_and_nothing_runs(report: dict[str, Any]) -> None:
    html = render_html(report)
    page = Page(html)
    policies = [a["content"] or "" for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    assert "script-src" not in policies[0]
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & {name for name, _ in page.elements}
    assert re.findall(r"(?:https?:)?//[^\s\"<]+", html.replace('xmlns="http://www.w3.org/2000/svg"', "")) == []
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert {a["href"] for a in page.all("a") if not (a["href"] or "").startswith("#")} == {"report.json"}
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)


def test_every_drawing_is_valid_xml_with_a_title_a_description_and_a_table(report: dict[str, Any]) -> None:
    html = render_html(report)
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        assert [child.tag.rsplit("}")[-1] for child in root][:2] == ["title", "desc"]
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert figures
    for figure in figures:
        parts = (r'<div class="wide"><svg.*?<div class="narrow"><svg', r"</svg></div>\n<details>.*?<table>")
        assert all(re.search(part, figure, re.DOTALL) for part in parts)


def test_every_row_and_every_score_is_there(report: dict[str, Any]) -> None:
    text = spaced(Page(render_html(report)).text)
    for row in report["rows"]:
        assert row["name"] in text
        for found in row["metrics"].values():
            assert score(found["mean"]) in text
            assert f"{score(found['low'])} to {score(found['high'])}" in text
    for sentence in (*report["verdict"]["sentences"], report["verdict"]["noise"], *report["notes"]):
        assert sentence in text
    for failure in report["failures"]:
        assert failure["error"]["message"] in text
        assert failure["error"]["hint"] in text


def test_the_order_of_keys_in_the_file_does_not_matter(report: dict[str, Any]) -> None:
    assert render_html(json.loads(json.dumps(report, sort_keys=True))) == render_html(report)


def test_an_engineer_can_check_it() -> None:
    report = make_report()
    text = spaced(Page(render_html(report)).text)
    wanted = [report["command"], report["data"]["content_hash"], *report["versions"].values(), "Example CPU @ 2.60GHz"]
    wanted += ["16 GiB", "396: 275 training, 31 validation, 90 test", "$0.90 an hour", "3 for each technique"]
    wanted += ["prompt_tuning: init text, num_virtual_tokens 20", "learning_rate 0.009 (0.500, chosen)", "cards-lora"]
    wanted += [
        "tailor compare cards --redraw",
        "early stopping",
        "181 MiB",
        "×1.86",
        "merged ×1.01",
        "9.40 % of the base",
    ]
    assert [part for part in wanted if part not in text] == []
    for claim in report["claims"]:
        for cell in claim["cells"].values():
            assert cell["measured"] in text
            assert cell["why"] in text


def test_the_row_to_take_is_marked_once_in_each_table_of_all_rows() -> None:
    report = make_report()
    html = render_html(report)
    assert report["verdict"]["pick"] == "tailor-nano/lora"
    lines = re.findall(r'<tr class="picked">.*?</tr>', html, re.DOTALL)
    assert len(lines) == 4  # in short, quality, training, serving
    assert all("<bdi>lora</bdi>" in line and "take this" in line for line in lines)


def test_a_missing_value_is_a_dash_with_its_reason() -> None:
    html = render_html(make_report(failed="full"))
    assert re.search(r'<td class="number" title="failed: training needs more memory than there is">–</td>', html)
    assert "– for majority, nearest neighbour, tf-idf + logistic regression: no language model" in html
    assert "– for base, prompting: nothing is trained" in html
    assert "None" not in Page(html).text


def test_sections_without_data_are_left_out() -> None:
    whole = render_html(make_report())
    assert all(f'<section id="{name}"' in whole for name in ("curves", "examples", "cost", "claims", "differences"))
    assert '<section id="failures"' not in whole
    one_size = render_html(make_report(sizes=[275]))
    assert '<section id="curves"' not in one_size
    empty = render_html(empty_report())
    assert re.findall(r'<section id="(\w+)"', empty) == ["verdict", "method"]
    assert "the comparison is interrupted" in Page(empty).text
    assert [id_ for id_ in re.findall(r'href="#(\w+)"', empty) if f'id="{id_}"' not in empty] == []


def test_hostile_texts_change_nothing_but_texts() -> None:
    plain = make_report(failed="full")
    report = json.loads(json.dumps(plain))
    for k, found in enumerate(report["disagreements"]):
        found["prompt"], found["reference"], found["source"] = (NASTY[(k + j) % len(NASTY)] for j in range(3))
        for j, answer in enumerate(found["answers"].values()):
            answer["completion"], answer["answer"] = NASTY[(k + j) % len(NASTY)], NASTY[(k + j + 2) % len(NASTY)]
    for row in report["rows"]:
        row["notes"] = list(NASTY)
        if row["name"] == "lora":
            row["name"] = NASTY[0] + NASTY[1]
    report["name"] = report["command"] = NASTY[1]
    report["verdict"]["sentences"] = [NASTY[0], *NASTY]
    html = render_html(report)
    html.encode("utf-8")
    assert "alert(&#34;x&#34;)" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", html)
    page = Page(html)
    assert not page.all("script")
    assert NASTY[0] in page.text
    assert "a\\x00b\\x1b[31m\\ud800" in page.text
    assert "(empty)" in page.text
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_ids_stay_unique_and_names_apart_when_rows_share_a_name() -> None:
    report = make_report()
    for row in report["rows"]:
        if row["kind"] == "technique":
            row["name"] = "same"
    text = Page(render_html(report)).text
    assert all(name in text for name in ("tailor-nano/lora", "tailor-nano/full"))


def test_answers_without_a_right_and_wrong_show_their_scores() -> None:
    report = make_report()
    found = report["disagreements"][0]
    for k, answer in enumerate(found["answers"].values()):
        answer["score"] = 0.25 * k + 0.1
    report["disagreements"] = [found]
    text = Page(render_html(report)).text
    assert "0.350" in text
    assert "right" not in text[text.index("Where techniques disagree", 600) : text.index("How this was measured", 600)]


def colours(name: str) -> dict[str, str]:
    style = (Path(report_html.__file__).parent / "page.css.jinja").read_text("utf-8")
    block = re.search(rf"{{% set {name} %}}(.*?){{% endset %}}", style, re.DOTALL)
    assert block is not None
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block[1]))


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_colours_can_be_read_on_both_backgrounds(theme: str) -> None:
    found = colours(theme)
    assert set(found) == set(colours("light"))
    for ground in ("paper", "soft"):
        for name in set(found) - {"paper", "soft", "line"}:
            brighter, darker = sorted((luminance(found[name]), luminance(found[ground])), reverse=True)
            assert (brighter + 0.05) / (darker + 0.05) >= 4.5, (name, ground)


def test_the_page_knows_dark_and_print_and_moves_nothing() -> None:
    style = render_html(make_report())
    style = style[style.index("<style>") : style.index("</style>")]
    assert style.count("{") == style.count("}")
    for rule in ("prefers-color-scheme: dark", "#theme-dark:checked", "#theme-light:checked", "@media print"):
        assert rule in style
    assert not re.search("transition|animation|@keyframes", style)
