"""Tables of trials leave out what is empty or equal, and count what failed."""

from __future__ import annotations

from deta.platform.study_report.trial_tables import (
    cost_kind,
    facts_line,
    failures_table,
    searched_table,
    trials_table,
)
from tests.platform.study_report.cases import study, sweep


def test_parameters_that_are_equal_in_all_trials_are_left_out():
    titles = [column.title for column in trials_table(sweep()).columns]
    assert "optim.lr" in titles
    assert "same" not in titles
    table = searched_table(sweep())
    assert table is not None
    assert [row[0] for row in table.rows] == ["optim.lr", "optim.lr_rule"]


def test_costs_are_compared_by_what_every_finished_trial_has():
    kind = cost_kind(study().trials)
    assert kind is not None
    assert kind.unit == "GPU-hours"
    kind = cost_kind(sweep().trials)  # the first trial took no CPU time that was measured
    assert kind is not None
    assert kind.unit == "CPU-hours"
    assert cost_kind([]) is None


def test_every_trial_that_did_not_finish_is_named_with_its_reason():
    table = failures_table(study())
    assert table is not None
    assert [row[2] for row in table.rows] == ["not finite: 8"]
    assert "14 finished, 1 failed" in facts_line(study())
