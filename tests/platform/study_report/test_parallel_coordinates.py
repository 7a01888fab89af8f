"""Parallel axes show the parameters that differ."""

from __future__ import annotations

import math

import pytest

from deta.platform.study_report.parallel_coordinates import parallel_axes
from tests.platform.study_report.cases import sweep


def test_parallel_axes_leave_out_what_is_the_same_and_put_wide_ranges_on_a_log_scale():
    report = sweep()
    axes = {axis.name: axis for axis in parallel_axes(report.trials, "AP")}
    assert list(axes) == ["optim.lr", "optim.lr_rule", "AP"]
    rates = {trial.name: trial.parameters["optim.lr"] for trial in report.trials}
    low, high = math.log(min(rates.values())), math.log(max(rates.values()))
    for name, rate in rates.items():
        assert axes["optim.lr"].places[name] == pytest.approx((math.log(rate) - low) / (high - low))
    assert set(axes["AP"].places) == {t.name for t in report.trials if t.status == "finished"}
