"""Figures of an evaluation choose a form that can be read for any number of classes."""

from __future__ import annotations

import numpy as np
import pytest

from deta.platform.analysis.analysis import explain
from deta.platform.analysis.figures import (
    MAX_CONFUSED,
    MAX_LINES,
    class_precision_recall,
    confused_most,
    confusion_matrix,
    error_costs,
    reliability,
)
from tests.platform.analysis.scenes import detections_of, scene
from tests.platform.analysis.test_report import case


@pytest.mark.parametrize(("num_classes", "kind"), [(3, "scatter"), (MAX_LINES + 4, "heatmap")])
def test_many_classes_are_rows_of_a_heat_map(num_classes: int, kind: str):
    classes = explain(*case(num_classes, 40)).classes
    assert {trace.type for trace in class_precision_recall(classes).data} == {kind}


def test_a_large_confusion_matrix_shows_the_classes_that_are_confused_most():
    confusion = np.zeros((MAX_CONFUSED + 6, MAX_CONFUSED + 6), int)
    confusion[:-1, :-1] = np.diag(np.full(MAX_CONFUSED + 5, 9))
    confusion[24, 2] = confusion[7, 23] = 1
    chosen = confused_most(confusion)
    assert len(chosen) == MAX_CONFUSED
    assert chosen == sorted(chosen)
    assert {2, 7, 23, 24} <= set(chosen)


def test_figures_show_the_numbers_of_the_analysis():
    explanation = explain(scene(0), detections_of(scene(0), 0, noise=1))
    (bars,) = error_costs({"": explanation}).data
    assert dict(zip(bars.y, bars.x, strict=True)) == {
        kind: 100 * cost for kind, cost in explanation.errors.cost.items()
    }
    (heat,) = confusion_matrix(explanation).data
    row = explanation.confusion[0]
    assert list(heat.z[0]) == pytest.approx((row / row.sum()).tolist())
    assert heat.text[0][0] == str(row[0])
    marks = reliability(explanation.calibration).data[1]
    assert list(marks.x) == [score for score, _, count in explanation.calibration.bins if count]
