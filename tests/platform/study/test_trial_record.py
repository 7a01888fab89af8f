"""Records of trials: broken ones are refused, unfinished ones are failures."""

from __future__ import annotations

import math

import pytest

from deta.platform.study.trial_record import TrialRecord


def test_a_bad_record_is_refused_with_its_fault():
    with pytest.raises(ValueError, match="without an AP"):
        TrialRecord(name="a", cell="c", seed=1, status="finished")
    with pytest.raises(ValueError, match="no numbers, AP"):
        TrialRecord(name="a", cell="c", seed=1, status="failed", metrics={"AP": math.nan})


def test_a_trial_that_did_not_finish_is_a_failure_for_the_analysis():
    stopped = TrialRecord(
        name="a", cell="c", seed=1, status="stopped", reason="ASHA", metrics={"AP": 30.0}
    )
    assert stopped.observation().failure == "stopped: ASHA"
    assert not stopped.observation().metrics
