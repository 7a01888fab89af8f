"""Tables of a study's analysis: cells, differences, effects, published numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deta.platform.pages.content import Column, Table
from deta.platform.pages.number_format import percent, signed
from deta.platform.study.study_types import Analysis, Anchor, CellDifference, Decomposition
from deta.platform.study_report.content import StudyReport
from deta.platform.study_report.table_cells import (
    NOTHING,
    common_digits,
    estimate_cells,
    estimate_columns,
    p_text,
    value_text,
    without_empty_columns,
)


def design_table(report: StudyReport) -> Table | None:
    """Return the cells of a study with their changes; None for a sweep."""
    if report.analysis is None:
        return None
    cells = [summary.cell for summary in report.analysis.cells]
    factors = list(dict.fromkeys(name for cell in cells for name in cell.labels))
    rows = []
    for cell in cells:
        changes = ", ".join(f"{key} = {value_text(value)}" for key, value in cell.changes.items())
        text = f"trains exactly as {cell.same_as}" if cell.same_as else changes or "the base"
        rows.append([cell.key, *(cell.labels.get(name, NOTHING) for name in factors), text])
    seeds = ", ".join(map(str, report.analysis.seeds))
    return Table(
        caption=f"The cells. Each is trained with the seeds {seeds}, on equally many samples.",
        columns=[Column(title="cell"), *(Column(title=name) for name in factors),
                 Column(title="changes to the base configuration")],
        rows=rows,
    )  # fmt: skip


def cells_table(analysis: Analysis) -> Table:
    """Return the mean of each cell with its interval and seeds."""
    rows = []
    digits = common_digits([cell.interval for cell in analysis.cells])
    for cell in analysis.cells:
        half = cell.interval.half_width if cell.interval else None
        by_seed = ", ".join(
            f"{signed(cell.values[seed], 2)}" if seed in cell.values else "failed"
            for seed in analysis.seeds
            if seed in cell.values or seed in cell.failures
        )
        rows.append(
            [
                cell.cell.key,
                NOTHING if cell.mean is None else signed(cell.mean, digits),
                NOTHING if half is None else f"± {half:.{digits}f}",
                NOTHING if cell.sd is None else f"{cell.sd:.2f}",
                str(len(cell.values)),
                by_seed or NOTHING,
                cell.note,
            ]
        )
    seeds = ", ".join(map(str, analysis.seeds))
    percent = f"{100 * analysis.confidence:g} %"
    return without_empty_columns(
        Table(
            caption=f"{analysis.metric} of each cell: mean over seeds with its {percent} "
            "interval. It is the interval of a single cell. To compare two cells, read the "
            "differences, which are taken within seeds.",
            columns=[
                Column(title="cell"),
                Column(title="mean", unit=analysis.metric, is_number=True),
                Column(title="interval", unit=percent, is_number=True),
                Column(title="sd over seeds", unit=analysis.metric, is_number=True),
                Column(title="n", unit="seeds", is_number=True),
                Column(title="each seed", unit=f"seeds {seeds}", is_number=True),
                Column(title="note"),
            ],
            rows=rows,
        )
    )


def differences_table(
    analysis: Analysis, differences: Sequence[CellDifference], caption: str
) -> Table:
    rows = []
    digits = common_digits([item.interval for item in differences])
    for item in differences:
        distinct = item.is_distinguishable(1 - analysis.confidence)
        rows.append(
            [
                item.title,
                *estimate_cells(item.estimate, item.interval, digits),
                p_text(item.p),
                p_text(item.p_holm),
                NOTHING if item.estimate is None or item.p is None
                else "significant" if distinct else "not significant",
                str(len(item.seeds)),
                item.note,
            ]
        )  # fmt: skip
    return without_empty_columns(
        Table(
            caption=caption,
            columns=[Column(title="difference"), *estimate_columns(analysis),
                     Column(title="p", is_number=True),
                     Column(title="p", unit="after Holm", is_number=True),
                     Column(title="verdict", unit="after Holm"),
                     Column(title="seeds", is_number=True), Column(title="note")],
            rows=rows,
        )
    )  # fmt: skip


def effects_table(analysis: Analysis) -> Table:
    """Return the main effects and interactions with their tests."""
    digits = common_digits([effect.interval for effect in analysis.effects])
    rows = [
        [effect.name, *estimate_cells(effect.estimate, effect.interval, digits), p_text(effect.p),
         p_text(effect.p_holm), effect.note]
        for effect in analysis.effects
    ]  # fmt: skip
    return without_empty_columns(
        Table(
            caption="Effect of each factor, averaged over the others; of two factors, how much "
            "the effect of one changes with the other.",
            columns=[Column(title="effect"), *estimate_columns(analysis),
                     Column(title="p", is_number=True),
                     Column(title="p", unit="after Holm", is_number=True), Column(title="note")],
            rows=rows,
        )
    )  # fmt: skip


def terms_table(analysis: Analysis) -> Table:
    """Return the F test of each factor."""
    rows = [
        [term.name, NOTHING if term.f is None else f"{term.f:.2f}",
         f"{term.df}, {term.residual_df}", p_text(term.p), term.note]
        for term in analysis.terms
    ]  # fmt: skip
    return without_empty_columns(
        Table(
            caption="Whether a factor has any effect: F test of all its effects.",
            columns=[Column(title="factor"), Column(title="F", is_number=True),
                     Column(title="degrees of freedom", is_number=True),
                     Column(title="p", is_number=True), Column(title="note")],
            rows=rows,
        )
    )  # fmt: skip


def curve_table(curves: Mapping[str, Any], metric: str) -> Table:
    """Return the points of `curve_figures.mean_learning_curves`."""
    rows = [
        [key, f"{x:,}", signed(curve.mean[i], 2),
         f"{signed(curve.low[i], 2)} to {signed(curve.high[i], 2)}", str(curve.num_seeds)]
        for key, curve in curves.items()
        for i, x in enumerate(curve.samples)
    ]  # fmt: skip
    return Table(
        caption=f"{metric} at each evaluation, of trials that finished.",
        columns=[Column(title="cell"), Column(title="samples seen", is_number=True),
                 Column(title="mean", unit=metric, is_number=True),
                 Column(title="lowest to highest seed", unit=metric, is_number=True),
                 Column(title="n", unit="seeds", is_number=True)],
        rows=rows,
    )  # fmt: skip


def steps_table(decomposition: Decomposition, metric: str) -> Table:
    """Return the effect of each change between two published systems."""
    rows = []
    digits = common_digits([step.difference.interval for step in decomposition.steps])
    for title, item, share in [
        *((step.title, step.difference, step.share) for step in decomposition.steps),
        ("together", decomposition.whole, None),
    ]:
        text = NOTHING if share is None else percent(share)
        rows.append([title, *estimate_cells(item.estimate, item.interval, digits), text, item.note])
    return without_empty_columns(
        Table(
            caption="The published pair, one change at a time, as measured here.",
            columns=[Column(title="what changes"), Column(title="effect", unit=metric,
                     is_number=True), Column(title="interval", is_number=True),
                     Column(title="share", is_number=True), Column(title="note")],
            rows=rows,
        ),
        also=NOTHING,
    )  # fmt: skip


def anchors_table(anchors: Sequence[Anchor]) -> Table:
    """Return the published results that a study is compared with."""
    rows = [
        [anchor.label, f"{anchor.ap:.1f}", str(anchor.total_batch_size), anchor.note, anchor.source]
        for anchor in anchors
    ]
    return without_empty_columns(
        Table(
            caption="Published numbers: box AP on COCO val2017.",
            columns=[Column(title="system"), Column(title="AP", is_number=True),
                     Column(title="total batch", is_number=True), Column(title="setting"),
                     Column(title="source")],
            rows=rows,
        )
    )  # fmt: skip
