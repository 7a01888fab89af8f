"""Figures hold their numbers, in colours that the style sheet has, with names made safe."""

from __future__ import annotations

import re

import pytest

from deta.platform.pages.figures import ForestRow, bars, forest, shortened, style
from deta.platform.pages.number_format import Interval
from deta.platform.pages.render import read_asset


def test_names_are_cut_and_made_safe():
    assert shortened("<b>" + "x" * 9, 5) == "&lt;b&gt;x…"


def test_series_are_distinguishable_by_colour_and_dash():
    assert len({str(style(place)["line"]) for place in range(24)}) == 24


@pytest.mark.parametrize("name", ["a", "a name that is long enough for a line"])
def test_a_forest_has_an_interval_for_each_estimate_that_has_one(name: str):
    rows = [
        ForestRow(name, 1.0, Interval(0.5, 1.75), (("seed 1", 0.9),), is_distinct=True),
        ForestRow("b", -0.2, None),
    ]
    plot = forest(rows, "AP", zero=True)
    values, first, _, second = plot.data
    assert list(values.x) == [0.9]
    assert (first.error_x.array[0], first.error_x.arrayminus[0]) == (0.75, 0.5)
    assert (second.error_x.array[0], second.marker.color) == (0, "var(--paper)")
    for note, row in zip(plot.layout.annotations, rows, strict=True):
        assert note.text.startswith(row.name)
    assert ("<br>" in plot.layout.annotations[1].text) == (name != "a")


def test_every_colour_of_a_figure_is_one_of_the_style_sheet():
    plot = bars({"a": {"x": 1.0}, "b": {"x": 2.0}}, "title")
    names = set(re.findall(r"var\(--(\w+)\)", plot.to_json()))
    assert {"c0", "c1", "ink", "rule"} <= names
    assert names <= set(re.findall(r"--(\w+): light-dark", read_asset("pages/theme.css")))
