from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor.evaluation.drawing.charts import (
    Difference,
    Level,
    Point,
    Series,
    differences_to_best,
    learning_curves,
    quality_against_cost,
)
from tailor.evaluation.drawing.plot import Axis, Frame
from tailor.evaluation.drawing.quantities import count, money, score
from tailor.evaluation.drawing.scales import Scale, is_wide, linear, logarithmic, round_step
from tailor.evaluation.drawing.svg import MARKERS, Box, Style, marker, place_label, spread, tag, text_width

SVG = "{http://www.w3.org/2000/svg}"
WIDTHS = (340, 560, 860)
QUALITY = Axis("Accuracy", score, (0.0, 1.0))
COST = Axis("cost", money)
ROWS = Axis("training rows", count)


def frame(width: int) -> Frame:
    return Frame("it", "A <title>", "What it shows & why", width)


def series(label: str, number: int, *points: tuple[float, float]) -> Series:
    return Series(label, Style(number, number), tuple(Point(x, y, y - 0.05, y + 0.05) for x, y in points))


def texts(drawing: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def test_an_even_scale_maps_its_ends_and_its_middle() -> None:
    scale = Scale(0, 10, 100, 300)
    assert [scale.at(v) for v in (0, 5, 10, 12)] == [100, 200, 300, 340]
    assert scale.held(12) == 300
    assert Scale(0, 1, 400, 0).at(0.25) == 300  # upside down, as y axes are


def test_a_logarithmic_scale_gives_every_factor_the_same_room() -> None:
    scale = Scale(1, 100, 0, 200, log=True)
    assert [scale.at(v) for v in (1, 10, 100)] == pytest.approx([0, 100, 200])
    assert scale.at(2) == pytest.approx(30.103, abs=1e-3)


def test_ticks_are_round_numbers() -> None:
    assert Scale(0, 1, 0, 1).ticks(5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert Scale(-0.6, 0.2, 0, 1).ticks(4) == [-0.6, -0.4, -0.2, 0, 0.2]
    assert Scale(1, 100, 0, 1, log=True).ticks(6) == pytest.approx([1, 2, 5, 10, 20, 50, 100])
    assert Scale(1, 1e6, 0, 1, log=True).ticks(6) == pytest.approx([10.0**k for k in range(7)])
    assert [round_step(distance, 5) for distance in (1, 0.8, 47, 2.1)] == pytest.approx([0.2, 0.2, 10, 0.5])


def test_ranges_end_on_round_numbers_and_stay_within_bounds() -> None:
    found = linear([0.23, 0.66], 0, 1)
    assert (found.low, found.high) == (0.2, 0.7)
    held = linear([0.02, 0.99], 0, 1, within=(0.0, 1.0))
    assert (held.low, held.high) == (0, 1)
    assert linear([3, 3], 0, 1).low < 3 < linear([3, 3], 0, 1).high
    assert [is_wide(values) for values in ([1, 30], [1, 10], [0, 30], [])] == [True, False, False, False]


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.booleans())
def test_every_value_lies_on_its_scale(values: list[float], log: bool) -> None:
    scale = (logarithmic if log else linear)(values, 10, 200)
    assert all(10 - 1e-6 <= scale.at(value) <= 200 + 1e-6 for value in values)
    assert scale.ticks(5) == sorted(set(scale.ticks(5)))


def test_tags_escape_what_they_hold() -> None:
    assert tag("text", 'a < "b" & ]]>\x00', class_="x") == (
        '<text class="x">a &lt; &#34;b&#34; &amp; ]]&gt;\\x00</text>'
    )
    assert tag("path", d='"><script>', stroke=None) == '<path d="&#34;&gt;&lt;script&gt;"></path>'
    assert tag("rect", x=2.0, y=1.25, font_size=3) == '<rect x="2" y="1.2" font-size="3"></rect>'


def test_series_differ_in_colour_and_in_shape() -> None:
    drawn = {str(marker(Style(0, k), 0.0, 0.0)) for k in range(len(MARKERS))}
    assert len(drawn) == len(MARKERS) == 7
    looks = {(Style(k, k).css, Style(k, k).shape) for k in range(56)}
    assert len(looks) == 56
    assert Style(None, 2).css == "plain"


def test_a_label_takes_the_nearest_free_place() -> None:
    within = Box(0, 0, 400, 300)
    right = place_label(100, 100, "lora", taken=[], within=within)
    assert (right.box.left, right.leader) == (109, None)
    left = place_label(100, 100, "lora", taken=[Box(105, 90, 200, 110)], within=within)
    assert left.box.right == pytest.approx(91)
    far = place_label(100, 100, "lora", taken=[Box(40, 60, 160, 140)], within=within)
    assert far.leader is not None
    assert not far.box.meets(Box(40, 60, 160, 140))
    assert text_width("ab") * 2 == text_width("日本")


@given(st.lists(st.floats(0, 300), min_size=1, max_size=15))
def test_spread_labels_keep_their_order_and_their_distance(wanted: list[float]) -> None:
    places = spread(wanted, 16, 0, 300)
    assert min(places) >= -1e-6
    assert max(places) <= 300 + 1e-6
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(places[b] - places[a] >= 16 - 1e-6 for a, b in pairwise(order))


def test_labels_that_have_room_stay_where_they_are() -> None:
    assert spread([200, 10, 100], 16, 0, 300) == [200, 10, 100]
    assert spread([100, 100], 16, 0, 300) == [92, 108]


def scatter(width: int) -> str:
    lines = [series("lora", 0, (0.5, 0.6)), series('full "<&>"', 1, (40.0, 0.7)), series("ia3 ]]>", 2, (0.6, 0.58))]
    return str(quality_against_cost(frame(width), lines, [Level("majority", 0.2)], COST, QUALITY))


def curves(width: int) -> str:
    lines = [series("lora", 0, (8, 0.3), (64, 0.5), (512, 0.8)), series("full", 1, (8, 0.2), (64, 0.55))]
    return str(learning_curves(frame(width), lines, ROWS, QUALITY))


def forest(width: int) -> str:
    rows = [
        Difference("lora", Style(0, 0), -0.02, -0.06, 0.02, True, "tie"),
        Difference("base <x>", Style(None, 1), -0.4, -0.5, -0.3, False, "worse"),
    ]
    return str(differences_to_best(frame(width), rows, "full", "difference in accuracy"))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("draw", [scatter, curves, forest])
def test_a_chart_is_well_formed_and_says_what_it_is(draw: object, width: int) -> None:
    assert callable(draw)
    drawing = draw(width)
    root = ElementTree.fromstring(drawing)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    ids = {element.get("id"): element.tag for element in root.iter() if element.get("id")}
    assert [ids[name] for name in (root.get("aria-labelledby") or "").split()] == [f"{SVG}title", f"{SVG}desc"]
    assert root.findtext(f"{SVG}title") == "A <title>"
    numbers = [float(n) for e in root.iter() for a in ("x", "cx", "y", "cy") if (n := e.get(a))]
    assert min(numbers) >= 0
    assert max(numbers) <= max(width, float(root.get("height") or 0))


def test_costs_that_lie_far_apart_are_drawn_on_a_logarithmic_axis() -> None:
    found = texts(scatter(860))
    assert {"lora", 'full "<&>"', "ia3 ]]>", "majority", "cost", "Accuracy"} <= set(found)
    assert {"$0.5", "$1", "$10"} & set(found)
    centres = {g.findtext(f"{SVG}title"): g for g in ElementTree.fromstring(scatter(860)).iter(f"{SVG}g")}
    tip = "lora: 0.600 (0.550 to 0.650) at $0.50"
    assert tip in {title.replace("\N{NO-BREAK SPACE}", " ") for title in centres if title}


def test_points_stand_at_their_hand_computed_places() -> None:
    one = Series("a", Style(0, 0), (Point(8, 0.25, 0.0, 1.0), Point(512, 0.75, 0.0, 1.0)))
    drawing = ElementTree.fromstring(str(learning_curves(frame(860), [one], ROWS, QUALITY)))
    centres = [(float(c.get("cx") or 0), float(c.get("cy") or 0)) for c in drawing.iter(f"{SVG}circle")]
    bottom, top = 420 - 50, 34
    assert [y for _, y in centres] == pytest.approx([bottom - 0.25 * (bottom - top), bottom - 0.75 * (bottom - top)])
    left, right = 62, 860 - 24 - text_width("a")
    room = 0.06 / 1.12 * (right - left)  # the axis has 6 % of its decades free on either side
    assert [x for x, _ in centres] == pytest.approx([left + room, right - room], abs=0.06)


def test_learning_curves_have_a_line_a_band_and_a_name_for_each() -> None:
    drawing = curves(860)
    classes = re.findall(r'class="([^"]*)"', drawing)
    assert sum(name.startswith("band") for name in classes) == 2
    assert sum(name == "line" for name in classes) == 2
    assert {"8", "64", "512", "lora", "full", "training rows"} <= set(texts(drawing))


def test_a_flat_dashed_line_has_no_band() -> None:
    flat = Series("base", Style(None, 0), (Point(8, 0.2, 0.1, 0.3), Point(64, 0.2, 0.1, 0.3)), dashed=True)
    drawing = str(learning_curves(frame(340), [flat], ROWS, QUALITY))
    assert "line dashed" in drawing
    assert "band" not in drawing


def test_a_tie_is_hollow_and_told_in_words() -> None:
    drawing = forest(860)
    assert drawing.count("dot hollow") == 1
    words = [text.replace("\N{NO-BREAK SPACE}", " ") for text in texts(drawing)]
    assert "−0.020 (−0.060 to +0.020), tie" in words
    assert "−0.400 (−0.500 to −0.300), worse" in words
    assert "best: full" in words
