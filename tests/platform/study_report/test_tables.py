"""Tables show estimates with equal decimals, what failed, and what a person needs to rerun."""

from __future__ import annotations

from deta.platform.pages.content import Link, Number
from deta.platform.study_report.tables import (
    amount_text,
    cells_table,
    cost_kind,
    cost_table,
    count_text,
    design_table,
    differences_table,
    effects_table,
    failures_table,
    p_text,
    required_seeds_table,
    trials_table,
    value_text,
)
from tests.platform.study_report.cases import study, sweep


def test_cells_show_the_trials_that_failed():
    report = study()
    assert report.analysis is not None
    rows = cells_table(report.analysis).rows
    assert len(rows) == len(report.analysis.cells)
    assert "failed" in str(rows[1][5])


def test_differences_have_a_verdict_and_effects_a_test():
    analysis = study().analysis
    assert analysis is not None
    table = differences_table(analysis, analysis.answers, "Questions")
    assert table.columns[:2] == ["difference", Number("estimate", "AP", 2)]
    assert "significant" in table.rows[0]
    assert len(effects_table(analysis).rows) == len(analysis.effects)


def test_a_study_shows_its_cells_and_a_sweep_what_it_varied():
    assert design_table(study()).columns[0] == "cell"
    assert [row[0] for row in design_table(sweep()).rows] == ["optim.lr", "optim.lr_rule"]


def test_values_are_written_as_a_person_writes_them():
    assert value_text((1, None, True)) == "1, none, yes"
    assert value_text(1e-4) == "0.0001"
    assert [p_text(None), p_text(0.0001), p_text(0.2)] == [None, "< 0.001", "0.20"]
    assert [amount_text(None), amount_text(2130.0)] == [None, "2,130"]
    assert [count_text(None), count_text(12000)] == ["over 10,000", "12,000"]


def test_parameters_that_are_equal_in_all_trials_are_left_out():
    columns = trials_table(sweep()).columns
    assert Number("optim.lr") in columns
    assert Number("same") not in columns


def test_costs_are_compared_by_what_every_finished_trial_has():
    kind = cost_kind(study().trials)
    assert kind is not None
    assert kind.unit == "GPU-hours"
    kind = cost_kind(sweep().trials)  # the first trial took no CPU time that was measured
    assert kind is not None
    assert kind.unit == "CPU-hours"
    assert cost_kind([]) is None
    assert cost_table(study()).rows[0][:5] == ["batch=8, rate=1×", "3", "40.41", "30", "60 min"]


def test_more_seeds_cost_more():
    report = study()
    assert report.pilot is not None
    rows = required_seeds_table(report, report.pilot).rows
    assert [row[0] for row in rows] == ["0.1", "0.2", "0.3", "0.5", "1"]
    assert int(str(rows[0][1])) > int(str(rows[-1][1]))


def test_every_trial_that_did_not_finish_is_named_with_its_reason():
    (row,) = failures_table(study()).rows
    assert isinstance(row[0], Link)
    assert row[2] == "not finite: 8"
