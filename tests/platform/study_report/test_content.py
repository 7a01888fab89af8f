"""A report has a verdict and cells, also where there is no analysis."""

from __future__ import annotations

from dataclasses import replace

from deta.platform.study_report.content import StudyReport
from tests.platform.study_report.cases import study, sweep


def test_the_verdict_of_a_sweep_is_its_best_finished_trial():
    report = sweep()
    best = max((t for t in report.trials if t.status == "finished"), key=lambda t: t.ap or 0.0)
    (verdict,) = report.verdicts
    assert verdict.startswith(f"Best of 7 finished trials: {best.name} with ")
    assert StudyReport(title="t", trials=[]).verdicts == ("No trial has finished.",)


def test_sentences_are_whole_and_do_not_break_within_an_interval():
    report = replace(sweep(), summary=("a is better by 0.3 ± 0.1 AP",))
    assert report.verdicts == ("A is better by 0.3\u00a0±\u00a00.1\u00a0AP.",)


def test_cells_are_in_the_order_of_the_design_and_only_a_study_has_a_pilot():
    assert study().cell_names[0] == "batch=8, rate=1×"
    assert study().pilot is not None
    assert sweep().cell_names == [f"trial-{i}" for i in range(12)]
    assert sweep().pilot is None
