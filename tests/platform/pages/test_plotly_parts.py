"""Labels keep apart, and axes have room for their values."""

from __future__ import annotations

from itertools import pairwise

import pytest

from deta.platform.pages.number_format import Interval
from deta.platform.pages.plotly_parts import (
    ForestRow,
    forest,
    label_px,
    padded,
    shortened,
    spread,
    step_color,
)


def test_labels_are_spread_apart_in_their_order():
    heights = spread({"a": 1.0, "b": 1.05, "c": 1.1, "far": 9.0}, 0.5)
    places = list(heights.values())
    assert list(heights) == ["a", "b", "c", "far"]
    assert all(b - a >= 0.5 - 1e-9 for a, b in pairwise(places))
    assert heights["far"] == 9.0
    assert heights["b"] == pytest.approx(1.05)


def test_names_are_cut_and_made_safe():
    assert shortened("<b>" + "x" * 9, 5) == "&lt;b&gt;x…"
    assert label_px(["a" * 100], 10) == label_px(["a" * 10])


def test_ranges_have_space_around_their_values():
    low, high = padded([1.0, 3.0])
    assert low < 1 < 3 < high
    low, high = padded([0.0])
    assert low < 0 < high


def test_quantities_have_nine_steps_of_colour():
    assert [step_color(share) for share in (-1.0, 0.0, 0.5, 2.0)] == ["@s0", "@s0", "@s4", "@s8"]


@pytest.mark.parametrize("narrow", [False, True])
def test_a_forest_has_an_interval_for_each_estimate_that_has_one(narrow: bool):
    rows = [
        ForestRow("a", 1.0, Interval(0.5, 1.5), (("seed 1", 0.9),), is_distinct=True),
        ForestRow("b", -0.2, None),
    ]
    plot = forest(rows, "AP", zero=True, narrow=narrow)
    kinds = [trace["mode"] for trace in plot["data"]]
    assert kinds == ["markers", "lines", "markers", "markers"]
    assert plot["data"][1]["x"] == [0.5, 1.5]
    low, high = plot["layout"]["xaxis"]["range"]
    assert low < -0.2 < 1.5 < high
    assert len(plot["layout"]["annotations"]) == 2
