"""Plot a comparison: differences with intervals, error costs, curves of both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deta.platform.analysis.figures import RECALLS
from deta.platform.comparison.compare import Comparison
from deta.platform.pages.number_format import Interval
from deta.platform.pages.plotly_parts import (
    ForestRow,
    Plot,
    Trace,
    axis,
    color_of,
    dash_of,
    line,
    shortened,
)
from deta.platform.pages.safe_text import figure_text

DRAWN_IOUS = (0.5, 0.7, 0.9)
MAX_CLASSES = 30  # in the figure; the table has all


def metric_rows(comparison: Comparison) -> list[ForestRow]:
    """Return AP, AP50 and AP75 of the whole evaluation, in points."""
    found = comparison.difference
    values = [("AP", found.difference, found.low, found.high)]
    values += [(name, one.difference, one.low, one.high) for name, one in found.others]
    return [_row(name, *numbers) for name, *numbers in values if not math.isnan(numbers[0])]


def class_rows(comparison: Comparison) -> list[ForestRow]:
    """Return the classes that differ most, in points; filled if significant after correction."""
    found = comparison.difference
    names = {c["id"]: str(c["name"]) for c in comparison.a.ground_truth["categories"]}
    shown = [
        (key, one) for key, one in found.per_category.items() if not math.isnan(one.difference)
    ]
    shown = sorted(shown, key=lambda item: -abs(item[1].difference))[:MAX_CLASSES]
    shown.sort(key=lambda item: -item[1].difference)
    return [
        _row(
            names[key], one.difference, one.low, one.high,
            is_distinct=one.p_adjusted < 1 - found.confidence,
        )
        for key, one in shown
    ]  # fmt: skip


def error_bars(comparison: Comparison, *, narrow: bool) -> Plot:
    """Plot what each error type costs either side."""
    data: list[Trace] = []
    kinds: list[str] = []
    largest = 1.0
    for place, (name, explanation) in enumerate(
        zip(comparison.names, comparison.explanations, strict=True)
    ):
        kinds = list(explanation.errors.cost)
        values = [100 * explanation.errors.cost[kind] for kind in kinds]
        largest = max([largest, *values])
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": shortened(name),
                "x": values,
                "y": kinds,
                "marker": {"color": color_of(place)},
                "text": [f"{value:.1f}" for value in values],
                "textposition": "outside",
                "cliponaxis": False,
                "hoverinfo": "skip",
            }
        )
    layout = {
        "height": 420,
        "margin": {"l": 96, "r": 40},
        "barmode": "group",
        "bargap": 0.35,
        "xaxis": axis("rise of AP50 if repaired, points", range=[0, 1.08 * largest]),
        "yaxis": {"autorange": "reversed", "showgrid": False, "showline": False, "ticks": ""},
        **_legend(narrow),
    }
    return {"data": data, "layout": layout}


def precision_recall(comparison: Comparison, *, narrow: bool) -> Plot:
    """Plot precision over recall of both sides, the mean over classes, at three IoU thresholds."""
    data: list[Trace] = []
    for side, (name, explanation) in enumerate(
        zip(comparison.names, comparison.explanations, strict=True)
    ):
        for place, iou in enumerate(DRAWN_IOUS):
            curve = explanation.curves.get(iou, ())
            if not len(curve):
                continue
            texts = [
                f"{figure_text(name)}, IoU {iou:g}: {100 * p:.0f}% precise at recall {100 * r:.0f}%"
                for r, p in zip(RECALLS, curve, strict=True)
            ]
            trace = line(
                RECALLS, curve, color=color_of(side), dash=("solid", "dash", "dot")[place],
                texts=texts,
            )  # fmt: skip
            data.append(trace | {"name": f"{shortened(name, 24)}, IoU {iou:g}", "showlegend": True})
    layout = {
        "height": 440 if not narrow else 470,
        "xaxis": axis("recall", range=[0, 1.01], tickformat=".0%"),
        "yaxis": axis("precision", range=[0, 1.03], tickformat=".0%"),
        **_legend(narrow),
    }
    return {"data": data, "layout": layout}


def training_curves(comparison: Comparison, *, narrow: bool) -> Plot | None:
    """Plot AP over epochs of the sides whose run is known."""
    data: list[Trace] = []
    for place, (name, side) in enumerate(
        zip(comparison.names, (comparison.a, comparison.b), strict=True)
    ):
        if not side.curve:
            continue
        texts = [f"{figure_text(name)}: AP {ap:.1f} at epoch {epoch:g}" for epoch, ap in side.curve]
        trace = line(
            [epoch for epoch, _ in side.curve], [ap for _, ap in side.curve],
            color=color_of(place), dash=dash_of(0), texts=texts,
        )  # fmt: skip
        trace |= {"mode": "lines+markers", "name": shortened(name), "showlegend": True}
        data.append(trace)
    if not data:
        return None
    layout = {
        "height": 360,
        "xaxis": axis("epochs"),
        "yaxis": axis("AP (0 to 100)", rangemode="tozero"),
        **_legend(narrow),
    }
    return {"data": data, "layout": layout}


def _row(
    name: str, difference: float, low: float, high: float, *, is_distinct: bool | None = None
) -> ForestRow:
    interval = None if math.isnan(low) else Interval(100 * low, 100 * high)
    if is_distinct is None:
        is_distinct = interval is not None and 0 not in interval
    return ForestRow(name, 100 * difference, interval, is_distinct=is_distinct)


def _legend(narrow: bool) -> dict[str, object]:
    place: Sequence[float] = (-0.3, 0) if narrow else (-0.22, 0)
    return {"showlegend": True, "legend": {"orientation": "h", "y": place[0], "x": place[1]}}
