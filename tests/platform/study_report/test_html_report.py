"""The report holds every number of the study, and opens in a real browser without a complaint."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deta.platform.pages.plotly_parts import spread
from deta.platform.study.analyse import analyse
from deta.platform.study.decomposition import decompose
from deta.platform.study.study_types import Anchor, Cell, Question
from deta.platform.study.trial_record import TrialCost, TrialRecord
from deta.platform.study_report.content import Provenance, StudyReport
from deta.platform.study_report.curve_figures import learning_curves, mean_curves
from deta.platform.study_report.html_report import sections, write_report
from deta.platform.study_report.markdown_report import plain, summary
from deta.platform.study_report.parallel_coordinates import parallel_axes
from deta.platform.study_report.tables import amount

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "pipe | tick ` star * \u2028\u202e %{y} <b>",
)
SEEDS = (1, 2, 3)
NUM_EVALUATIONS = 8


def study(names: tuple[str, ...] = ("batch", "8", "16"), *, fails: bool = True) -> StudyReport:
    """Two factors with two levels, a named cell and its pair, three seeds; one trial failed."""
    factor, first, second = names
    cells = [
        Cell(f"{factor}={a}, rate={b}", {factor: a, "rate": b}, {"total_batch_size": a, "lr": b})
        for a in (first, second)
        for b in ("1×", "2×")
    ]
    cells += [
        Cell("published 8", {}, {}, same_as=cells[0].key),
        Cell("published 16", {}, {"optim.weight_decay": 0.1}),
    ]
    rng = np.random.default_rng(0)
    trials = []
    for place, cell in enumerate(cells):
        for seed in SEEDS if not cell.same_as else ():
            final = 40 + place * 0.3 + 0.2 * seed + float(rng.normal(0, 0.05))
            curve = tuple(
                (1000 * i, final * (1 - math.exp(-i / 2))) for i in range(1, NUM_EVALUATIONS)
            ) + ((1000 * NUM_EVALUATIONS, final),)
            failed = fails and place == 1 and seed == 3
            trials.append(
                TrialRecord(
                    name=f"{cell.key}, seed {seed}",
                    cell=cell.key,
                    seed=seed,
                    status="failed" if failed else "finished",
                    reason=f"not finite: {first}" if failed else "",
                    metrics={"AP": curve[2][1] if failed else final},
                    curve=curve[:3] if failed else curve,
                    parameters={"seed": seed, "total_batch_size": place, **cell.changes},
                    cost=TrialCost(
                        wall_s=3600.0, gpu_hours=8.0 - place, images_per_s=30.0, price=20.0
                    ),
                    run_url="https://mlflow.example/#/runs/1",
                )
            )
    observations = [trial.observation() for trial in trials]
    question = Question(f"{second} vs {first}", cells[2].key, cells[0].key, second, first)
    anchors = (
        Anchor("paper", 50.0, 8, "the README"),
        Anchor("other", 49.4, 16, "the README", first),
    )
    path = ((cells[0].key, ""), (cells[2].key, "batch"), ("published 16", "decay"))
    ended = datetime(2026, 11, 20, 12, tzinfo=UTC)
    return StudyReport(
        title=f"Does {factor} matter?",
        trials=trials,
        analysis=analyse(cells, observations, questions=[question]),
        decomposition=decompose(cells, observations, path, published=(anchors[0], anchors[1])),
        anchors=anchors,
        method=f"Crossed: {factor}",
        provenance=Provenance(
            command=f"python jobs/study.py --name '{factor}'",
            code_commit="0123abc",
            changed={"optim.lr": (1e-4, 2e-4)},
            train_fingerprint="sha256:1",
            versions={"torch": "2.15"},
            began=ended - timedelta(hours=2),
            ended=ended,
        ),
    )


def sweep() -> StudyReport:
    """Twelve trials of their own; some stopped, one failed, one still waits."""
    rng = np.random.default_rng(1)
    trials = []
    for i in range(12):
        lr = float(10 ** rng.uniform(-5, -3))
        status: Any = {3: "failed", 4: "waiting"}.get(i, "stopped" if i % 3 == 0 else "finished")
        length = {"failed": 0, "waiting": 0, "stopped": 2}.get(status, 6)
        curve = tuple((100 * k, 10.0 * math.log(k + 1 + i)) for k in range(1, length + 1))
        trials.append(
            TrialRecord(
                name=f"trial-{i}",
                cell=f"trial-{i}",
                seed=0,
                status=status,
                reason="ASHA" if status == "stopped" else "",
                metrics={"AP": curve[-1][1]} if curve else {},
                curve=curve,
                parameters={"optim.lr": lr, "optim.lr_rule": ("none", "sqrt")[i % 2], "same": 1},
                cost=TrialCost(cpu_hours=0.1 + 3.0 * (i % 4), wall_s=60.0),
            )
        )
    return StudyReport(title="A search", trials=trials)


def test_every_record_comes_back_from_json():
    for trial in [*study().trials, *sweep().trials]:
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


def test_the_page_has_its_parts_in_order():
    names = [section.name for section in sections(study())]
    assert names == [
        "design", "cells", "differences", "effects", "curves", "cost", "parameters", "power",
        "failures", "published", "how",
    ]  # fmt: skip
    names = [section.name for section in sections(sweep())]
    assert names == ["design", "curves", "cost", "parameters", "failures", "how"]


@pytest.mark.parametrize("report", [study(), sweep()], ids=["study", "sweep"])
def test_plotly_accepts_every_figure(report: StudyReport):
    """Its own validators refuse a key or a value that the drawing code would pass over."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    count = 0
    for section in sections(report):
        for part in section.parts:
            for plot in (getattr(part, "wide", None), getattr(part, "narrow", None)):
                if plot:
                    text = re.sub(r'"@\w+"', '"#123456"', json.dumps(plot))
                    graph_objects.Figure(json.loads(text))
                    count += 1
    assert count >= 6


def test_verdict_and_every_mean_stand_in_the_summary():
    report = study()
    assert report.analysis is not None
    text = summary(report)
    assert text.splitlines()[2].startswith("**16 vs 8")
    for cell in report.analysis.cells:
        assert plain(cell.cell.key) in text
        assert cell.mean is not None
        assert f"{cell.mean:.1f}" in text
    assert "not finite: 8" in text
    assert "sha256:1" in text


def test_tables_of_the_summary_are_rectangular_with_hostile_names():
    text = summary(study(HOSTILE))
    widths = None
    for line in text.splitlines():
        if line.startswith("|"):
            bars = len(re.findall(r"(?<!\\)\|", line))
            assert widths in (None, bars)
            widths = bars
        else:
            widths = None
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search("[\u2028\u202e]", text)


def test_means_of_curves_leave_out_trials_that_did_not_finish():
    report = study()
    failed = next(trial for trial in report.trials if trial.status == "failed")
    curve = mean_curves(report.trials)[failed.cell]
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


def test_parallel_axes_leave_out_what_is_the_same_and_put_wide_ranges_on_a_log_scale():
    report = sweep()
    axes = {axis.name: axis for axis in parallel_axes(report.trials, "AP")}
    assert list(axes) == ["optim.lr", "optim.lr_rule", "AP"]
    rates = {trial.name: trial.parameters["optim.lr"] for trial in report.trials}
    low, high = math.log(min(rates.values())), math.log(max(rates.values()))
    for name, rate in rates.items():
        assert axes["optim.lr"].places[name] == pytest.approx((math.log(rate) - low) / (high - low))
    assert set(axes["AP"].places) == {t.name for t in report.trials if t.status == "finished"}


def test_labels_are_spread_apart_in_their_order():
    heights = spread({"a": 1.0, "b": 1.05, "c": 1.1, "far": 9.0}, 0.5)
    places = list(heights.values())
    assert list(heights) == ["a", "b", "c", "far"]
    assert all(b - a >= 0.5 - 1e-9 for a, b in pairwise(places))
    assert heights["far"] == 9.0
    assert heights["b"] == pytest.approx(1.05)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0412345, "0.0412"), (3.14159, "3.14"), (2126.4, "2,126"), (0, "0")]
)
def test_amounts_have_three_digits_and_no_exponent(value: float, text: str):
    assert amount(value) == text


@pytest.mark.parametrize("count", [0, 1])
def test_a_sweep_that_has_hardly_begun_has_a_report(tmp_path: Path, count: int):
    waiting = TrialRecord(name="first", cell="first", seed=0, status="waiting")
    page_path, _ = write_report(tmp_path, StudyReport(title="t", trials=[waiting] * count))
    assert "No trial has finished." in page_path.read_text(encoding="utf-8")


def test_a_study_of_one_seed_has_a_report_that_says_what_is_missing(tmp_path: Path):
    whole = study(fails=False)
    assert whole.analysis is not None
    trials = [trial for trial in whole.trials if trial.seed == 1]
    cells = [summary.cell for summary in whole.analysis.cells]
    analysis = analyse(cells, [trial.observation() for trial in trials])
    report = replace(whole, trials=trials, analysis=analysis, decomposition=None)
    page_path, summary_path = write_report(tmp_path, report)
    assert "could not be estimated" in page_path.read_text(encoding="utf-8")
    assert "nan" not in summary_path.read_text(encoding="utf-8").lower()


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
    page_path, _ = write_report(tmp_path, study(HOSTILE))
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
    page_path, _ = write_report(tmp_path, study())
    view, trouble = opened(browser, page_path, viewport={"width": 1920, "height": 900})
    assert_fits(view, 1920)
    color = "getComputedStyle(document.querySelector('#cells-figure .ytick text')).fill"
    light = view.evaluate(color)
    view.emulate_media(color_scheme="dark")
    until(view, f"{color} !== {json.dumps(light)}")
    view.set_viewport_size({"width": 375, "height": 800})
    assert_fits(view, 375)
    assert not trouble
    view.close()


def test_in_a_browser_a_sweep_fits_a_narrow_window(browser: Any, tmp_path: Path):
    page_path, _ = write_report(tmp_path, sweep())
    view, trouble = opened(browser, page_path, viewport={"width": 375, "height": 800})
    assert_fits(view, 375)
    assert not trouble
    view.close()


def test_in_a_browser_text_and_tables_need_no_javascript(browser: Any, tmp_path: Path):
    page_path, _ = write_report(tmp_path, study())
    view, trouble = opened(browser, page_path, java_script_enabled=False)
    assert view.locator(".verdict").count() == 1
    assert view.locator("table").count() >= 10
    assert "needs JavaScript" in view.locator("main").inner_text()
    assert not [text for text in trouble if "policy" in text]
    view.close()
