from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.report.chart import WIDTH, Bars, Line, bar_chart, heat_map, line_chart, stacked_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"
SHOW = "{:g}".format
NASTY = '<script>alert("x")</script> & \x00\x1b\n'
FINITE = st.floats(-1e12, 1e12, allow_nan=False)


def charts(name: str) -> dict[str, str]:
    return {
        "line": line_chart(name, name, [Line(name, [(1, 0.5), (2, None), (3, 0.7)])], name, SHOW),
        "bar": bar_chart(name, name, [name], [Bars(name, [1.0]), Bars("b", [None], 1)], SHOW),
        "stacked": stacked_chart(name, name, [name], [Bars(name, [3]), Bars("b", [1], 1)], SHOW),
        "heat": heat_map(name, name, [name], [name, "b"], [[0.5, 1.0]], SHOW),
    }


def test_every_chart_is_well_formed_accessible_and_scales() -> None:
    for kind, text in charts("Loss").items():
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        assert root.get("width") == "100%"
        assert root.get("viewBox").startswith(f"0 0 {WIDTH} ")
        parts = {part.get("id"): part.tag for part in root if part.get("id")}
        assert [parts[name] for name in root.get("aria-labelledby").split()] == [f"{SVG}title", f"{SVG}desc"], kind


def test_text_is_escaped() -> None:
    for text in charts(NASTY).values():
        root = ElementTree.fromstring(text)
        assert "<script" not in text
        assert root.find(f".//{SVG}script") is None
        assert root.find(f"{SVG}title").text.startswith('<script>alert("x")</script> & ')


def test_nothing_known_gives_no_chart() -> None:
    assert line_chart("t", "d", [Line("a", [(1, None)])], "x", SHOW) == ""
    assert line_chart("t", "d", [], "x", SHOW) == ""
    assert bar_chart("t", "d", ["g"], [Bars("a", [None])], SHOW) == ""
    assert stacked_chart("t", "d", ["g"], [Bars("a", [0])], SHOW) == ""
    assert heat_map("t", "d", ["g"], ["c"], [[0.0]], SHOW) == ""
    assert heat_map("t", "d", [], [], [], SHOW) == ""


def test_ids_differ_between_charts() -> None:
    found = [name for text in charts("Loss").values() for name in re.findall(r' id="([^"]+)"', text)]
    other = re.findall(r' id="([^"]+)"', charts("Metric")["line"])
    assert not set(found) & set(other)


def rects(text: str) -> list[tuple[float, float, str]]:
    """x, width and tip of the rectangles that have one."""
    root = ElementTree.fromstring(text)
    found = [(rect, rect.find(f"{SVG}title")) for rect in root.iter(f"{SVG}rect")]
    return [(float(r.get("x")), float(r.get("width")), tip.text) for r, tip in found if tip is not None]


def test_bars_are_in_proportion_and_say_their_value() -> None:
    text = bar_chart("t", "d", ["g", "h"], [Bars("a", [1.0, 4.0]), Bars("b", [2.0, None], 1)], SHOW)
    widths = {tip: width for _, width, tip in rects(text)}
    assert widths["h, a: 4"] == pytest.approx(4 * widths["g, a: 1"], rel=0.01)
    assert widths["g, b: 2"] == pytest.approx(2 * widths["g, a: 1"], rel=0.01)
    assert set(widths) == {"g, a: 1", "g, b: 2", "h, a: 4"}
    assert "not measured" in text
    shorter = {tip: width for _, width, tip in rects(bar_chart("t", "d", ["g"], [Bars("a", [1.0])], SHOW, 2.0))}
    full = {tip: width for _, width, tip in rects(bar_chart("t", "d", ["g"], [Bars("a", [1.0])], SHOW))}
    assert full["g, a: 1"] == pytest.approx(2 * shorter["g, a: 1"], rel=0.01)


def test_stacked_parts_follow_one_another() -> None:
    text = stacked_chart("t", "d", ["g"], [Bars("a", [1]), Bars("b", [0], 1), Bars("c", [3], 2)], SHOW)
    (first, wide, one), (second, wider, two) = rects(text)
    assert (one, two) == ("g, a: 1", "g, c: 3")
    assert first == 0
    assert second == pytest.approx(wide + 0.7, abs=0.2)
    assert wider == pytest.approx(3 * wide, rel=0.03)


def test_heat_map_thins_many_rows() -> None:
    few = heat_map("t", "d", [f"r{n}" for n in range(40)], ["a"], [[1.0]] * 40, SHOW)
    many = heat_map("t", "d", [f"r{n}" for n in range(41)], ["a"], [[1.0]] * 41, SHOW)
    assert "r39" in few
    assert "r40" not in many


def points(text: str) -> list[tuple[float, float]]:
    """Where the markers of a line chart stand."""
    found = re.findall(r'<path transform="translate\(([-\d.]+) ([-\d.]+)\)"', text)
    return [(float(x), float(y)) for x, y in found][1:]


def test_lines_go_where_the_values_are_and_break_at_gaps() -> None:
    text = line_chart("t", "d", [Line("a", [(0, 1.0), (1, 3.0), (2, None), (4, 2.0)])], "x", SHOW)
    (x0, y0), (x1, y1), (x4, y4) = points(text)
    assert x0 < x1 < x4
    assert (x4 - x0) == pytest.approx(4 * (x1 - x0), abs=0.3)
    assert y1 < y4 < y0
    path = re.search(r'<path d="([^"]*)" style="fill:none', text).group(1)
    assert path.count("M") == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=6))
def test_every_number_fits_into_the_frame(values: list[float]) -> None:
    text = line_chart("t", "d", [Line("a", list(enumerate(values)))], "x", "{:.3g}".format)
    height = float(ElementTree.fromstring(text).get("viewBox").split()[3])
    assert "nan" not in text
    assert "inf" not in text
    assert all(0 <= x <= WIDTH and 0 <= y <= height for x, y in points(text))


@given(FINITE, FINITE)
def test_ticks_are_round_even_and_enclose(one: float, two: float) -> None:
    low, high = sorted((one, two))
    found = ticks(low, high)
    assert 2 <= len(found) <= 12
    assert found == sorted(set(found))
    step = found[1] - found[0]
    slack = 1e-6 * max(step, abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack
    assert all(math.isclose(b - a, step, rel_tol=1e-3) for a, b in itertools.pairwise(found))


def test_ticks_by_hand() -> None:
    assert ticks(0, 1) == [0, 0.5, 1]
    assert ticks(0.31, 0.74) == [0.2, 0.4, 0.6, 0.8]
    assert ticks(0, 110) == [0, 50, 100, 150]
    assert ticks(5, 5) == [2, 4, 6, 8]
    assert ticks(0, 0) == [-0.5, 0, 0.5]


def test_long_names_are_cut_and_kept_as_a_tip() -> None:
    name = "An organisation with a very long name indeed, " * 3
    text = bar_chart("t", "d", [name], [Bars("a", [1.0])], SHOW)
    shown = [node for node in ElementTree.fromstring(text).iter(f"{SVG}text") if (node.text or "").startswith("An org")]
    assert shown[0].text.endswith("…")
    assert shown[0].find(f"{SVG}title").text == name
