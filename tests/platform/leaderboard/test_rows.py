"""Rows made of a run's metrics and tags, and intervals over runs of several seeds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from deta.platform.leaderboard.rows import LeaderboardRow, make_row, with_seed_intervals


def row_with_metrics(seed: int, ap: float, lr: str = "0.1", **more: float) -> LeaderboardRow:
    info = SimpleNamespace(
        run_id=f"{seed}-{lr}", experiment_id="1", run_name="a", status="FINISHED",
        start_time=1000, end_time=3_601_000,
    )  # fmt: skip
    data = SimpleNamespace(
        metrics={"best/AP": ap, "val/AP": ap - 1, **more},
        params={"seed": str(seed), "optim.lr": lr, "name": f"run-{seed}", "data.val_images": "x"},
        tags={"deta.recipe": "deta_r50.demo"},
    )
    run = SimpleNamespace(info=info, data=data)
    return make_row(run, "deta", ("val", "sha256:0123456789abcdef", 50))


def test_a_row_has_the_best_ap_the_cost_and_the_data():
    row = row_with_metrics(
        1, 40.0, **{"cost/gpu_hours": 8.0, "cost/wall_s": 7200.0, "val/seconds": 25.0,
                    "best/AP_low": 39.0, "best/AP_high": 41.5}
    )  # fmt: skip
    assert (row.ap, row.low, row.high, row.interval) == (40.0, 39.0, 41.5, "images")
    assert (row.gpu_hours, row.hours, row.images_per_s) == (8.0, 2.0, 2.0)
    assert (row.data, row.recipe) == ("val 01234567", "deta_r50.demo")
    before_costs_were_logged = row_with_metrics(1, 40.0)
    assert before_costs_were_logged.hours == 1.0
    assert (before_costs_were_logged.gpu_hours, before_costs_were_logged.interval) == (None, "")


def test_nan_is_left_out():
    assert row_with_metrics(1, float("nan")).ap is None
    row = row_with_metrics(1, 40.0, **{"best/AP_low": float("nan"), "best/AP_high": 41.0})
    assert (row.low, row.high, row.interval) == (None, None, "")


def test_runs_that_differ_in_the_seed_alone_have_the_interval_of_their_mean():
    rows = with_seed_intervals(
        [row_with_metrics(1, 40.0), row_with_metrics(2, 42.0), row_with_metrics(3, 50.0, "0.2")]
    )
    # mean 41, standard deviation 1.41421, t of one degree 12.706: 41 -+ 12.706
    assert rows[0].low == pytest.approx(41 - 12.706, abs=1e-3)
    assert rows[1].high == pytest.approx(41 + 12.706, abs=1e-3)
    assert rows[0].interval == "2 seeds"
    assert rows[2].interval == ""  # another learning rate
    failed = replace(row_with_metrics(2, 42.0), status="FAILED")
    assert with_seed_intervals([row_with_metrics(1, 40.0), failed])[0].interval == ""
