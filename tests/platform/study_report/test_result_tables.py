"""Tables of results show estimates with equal decimals, and no empty columns."""

from __future__ import annotations

from deta.platform.pages.content import Column, Table
from deta.platform.study_report.result_tables import (
    cells_table,
    design_table,
    differences_table,
    effects_table,
)
from deta.platform.study_report.table_cells import (
    NOTHING,
    amount_text,
    count_text,
    p_text,
    value_text,
    without_empty_columns,
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
    assert [column.title for column in table.columns][:2] == ["difference", "estimate"]
    assert "significant" in table.rows[0]
    assert len(effects_table(analysis).rows) == len(analysis.effects)


def test_only_a_study_has_a_design():
    assert design_table(study()) is not None
    assert design_table(sweep()) is None


def test_columns_in_which_nothing_is_written_are_left_out():
    columns = [Column(title=title) for title in "abc"]
    table = Table(caption="", columns=columns, rows=[["", "", NOTHING], ["", "1", NOTHING]])
    assert [c.title for c in without_empty_columns(table).columns] == ["a", "b", "c"]
    assert [c.title for c in without_empty_columns(table, NOTHING).columns] == ["a", "b"]


def test_values_are_written_as_a_person_would():
    values = (None, True, 0.00012345, (1, 2.0), (), "x")
    assert list(map(value_text, values)) == ["none", "yes", "0.0001234", "1, 2", "nothing", "x"]
    assert [p_text(None), p_text(0.0001), p_text(0.2)] == [NOTHING, "< 0.001", "0.20"]
    assert [amount_text(None), amount_text(2130.0)] == [NOTHING, "2,130"]
    assert [count_text(None), count_text(12000)] == ["over 10,000", "12,000"]
