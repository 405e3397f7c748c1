"""The charts: well-formed SVG that shows what it was given."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from benchmarks.chart import BAR_MAX, COLOURS, TICKS_MIN, Bars, Lines, bar_chart, line_chart, ticks
from benchmarks.charts import charts
from support.benchmark_runs import whole

SVG = "{http://www.w3.org/2000/svg}"


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def bars(root: ElementTree.Element) -> list[float]:
    """Widths of the bars, in the order they were given; the legend's squares have no title."""
    return [float(rect.attrib["width"]) for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]


def test_bars_are_as_long_as_their_values() -> None:
    chart = bar_chart([Bars("speed", [[1.0, 0.5], [1.5, None]])], ["one", "two"], ["a", "b"], "peer = 1")
    first, second, third = bars(parsed(chart))
    assert second == pytest.approx(first / 2, abs=0.1)
    assert third == pytest.approx(first * 1.5, abs=0.1)
    assert {"speed", "one", "two", "a", "b", "peer = 1", "1.50"} <= set(texts(parsed(chart)))


def test_a_value_far_out_does_not_flatten_the_others() -> None:
    root = parsed(bar_chart([Bars("speed", [[1.0], [100.0]])], ["one", "two"], ["a"], "peer"))
    near, far = bars(root)
    assert far == pytest.approx(BAR_MAX * near, abs=0.2)
    assert "100.00" in texts(root)


def test_a_line_leaves_out_what_was_not_measured() -> None:
    root = parsed(line_chart([Lines("seconds", [[None, 2.0, 1.0]])], ["1", "2", "4"], ["a"], "connections"))
    (line,) = root.iter(f"{SVG}polyline")
    (x1, y1), (x2, y2) = (map(float, spot.split(",")) for spot in line.attrib["points"].split())
    assert x1 < x2 and y1 < y2  # less is lower, and SVG counts downwards
    assert len(list(root.iter(f"{SVG}circle"))) == 2


def test_labels_may_hold_anything() -> None:
    root = parsed(bar_chart([Bars("<&>", [[1.0]])], ['"quoted"'], ["a < b"], "&"))
    assert {"<&>", '"quoted"', "a < b", "&"} <= set(texts(root))


@pytest.mark.parametrize("most", [0.003, 0.99, 1.0, 1.6, 7.2, 100.0, 4321.0])
def test_ticks_are_round_and_reach_the_greatest_value(most: float) -> None:
    scale = ticks(most)
    assert scale[0] == 0 and scale[-1] >= most > scale[-2]
    assert TICKS_MIN <= len(scale) - 1 <= 2.5 * TICKS_MIN + 1


def test_nothing_measured_still_makes_an_axis() -> None:
    assert ticks(0.0) == [0.0, 1.0]


def test_colours_can_be_read_on_white_and_on_black() -> None:
    for colour in COLOURS:
        red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        assert 0.25 < 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.75, colour


def test_every_part_of_a_run_has_its_chart() -> None:
    drawn = charts(whole())
    assert sorted(drawn) == ["benchmarks-requests.svg", "benchmarks-rows.svg", "benchmarks-scaling.svg"]
    for picture in drawn.values():
        parsed(picture)


def test_the_chart_of_rows_names_those_with_numbers() -> None:
    labels = texts(parsed(charts(whole())["benchmarks-rows.svg"]))
    assert {"first", "sparse"} <= set(labels)
    assert "memory" not in labels
