"""The report holds every number of the study, and opens in a real browser without errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deta.platform.study.analyse import analyse
from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.content import StudyReport
from deta.platform.study_report.html_report import facts_line, sections, write_study_report
from tests.platform.study_report.cases import HOSTILE, study, sweep


def test_the_page_has_its_parts_in_order():
    names = [section.name for section in sections(study())]
    assert names == [
        "design", "cells", "differences", "effects", "curves", "cost", "parameters", "power",
        "failures", "published", "how",
    ]  # fmt: skip
    names = [section.name for section in sections(sweep())]
    assert names == ["design", "curves", "cost", "parameters", "failures", "how"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_sweep_that_has_hardly_begun_has_a_report(tmp_path: Path, count: int):
    waiting = TrialRecord(name="first", cell="first", seed=0, status="waiting")
    page_path, _ = write_study_report(tmp_path, StudyReport(title="t", trials=[waiting] * count))
    assert "No trial has finished." in page_path.read_text(encoding="utf-8")


def test_a_study_of_one_seed_has_a_report_that_says_what_is_missing(tmp_path: Path):
    whole = study(fails=False)
    assert whole.analysis is not None
    trials = [trial for trial in whole.trials if trial.seed == 1]
    cells = [summary.cell for summary in whole.analysis.cells]
    analysis = analyse(cells, [trial.observation() for trial in trials])
    report = replace(whole, trials=trials, analysis=analysis, decomposition=None)
    page_path, summary_path = write_study_report(tmp_path, report)
    assert "could not be estimated" in page_path.read_text(encoding="utf-8")
    assert "nan" not in summary_path.read_text(encoding="utf-8").lower()


def test_the_facts_count_trials_by_their_state():
    assert "14 finished, 1 failed" in facts_line(study())


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page, drawn, and everything that a careful page would not cause."""
    view = browser.new_page(**options)
    trouble: list[str] = []
    view.on("console", lambda message: trouble.append(message.text))
    view.on("pageerror", lambda error: trouble.append(str(error)))
    view.on("dialog", lambda dialog: (trouble.append("dialog"), dialog.dismiss()))
    view.on("request", lambda sent: None if sent.url == path.as_uri() else trouble.append(sent.url))
    view.add_init_script(
        "addEventListener('securitypolicyviolation',"
        " (event) => console.error('policy: ' + event.violatedDirective));"
    )
    view.goto(path.as_uri())
    return view, trouble


def until(view: Any, expression: str) -> None:
    """Wait for a condition; playwright's own way compiles code, which the page forbids."""
    for _ in range(300):
        if view.evaluate(expression):
            return
        view.wait_for_timeout(100)
    raise AssertionError(f"never true: {expression}")


RIGHTMOST_PX = """Math.max(...[...document.querySelectorAll(".plot svg.main-svg")]
  .map((svg) => svg.getBoundingClientRect().right))"""


CUT_LABELS = """[...document.querySelectorAll(".plot")].flatMap((plot) => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll("text")].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.width > 0 && (own.left < box.left - 2 || own.right > box.right + 2
      || own.top < box.top - 2 || own.bottom > box.bottom + 2);
  }).map((text) => `${plot.id}: ${text.textContent}`);
})"""


def assert_fits(view: Any, width_px: int) -> None:
    """Nothing is wider than the window, and no label of a figure is cut off."""
    until(view, f"{RIGHTMOST_PX} <= {width_px}")
    assert view.evaluate("document.documentElement.scrollWidth") <= width_px
    assert view.evaluate(CUT_LABELS) == []


def test_in_a_browser_hostile_names_are_only_names(browser: Any, tmp_path: Path):
    page_path, _ = write_study_report(tmp_path, study(HOSTILE))
    view, trouble = opened(browser, page_path, viewport={"width": 1440, "height": 900})
    assert view.locator(".plot svg.main-svg").count() >= 8
    # What plotly writes as a label is the name as it is, not its markup.
    assert HOSTILE[0] in "".join(view.locator(".plot text").all_text_contents())
    assert view.locator("img").count() == 0
    assert view.locator("script").count() == 3
    assert HOSTILE[0] in view.locator("h1").inner_text()
    assert_fits(view, 1440)
    assert not trouble
    view.close()


def test_in_a_browser_it_fits_the_window_and_follows_the_colour_scheme(
    browser: Any, tmp_path: Path
):
    page_path, _ = write_study_report(tmp_path, study())
    view, trouble = opened(browser, page_path, viewport={"width": 1920, "height": 900})
    assert_fits(view, 1920)
    color = "getComputedStyle(document.querySelector('#AP-of-each-cell-1 .xtick text')).fill"
    light = view.evaluate(color)
    view.emulate_media(color_scheme="dark")
    until(view, f"{color} !== {json.dumps(light)}")
    view.set_viewport_size({"width": 375, "height": 800})
    assert_fits(view, 375)
    assert not trouble
    view.close()


def test_in_a_browser_a_sweep_fits_a_narrow_window(browser: Any, tmp_path: Path):
    page_path, _ = write_study_report(tmp_path, sweep())
    view, trouble = opened(browser, page_path, viewport={"width": 375, "height": 800})
    assert_fits(view, 375)
    assert not trouble
    view.close()


def test_in_a_browser_text_and_tables_need_no_javascript(browser: Any, tmp_path: Path):
    page_path, _ = write_study_report(tmp_path, study())
    view, trouble = opened(browser, page_path, java_script_enabled=False)
    assert view.locator(".verdict").count() == 1
    assert view.locator("table").count() >= 10
    assert "needs JavaScript" in view.locator("main").inner_text()
    assert not [text for text in trouble if "policy" in text]
    view.close()
