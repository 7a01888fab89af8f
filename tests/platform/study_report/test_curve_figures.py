"""Learning curves are means of the trials that finished."""

from __future__ import annotations

import numpy as np
import pytest

from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.curve_figures import learning_curves, mean_learning_curves
from tests.platform.study_report.cases import SEEDS, study


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
    plot = learning_curves(trials, ["8", "16"], "AP", narrow=False)
    assert plot is not None
    assert ("xaxis2" in plot["layout"]) == has_late
    if has_late:
        begin, end = plot["layout"]["xaxis2"]["range"]
        for trial in trials:
            assert sum(begin <= x <= end for x, _ in trial.curve) >= 3
