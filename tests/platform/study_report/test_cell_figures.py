"""Figures of cells leave out numbers that are missing, and cost figures mark the front."""

from __future__ import annotations

import pytest

from deta.platform.study_report.cell_figures import (
    cell_rows,
    difference_rows,
    effect_rows,
    interactions,
    neighbours,
)
from deta.platform.study_report.cost_figures import CostMark, cost_against_ap, power_curve
from tests.platform.study_report.cases import study


def test_rows_have_the_seeds_that_finished():
    analysis = study().analysis
    assert analysis is not None
    rows = cell_rows(analysis)
    assert [len(row.values) for row in rows][:2] == [3, 2]
    assert all(row.interval is not None for row in difference_rows(analysis, analysis.differences))
    assert len(effect_rows(analysis)) == len(analysis.effects)


def test_neighbours_differ_in_one_factor_or_have_a_name():
    analysis = study().analysis
    assert analysis is not None
    pairs = {frozenset((item.first, item.second)) for item in neighbours(analysis)}
    assert frozenset(("batch=8, rate=1×", "batch=16, rate=1×")) in pairs
    assert frozenset(("batch=8, rate=1×", "batch=16, rate=2×")) not in pairs
    assert frozenset(("batch=8, rate=1×", "published 16")) in pairs


@pytest.mark.parametrize("narrow", [False, True])
def test_two_factors_are_two_panels_with_labelled_lines(narrow: bool):
    analysis = study().analysis
    assert analysis is not None
    plot = interactions(analysis, narrow=narrow)
    assert plot is not None
    assert {"xaxis", "xaxis2", "yaxis", "yaxis2"} <= plot["layout"].keys()
    assert len(plot["layout"]["annotations"]) == 4
    assert sum(trace["mode"] == "lines" for trace in plot["data"]) == 4


@pytest.mark.parametrize("narrow", [False, True])
def test_cells_off_the_front_are_hollow(narrow: bool):
    marks = [CostMark("cheap", 1.0, 30.0, 0), CostMark("worse", 2.0, 29.0, 1)]
    plot = cost_against_ap(marks, ["cheap"], "cost", "AP", {}, narrow=narrow)
    fills = [t["marker"]["color"] for t in plot["data"] if t["mode"] == "markers"]
    assert fills == ["@c0", "@paper"]
    assert plot["layout"]["xaxis"]["type"] == "linear"


def test_more_seeds_detect_smaller_differences():
    report = study()
    assert report.pilot is not None
    line = power_curve(report.pilot, 3, 0.3, "AP", narrow=False)["data"][1]
    assert line["y"] == sorted(line["y"], reverse=True)
