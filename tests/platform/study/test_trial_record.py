"""Records of trials survive JSON, and broken ones are refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from deta.platform.study.trial_record import TrialCost, TrialRecord


def test_a_record_comes_back_from_json():
    trial = TrialRecord(
        name="a, seed 1",
        cell="a",
        seed=1,
        status="failed",
        reason="not finite: loss",
        metrics={"AP": 30.5},
        curve=((1000, 20.0), (2000, 30.5)),
        parameters={"seed": 1, "optim.lr": 1e-4, "optim.lr_rule": None},
        cost=TrialCost(wall_s=60.0, gpu_hours=0.5, price=2.0),
        run_url="https://mlflow.example/#/runs/1",
    )
    assert TrialRecord.from_json(json.loads(json.dumps(trial.to_json()))) == trial


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "a", "cell": "c", "seed": 1}, "lacks status"),
        ({"name": "a", "cell": "c", "seed": 1, "status": "done"}, "known are waiting"),
        ({"name": "a", "cell": "c", "seed": "1", "status": "failed"}, "seed='1'"),
        ({"name": "a", "cell": "c", "seed": 1, "status": "finished"}, "without an AP"),
        ({"name": "a", "cell": "c", "seed": 1, "status": "failed", "x": 1}, "unknown keys: x"),
        (
            {"name": "a", "cell": "c", "seed": 1, "status": "failed", "metrics": {"AP": math.nan}},
            "no numbers",
        ),
    ],
)
def test_a_bad_record_is_refused_with_its_fault(row: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrialRecord.from_json(row)


def test_a_trial_that_did_not_finish_is_a_failure_for_the_analysis():
    stopped = TrialRecord(
        name="a", cell="c", seed=1, status="stopped", reason="ASHA", metrics={"AP": 30.0}
    )
    assert stopped.observation().failure == "stopped: ASHA"
    assert not stopped.observation().metrics
