"""Plot a comparison: differences with intervals, and AP over the training."""

from __future__ import annotations

import math

import plotly.graph_objects as go

from deta.platform.comparison.compare import Comparison
from deta.platform.pages.figures import ForestRow, figure, shortened, style
from deta.platform.pages.number_format import Interval

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
    shown = [
        (key, one) for key, one in found.per_category.items() if not math.isnan(one.difference)
    ]
    shown = sorted(shown, key=lambda item: -abs(item[1].difference))[:MAX_CLASSES]
    return [
        _row(
            comparison.class_names[key], one.difference, one.low, one.high,
            is_distinct=one.p_adjusted < 1 - found.confidence,
        )
        for key, one in sorted(shown, key=lambda item: -item[1].difference)
    ]  # fmt: skip


def training_curves(comparison: Comparison) -> go.Figure | None:
    """Plot AP over epochs of the sides whose run is known."""
    traces = [
        go.Scatter(
            x=[epoch for epoch, _ in side.curve], y=[ap for _, ap in side.curve],
            mode="lines+markers", **style(place), name=shortened(name),
            hovertemplate="AP %{y:.1f} at epoch %{x}",
        )
        for place, (name, side) in enumerate(zip(comparison.names, comparison.sides, strict=True))
        if side.curve
    ]  # fmt: skip
    return figure(
        traces, height=380, showlegend=True, xaxis_title_text="epochs",
        yaxis={"title": {"text": "AP (0 to 100)"}, "rangemode": "tozero"},
    ) if traces else None  # fmt: skip


def _row(
    name: str, difference: float, low: float, high: float, *, is_distinct: bool | None = None
) -> ForestRow:
    interval = None if math.isnan(low) else Interval(100 * low, 100 * high)
    if is_distinct is None:
        is_distinct = interval is not None and 0 not in interval
    return ForestRow(name, 100 * difference, interval, is_distinct=is_distinct)
