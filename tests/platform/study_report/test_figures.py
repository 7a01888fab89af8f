"""Figures of a study leave out numbers that are missing, and mark the front of costs."""

from __future__ import annotations

import numpy as np
import pytest

from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.figures import (
    CostMark,
    cell_rows,
    cost_against_ap,
    difference_rows,
    effect_rows,
    interactions,
    learning_curves,
    mean_learning_curves,
    neighbours,
    power_curve,
)
from tests.platform.study_report.cases import SEEDS, study


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


def test_two_factors_are_two_panels_with_named_lines():
    analysis = study().analysis
    assert analysis is not None
    plots = interactions(analysis)
    names = [[line.name for line in plot.data if line.mode == "lines+markers"] for plot in plots]
    assert names == [["rate 1×", "rate 2×"], ["batch 8", "batch 16"]]
    cell = analysis.cells[0]
    assert plots[0].data[1].y[0] == pytest.approx(cell.mean)
    assert sorted(plots[0].data[0].y)[:3] == sorted(cell.values.values())


def test_cells_off_the_front_are_hollow():
    marks = [CostMark("cheap", 1.0, 30.0), CostMark("worse", 2.0, 29.0)]
    plot = cost_against_ap(marks, ["cheap"], "cost", "AP")
    fills = [trace.marker.color for trace in plot.data if trace.name in ("cheap", "worse")]
    assert fills == ["var(--c0)", "var(--paper)"]
    assert plot.layout.xaxis.type == "linear"
    assert (
        cost_against_ap([*marks, CostMark("dear", 99, 31.0)], [], "", "").layout.xaxis.type == "log"
    )


def test_more_seeds_detect_smaller_differences():
    report = study()
    assert report.pilot is not None
    line = power_curve(report.pilot, 3, 0.3, "AP").data[1]
    assert list(line.y) == sorted(line.y, reverse=True)


def test_means_of_curves_leave_out_trials_that_did_not_finish():
    report = study()
    failed = next(trial for trial in report.trials if trial.status == "failed")
    curve = mean_learning_curves(report.trials)[failed.cell]
    assert curve.num_seeds == len(SEEDS) - 1
    finals = [t.ap for t in report.trials if t.cell == failed.cell and t.status == "finished"]
    assert curve.mean[-1] == pytest.approx(np.mean(finals))
    assert curve.low[-1] == min(finals)


@pytest.mark.parametrize(("evaluations", "has_late"), [(4, False), (12, True)])
def test_the_end_of_curves_is_drawn_again_where_each_has_an_end(evaluations: int, has_late: bool):
    # Batches of 8 and 16: 4 epochs of 650 images end after 2,600 samples, or after 2,608.
    trials = [
        TrialRecord(
            name=cell,
            cell=cell,
            seed=1,
            status="finished",
            metrics={"AP": 1.0},
            curve=tuple((each * epoch, float(epoch)) for epoch in range(1, evaluations + 1)),
        )
        for cell, each in (("8", 650), ("16", 652))
    ]
    plots = learning_curves(trials, ["8", "16"], "AP")
    assert len(plots) == 1 + has_late
    assert [len(trace.x) for trace in plots[0].data] == [evaluations] * 2
    for trace in plots[1].data if has_late else ():
        assert 3 <= len(trace.x) < evaluations


@pytest.mark.parametrize("evaluations", [1, 2])
def test_a_single_evaluation_is_a_point_with_its_range(evaluations: int):
    """A line through one point would be invisible, as would be a band of one."""
    trials = [
        TrialRecord(
            name=f"{cell} {seed}", cell=cell, seed=seed, status="finished", metrics={"AP": 1.0},
            curve=tuple((100.0 * (i + 1), ap + i) for i in range(evaluations)),
        )
        for cell, seed, ap in (("a", 1, 20.0), ("a", 2, 26.0), ("b", 1, 30.0))
    ]  # fmt: skip
    (plot,) = learning_curves(trials, ["a", "b"], "AP")
    named = {trace.name: trace for trace in plot.data if trace.showlegend}

    assert {name: len(trace.x) for name, trace in named.items()} == {
        "a": evaluations, "b": evaluations,
    }  # fmt: skip
    if evaluations == 2:
        assert all(trace.mode == "lines" for trace in named.values())
        assert len(plot.data) == 3  # the range of a
        return
    assert all(trace.mode == "markers" and trace.marker.size > 0 for trace in named.values())
    assert (named["a"].y, named["b"].y) == ((23.0,), (30.0,))
    assert (named["a"].error_y.array, named["a"].error_y.arrayminus) == ((3.0,), (3.0,))
    assert named["b"].error_y.array is None
