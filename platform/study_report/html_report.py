"""Write the report of a study or a sweep: one HTML page, and a summary in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deta.platform.pages.content import BulletList, Figure, Link, Paragraph, Part, Section, Table
from deta.platform.pages.figures import ForestRow, forest
from deta.platform.pages.number_format import amount, duration, num_of
from deta.platform.pages.page import write_page
from deta.platform.study.cost import CostPoint, pareto
from deta.platform.study.study_types import Analysis
from deta.platform.study_report.content import StudyReport
from deta.platform.study_report.figures import (
    CostMark,
    cell_rows,
    cost_against_ap,
    difference_rows,
    effect_rows,
    interactions,
    learning_curves,
    mean_learning_curves,
    neighbours,
    power_curve,
)
from deta.platform.study_report.markdown_report import markdown_report
from deta.platform.study_report.tables import (
    anchors_table,
    cells_table,
    changed_table,
    cost_kind,
    cost_table,
    curve_table,
    design_table,
    differences_table,
    effects_table,
    failures_table,
    how_table,
    required_seeds_table,
    steps_table,
    terms_table,
    trials_table,
)
from deta.platform.system.atomic_write import write_atomic

MANY_PAIRS = 21  # above it, the figure shows pairs of cells that differ in one factor
HTML_NAME, MARKDOWN_NAME = "report.html", "report.md"


def write_study_report(folder: Path, report: StudyReport) -> tuple[Path, Path]:
    """Write report.html and report.md, each atomically. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page_path, summary_path = folder / HTML_NAME, folder / MARKDOWN_NAME
    parts = sections(report)
    top = [Paragraph(sentence, "verdict") for sentence in report.verdicts]
    top.append(Paragraph(facts_line(report), "facts"))
    write_atomic(summary_path, markdown_report(report.title, top, parts))
    write_page(page_path, title=report.title, summary=top, sections=parts)
    return page_path, summary_path


def facts_line(report: StudyReport) -> str:
    """Return the line below the verdict: how much was run, and when."""
    parts = []
    if report.analysis:
        own = [cell for cell in report.analysis.cells if not cell.cell.same_as]
        parts.append(f"{num_of(len(own), 'cell')} × {num_of(len(report.analysis.seeds), 'seed')}")
    found = [trial.status for trial in report.trials]
    states = ", ".join(
        f"{found.count(status)} {status}"
        for status in ("finished", "stopped", "failed", "running", "waiting")
        if status in found
    )
    parts.append(f"{num_of(len(found), 'trial')}: {states}")
    for unit, values in (
        ("GPU-hours", [t.cost.gpu_hours for t in report.trials]),
        ("CPU-hours", [t.cost.cpu_hours for t in report.trials]),
    ):
        if total := sum(value or 0.0 for value in values):
            parts.append(f"{amount(total)} {unit} in total")
    how = report.provenance
    if how.began and how.ended:
        took_s = (how.ended - how.began).total_seconds()
        parts.append(f"{duration(took_s)}, ended {how.ended:%Y-%m-%d %H:%M %Z}".strip())
    return " · ".join(parts)


def sections(report: StudyReport) -> list[Section]:
    """Return the sections of the page in their order, without those that would be empty."""
    analysis = report.analysis
    found = [_design(report)]
    if analysis:
        found += [_cells(analysis), _differences(analysis), _effects(analysis)]
    table = trials_table(report)
    found += [
        _curves(report),
        _cost(report),
        Section("parameters", "Trials and their parameters", [table] if table.rows else []),
        _power(report),
        _failures(report),
        _published(report),
        _how(report),
    ]
    return [section for section in found if section.parts]


def _design(report: StudyReport) -> Section:
    method = [Paragraph(report.method)] if report.method else []
    return Section("design", "What was compared", [*method, *_filled(design_table(report))])


def _cells(analysis: Analysis) -> Section:
    note = (
        "Small marks are seeds, the large one their mean, the line its "
        f"{100 * analysis.confidence:g} % interval. Intervals of two cells may overlap although "
        "the cells differ, because seeds move all cells together."
    )
    unit = f"{analysis.metric} (0 to 100)"
    title = f"{analysis.metric} of each cell"
    parts: list[Part] = [cells_table(analysis)]
    parts += _forest(title, cell_rows(analysis), unit, note, zero=False)
    if analysis.notes:
        parts.append(BulletList("Limits of these results", analysis.notes))
    return Section("cells", "Results of the cells", parts)


def _differences(analysis: Analysis) -> Section:
    parts: list[Part] = []
    unit = f"difference in {analysis.metric}, points"
    drawn = "A filled mark differs from zero after Holm's correction, a hollow one does not."
    if analysis.answers:
        caption = (
            "The questions of this study, answered with the noise of all its cells; "
            f"{100 * analysis.confidence:g} % intervals, one at a time."
        )
        parts.append(differences_table(analysis, analysis.answers, caption))
        rows = difference_rows(analysis, analysis.answers)
        note = f"Small marks are the differences of single seeds. {drawn}"
        parts += _forest("The questions", rows, unit, note)
    if analysis.differences:
        table = differences_table(
            analysis,
            analysis.differences,
            "All pairs of cells, each from the differences of its own seeds alone (paired t).",
        )
        twins = {cell.cell.key for cell in analysis.cells if cell.cell.same_as}
        shown = [d for d in analysis.differences if not twins & {d.first, d.second}]
        which = "All pairs, seed by seed"
        if len(shown) > MANY_PAIRS:
            shown = [d for d in shown if d in neighbours(analysis)]
            which = "Pairs that differ in one factor, and those with a named cell, seed by seed"
        note = f"Each from its own seeds alone, so with wider intervals. {drawn}"
        rows = difference_rows(analysis, shown)
        parts += _forest(which, rows, unit, note, numbers=table) or [table]
    return Section("differences", "Differences, seed by seed", parts)


def _effects(analysis: Analysis) -> Section:
    parts: list[Part] = []
    if plots := interactions(analysis):
        note = (
            "Parallel lines mean that the factors add. Lines that diverge or cross mean that the "
            "effect of one depends on the other. Small marks are seeds."
        )
        parts.append(Figure("Means at each level", plots, note))
    note = (
        "A filled mark differs from zero after Holm's correction, a hollow one does not. An "
        "interaction is the difference of two differences."
    )
    unit = f"effect on {analysis.metric}, points"
    parts += _forest("Effects", effect_rows(analysis), unit, note)
    parts += [*_filled(effects_table(analysis)), *_filled(terms_table(analysis))]
    return Section("effects", "Effects and interactions", parts if analysis.effects else [])


def _curves(report: StudyReport) -> Section:
    plots = learning_curves(report.trials, report.cell_names, report.metric)
    unfinished = any(trial.status != "finished" and trial.curve for trial in report.trials)
    note = "Lines are means over seeds; bands reach from the lowest seed to the highest."
    note += " Dotted lines are trials that did not finish; no mean includes them." * unfinished
    numbers = curve_table(mean_learning_curves(report.trials), report.metric)
    figure = Figure(f"{report.metric} over training samples seen", plots, note, numbers)
    return Section("curves", "Learning curves", [figure] if plots else [])


def _cost(report: StudyReport) -> Section:
    parts: list[Part] = [*_filled(cost_table(report))]
    kind = cost_kind(report.trials)
    marks: list[CostMark] = []
    for name in report.cell_names if kind else []:
        trials = [t for t in report.trials if t.cell == name and t.status == "finished"]
        points = [(t.name, kind.of(t) or 0.0, t.ap or 0.0) for t in trials if kind]
        if points:
            cost = sum(cost for _, cost, _ in points) / len(points)
            ap = sum(ap for *_, ap in points) / len(points)
            marks.append(CostMark(name, cost, ap, points if len(points) > 1 else ()))
    if kind and marks:
        front = [p.label for p in pareto(CostPoint(m.name, m.ap, m.cost) for m in marks)]
        note = (
            "Filled marks are on the Pareto front: nothing is both cheaper and better. These are "
            f"{'; '.join(front)}."
        )
        if any(mark.trials for mark in marks):
            note += (
                " Large marks are means, small ones seeds; the front is that of the means, because "
                "a front of single trials would favour lucky ones."
            )
        plot = cost_against_ap(marks, front, f"{kind.title} ({kind.unit})", report.metric)
        parts.append(Figure(f"{report.metric} over cost", [plot], note))
    return Section("cost", "Cost", parts)


def _power(report: StudyReport) -> Section:
    if report.analysis is None:
        return Section("power", "", [])
    noise, metric, title = report.analysis.noise, report.metric, "What more seeds would show"
    pilot = report.pilot
    if pilot is None:
        why = noise.note or "it needs at least two seeds"
        text = f"The noise of this study could not be estimated: {why}."
        return Section("power", title, [Paragraph(text)])
    worst = noise.interval.high if noise.interval else pilot.cautious.sd
    text = (
        f"The standard deviation of one training within a seed is {pilot.estimate.sd:.2f} {metric} "
        f"(at most {worst:.2f} with {100 * report.analysis.confidence:g} % confidence)."
    )
    note = (
        "Detected means: significant four times in five (80 % power). This is for one comparison; "
        "several at once, with Holm's correction, need more."
    )
    plot = power_curve(pilot, len(report.analysis.seeds), report.relevant, metric)
    figure = Figure("The smallest difference that is detected, by seeds", [plot], note)
    return Section("power", title, [Paragraph(text), required_seeds_table(report, pilot), figure])


def _failures(report: StudyReport) -> Section:
    parts = _filled(failures_table(report)) or [Paragraph("Every trial finished.")]
    return Section("failures", "Failures and early stops", parts)


def _published(report: StudyReport) -> Section:
    parts: list[Part] = []
    if report.decomposition:
        parts += [Paragraph(text) for text in report.decomposition.text.split("\n\n")]
        parts.append(steps_table(report.decomposition, report.metric))
    return Section("published", "Published numbers", parts + _filled(anchors_table(report.anchors)))


def _how(report: StudyReport) -> Section:
    how = report.provenance
    parts = _filled(how_table(how)) + _filled(changed_table(how))
    if how.run_url:
        parts.append(Paragraph(Link("The run of this sweep in MLflow", how.run_url)))
    text = (
        "This page contains all of its data and its drawing code (plotly.js, MIT license); it "
        "fetches nothing."
    )
    return Section("how", "How it was run", [*parts, Paragraph(text, style="aside")])


def _filled(table: Table) -> list[Part]:
    return [table] if table.rows else []


def _forest(
    title: str, rows: Sequence[ForestRow], unit: str, note: str, *,
    numbers: Table | None = None, zero: bool = True,
) -> list[Part]:  # fmt: skip
    """Return the figure of estimates, if there are any."""
    return [Figure(title, [forest(rows, unit, zero=zero)], note, numbers)] if rows else []
