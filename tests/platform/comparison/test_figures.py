"""Figures of a comparison show its differences in points."""

from __future__ import annotations

import pytest

from deta.platform.comparison.compare import Comparison
from deta.platform.comparison.figures import class_rows, metric_rows, training_curves
from tests.platform.comparison.cases import compared

__all__ = ["compared"]  # the fixture


def test_rows_are_differences_in_points_the_most_gained_first(compared: Comparison):
    found = compared.difference
    assert metric_rows(compared)[0].estimate == pytest.approx(100 * found.difference)
    rows = class_rows(compared)
    assert [row.estimate for row in rows] == sorted((row.estimate for row in rows), reverse=True)
    assert {row.name for row in rows} == {
        c["name"] for c in compared.sides[0].ground_truth["categories"]
    }


def test_both_trainings_are_drawn(compared: Comparison):
    curves = training_curves(compared)
    assert curves is not None
    assert [trace.name for trace in curves.data] == list(compared.names)
    assert [list(trace.y) for trace in curves.data] == [[3.0, 12.5]] * 2
