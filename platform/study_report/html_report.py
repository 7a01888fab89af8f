"""Write the report of a study or a sweep: one HTML page, and a summary in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deta.platform.pages.content import (
    BulletList,
    Figure,
    Link,
    Paragraph,
    Part,
    Section,
    Table,
)
from deta.platform.pages.page import write_page
from deta.platform.pages.plotly_parts import ForestRow, Plot, forest
from deta.platform.study.cost import CostPoint, pareto
from deta.platform.study.study_types import Analysis
from deta.platform.study_report.cell_figures import (
    cell_rows,
    difference_rows,
    effect_rows,
    interactions,
    neighbours,
)
from deta.platform.study_report.content import StudyReport
from deta.platform.study_report.cost_figures import CostMark, cost_against_ap, power_curve
from deta.platform.study_report.curve_figures import learning_curves, mean_learning_curves
from deta.platform.study_report.markdown_report import markdown_summary
from deta.platform.study_report.parallel_coordinates import parallel_axes, parallel_coordinates
from deta.platform.study_report.result_tables import (
    anchors_table,
    cells_table,
    curve_table,
    design_table,
    differences_table,
    effects_table,
    steps_table,
    terms_table,
)
from deta.platform.study_report.trial_tables import (
    changed_table,
    cost_kind,
    cost_table,
    facts_line,
    failures_table,
    how_table,
    required_seeds_table,
    searched_table,
    trials_table,
)
from deta.platform.system.atomic_write import write_atomic

MANY_PAIRS = 21  # above it, the figure shows pairs of cells that differ in one factor
MIN_AXES = 2  # parallel coordinates of one parameter would repeat the table
HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"


def write_study_report(folder: Path, report: StudyReport) -> tuple[Path, Path]:
    """Write report.html and report.md, each atomically. Returns their paths.

    Raises:
        RuntimeError: plotly is not installed; the summary is written all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page_path, summary_path = folder / HTML_NAME, folder / MARKDOWN_NAME
    write_atomic(summary_path, markdown_summary(report))
    top = [Paragraph(sentence, "verdict") for sentence in report.verdicts]
    top.append(Paragraph(facts_line(report), "facts"))
    write_page(page_path, title=report.title, summary=top, sections=sections(report))
    return page_path, summary_path


def sections(report: StudyReport) -> list[Section]:
    """Return the sections of the page in their order, without those that would be empty."""
    analysis = report.analysis
    found = [_design(report)]
    if analysis:
        found += [_cells(analysis), _differences(analysis), _effects(analysis)]
    found += [
        _curves(report),
        _cost(report),
        _parameters(report),
        _power(report),
        _failures(report),
        _published(report),
        _how(report),
    ]
    return [section for section in found if section is not None]


def _design(report: StudyReport) -> Section | None:
    parts: list[Part] = [Paragraph(report.method)] if report.method else []
    table = design_table(report) or searched_table(report)
    if table:
        parts.append(table)
    return Section(name="design", title="What was compared", parts=parts) if parts else None


def _cells(analysis: Analysis) -> Section:
    parts: list[Part] = [cells_table(analysis)]
    rows = cell_rows(analysis)
    if rows:
        parts.append(
            _forest_figure(
                "cells-figure",
                f"{analysis.metric} of each cell",
                rows,
                f"{analysis.metric} (0 to 100)",
                is_difference=False,
                note="Small marks are seeds, the large one their mean, the line its "
                f"{100 * analysis.confidence:g} % interval. Intervals of two cells may overlap "
                "although the cells differ, because seeds move all cells together.",
            )
        )
    if analysis.notes:
        parts.append(BulletList("Limits of these results", analysis.notes))
    return Section(name="cells", title="Results of the cells", parts=parts)


def _differences(analysis: Analysis) -> Section | None:
    if not analysis.differences and not analysis.answers:
        return None
    parts: list[Part] = []
    percent = f"{100 * analysis.confidence:g} %"
    unit = f"difference in {analysis.metric}, points"
    drawn = "A filled mark differs from zero after Holm's correction, a hollow one does not."
    if analysis.answers:
        parts.append(
            differences_table(
                analysis,
                analysis.answers,
                "The questions of this study, answered with the noise of all its cells; "
                f"{percent} intervals, one at a time.",
            )
        )
        if rows := difference_rows(analysis, analysis.answers):
            note = f"Small marks are the differences of single seeds. {drawn}"
            parts.append(_forest_figure("answers-figure", "The questions", rows, unit, note=note))
    table = differences_table(
        analysis,
        analysis.differences,
        "All pairs of cells, each from the differences of its own seeds alone (paired t).",
    )
    twins = {cell.cell.key for cell in analysis.cells if cell.cell.same_as}
    shown = tuple(d for d in analysis.differences if not twins & {d.first, d.second})
    which = "All pairs, seed by seed"
    if len(shown) > MANY_PAIRS:
        shown = tuple(d for d in shown if d in neighbours(analysis))
        which = "Pairs that differ in one factor, and those with a named cell, seed by seed"
    if rows := difference_rows(analysis, shown):
        note = f"Each from its own seeds alone, so with wider intervals. {drawn}"
        parts.append(_forest_figure("pairs-figure", which, rows, unit, note=note, table=table))
    elif analysis.differences:
        parts.append(table)
    return Section(name="differences", title="Differences, seed by seed", parts=parts)


def _effects(analysis: Analysis) -> Section | None:
    if not analysis.effects:
        return None
    parts: list[Part] = []
    if plot := interactions(analysis, narrow=False):
        parts.append(
            Figure(
                name="interaction-figure",
                title="Means at each level",
                description=f"Mean {analysis.metric} over the cells at each level of a factor, "
                "with one line for each level of another. The numbers are in the table of cells.",
                wide=plot,
                narrow=interactions(analysis, narrow=True) or {},
                note="Parallel lines mean that the factors add. Lines that diverge or cross mean "
                "that the effect of one depends on the other. Small marks are seeds.",
            )
        )
    if rows := effect_rows(analysis):
        parts.append(
            _forest_figure(
                "effects-figure", "Effects", rows, f"effect on {analysis.metric}, points",
                note="A filled mark differs from zero after Holm's correction, a hollow one does "
                "not. An interaction is the difference of two differences.",
            )
        )  # fmt: skip
    parts.append(effects_table(analysis))
    if analysis.terms:
        parts.append(terms_table(analysis))
    return Section(name="effects", title="Effects and interactions", parts=parts)


def _curves(report: StudyReport) -> Section | None:
    ran = {trial.cell for trial in report.trials}
    names = report.cell_names
    plots = [
        learning_curves(report.trials, names, report.metric, narrow=narrow)
        for narrow in (False, True)
    ]
    if plots[0] is None or not ran:
        return None
    unfinished = any(trial.status != "finished" and trial.curve for trial in report.trials)
    figure = Figure(
        name="curves-figure",
        title=f"{report.metric} over training samples seen",
        description=f"Learning curves: {report.metric} of each cell over the samples it was "
        "trained on. The numbers are in the table below.",
        wide=plots[0],
        narrow=plots[1] or {},
        note="Lines are means over seeds; bands reach from the lowest seed to the highest."
        + (" Dotted lines are trials that did not finish; no mean includes them." * unfinished),
        table=curve_table(mean_learning_curves(report.trials), report.metric),
    )
    return Section(name="curves", title="Learning curves", parts=[figure])


def _cost(report: StudyReport) -> Section | None:
    table = cost_table(report)
    if not table.rows:
        return None
    parts: list[Part] = [table]
    kind = cost_kind(report.trials)
    marks: list[CostMark] = []
    costs: dict[str, float] = {}
    for place, name in enumerate(report.cell_names if kind else []):
        trials = [t for t in report.trials if t.cell == name and t.status == "finished"]
        own = {t.name: cost for t in trials if kind and (cost := kind.of(t)) is not None}
        results = [t.ap for t in trials if t.ap is not None]
        if own and results:
            mean_cost, mean_ap = sum(own.values()) / len(own), sum(results) / len(results)
            marks.append(CostMark(name, mean_cost, mean_ap, place, tuple(trials)))
            costs |= own
    if kind and marks:
        front = [p.label for p in pareto(CostPoint(m.name, m.ap, m.cost) for m in marks)]
        title = f"{kind.title} ({kind.unit})"
        several = any(len(mark.trials) > 1 for mark in marks)
        plots = [
            cost_against_ap(marks, front, title, report.metric, costs, narrow=narrow)
            for narrow in (False, True)
        ]
        parts.append(
            Figure(
                name="cost-figure",
                title=f"{report.metric} over cost",
                description=f"{report.metric} over the {kind.title}. On the Pareto front are: "
                + "; ".join(front) + ".",
                wide=plots[0],
                narrow=plots[1],
                note="Filled marks are on the Pareto front: nothing is both cheaper and better. "
                + ("Large marks are means, small ones seeds; the front is that of the means, "
                   "because a front of single trials would favour lucky ones." if several else ""),
            )
        )  # fmt: skip
    return Section(name="cost", title="Cost", parts=parts)


def _parameters(report: StudyReport) -> Section | None:
    if not report.trials:
        return None
    table = trials_table(report)
    axes = parallel_axes(report.trials, report.metric)
    if len(axes) < MIN_AXES:
        return Section(name="parameters", title="Trials and their parameters", parts=[table])
    figure = Figure(
        name="parallel-figure",
        title="Parameters of every trial",
        description="Parallel coordinates: a line for each trial through its parameters and its "
        f"{report.metric}. The numbers are in the table of trials.",
        wide=parallel_coordinates(report.trials, axes, narrow=False),
        narrow=parallel_coordinates(report.trials, axes, narrow=True),
        note=f"A line for each trial; the stronger its colour, the higher its {report.metric}. "
        "Dotted lines did not finish.",
        table=table,
    )
    return Section(name="parameters", title="Trials and their parameters", parts=[figure])


def _power(report: StudyReport) -> Section | None:
    if report.analysis is None:
        return None
    noise, metric = report.analysis.noise, report.metric
    pilot = report.pilot
    if pilot is None:
        why = noise.note or "it needs at least two seeds"
        text = f"The noise of this study could not be estimated: {why}."
        return Section(name="power", title="What more seeds would show", parts=[Paragraph(text)])
    worst = noise.interval.high if noise.interval else pilot.cautious.sd
    text = (
        f"The standard deviation of one training within a seed is {pilot.estimate.sd:.2f} {metric} "
        f"(at most {worst:.2f} with {100 * report.analysis.confidence:g} % confidence)."
    )
    seeds_now = len(report.analysis.seeds)
    plots = [
        power_curve(pilot, seeds_now, report.relevant, metric, narrow=narrow)
        for narrow in (False, True)
    ]
    figure = Figure(
        name="power-figure",
        title="The smallest difference that is detected, by seeds",
        description="The smallest true difference that is detected with 80 % power, over the "
        "number of seeds of each cell. The table above has the seeds for given differences.",
        wide=plots[0],
        narrow=plots[1],
        note="Detected means: significant four times in five. This is for one comparison; several "
        "at once, with Holm's correction, need more.",
    )
    return Section(
        name="power",
        title="What more seeds would show",
        parts=[Paragraph(text), required_seeds_table(report, pilot), figure],
    )


def _failures(report: StudyReport) -> Section:
    table = failures_table(report)
    part = table or Paragraph("Every trial finished.")
    return Section(name="failures", title="Failures and early stops", parts=[part])


def _published(report: StudyReport) -> Section | None:
    parts: list[Part] = []
    if report.decomposition:
        parts += [Paragraph(text) for text in report.decomposition.text.split("\n\n")]
        parts.append(steps_table(report.decomposition, report.metric))
    if report.anchors:
        parts.append(anchors_table(report.anchors))
    return Section(name="published", title="Published numbers", parts=parts) if parts else None


def _how(report: StudyReport) -> Section:
    how = report.provenance
    parts: list[Part] = [how_table(how)] if how_table(how).rows else []
    if table := changed_table(how):
        parts.append(table)
    if how.run_url:
        parts.append(Paragraph(Link("The run of this sweep in MLflow", how.run_url)))
    parts.append(
        Paragraph(
            "This page contains all of its data and its drawing code (plotly.js, MIT license); it "
            "fetches nothing.",
            style="aside",
        )
    )
    return Section(name="how", title="How it was run", parts=parts)


def _forest_figure(
    name: str,
    title: str,
    rows: Sequence[ForestRow],
    axis_title: str,
    *,
    note: str,
    table: Table | None = None,
    is_difference: bool = True,
) -> Figure:
    plots: list[Plot] = [
        forest(rows, axis_title, zero=is_difference, narrow=narrow) for narrow in (False, True)
    ]
    return Figure(
        name=name,
        title=title,
        description=f"{title}: estimates with their intervals. The numbers are in the table.",
        wide=plots[0],
        narrow=plots[1],
        note=note,
        table=table,
    )
