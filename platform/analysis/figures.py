"""Plot an evaluation: error costs, precision-recall curves, confusion matrix, calibration."""

# K categories   R recall thresholds

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from deta.platform.analysis.analysis import Calibration, ClassMetrics, Explanation
from deta.platform.pages.figures import (
    COLORS,
    DASHES,
    MUTED,
    bars,
    figure,
    heat_map,
    marks,
    rows_axis,
    shortened,
)

MAX_LINES = 6  # classes drawn as lines; more become rows of a heat map
MAX_CONFUSED = 20  # classes in the confusion matrix; of more, those that are confused most
MAX_WITH_NUMBERS = 12  # classes in a matrix whose cells have room for a number
LETTERS = 16
RECALLS = [step / 100 for step in range(101)]


def error_costs(sides: Mapping[str, Explanation]) -> go.Figure:
    """Plot how much AP50 each error type costs each side, as bars."""
    costs = {
        name: {kind: 100 * cost for kind, cost in side.errors.cost.items()}
        for name, side in sides.items()
    }
    return bars(costs, "rise of AP50 if repaired, points")


def precision_recall(sides: Mapping[str, Mapping[str, Sequence[float]]]) -> go.Figure:
    """Plot precision over recall.

    Args:
        sides: curves by name; with several sides, each has a colour, and its curves have dashes.
    """
    traces = []
    for i, (side, curves) in enumerate(sides.items()):
        for k, (name, curve) in enumerate(curves.items()):
            color, dash = (i, k) if len(sides) > 1 else (k, 0)
            title = shortened(f"{side}, {name}" if side else name)
            line = {"color": COLORS[color % len(COLORS)], "dash": DASHES[dash % len(DASHES)]}
            hover = f"{title}: precision %{{y:.0%}} at recall %{{x:.0%}}<extra></extra>"
            traces.append(
                go.Scatter(x=RECALLS, y=curve, mode="lines", line=line, name=title,
                           hovertemplate=hover)
            )  # fmt: skip
    return figure(
        traces, height=440, showlegend=True,
        xaxis={"title": {"text": "recall"}, "range": [0, 1.01], "tickformat": ".0%"},
        yaxis={"title": {"text": "precision"}, "range": [0, 1.03], "tickformat": ".0%"},
    )  # fmt: skip


def class_precision_recall(classes: Sequence[ClassMetrics]) -> go.Figure:
    """Plot precision over recall of each class at an IoU of 0.5: lines, or rows of a heat map."""
    shown = sorted((one for one in classes if one.precision_at_recall), key=lambda one: -one.AP50)
    if len(shown) <= MAX_LINES:
        return precision_recall({"": {one.name: one.precision_at_recall for one in shown}})
    names = [shortened(one.name, LETTERS) for one in shown]
    hover = "precision %{z:.0%} at recall %{x:.0%}<extra></extra>"
    curves = [one.precision_at_recall[::5] for one in shown]
    return figure(
        [heat_map(curves, RECALLS[::5], names, hovertemplate=hover)],
        height=80 + 17 * len(shown), yaxis=rows_axis(names),
        xaxis={"title": {"text": "recall"}, "tickformat": ".0%"},
    )  # fmt: skip


def confusion_matrix(explanation: Explanation) -> go.Figure:
    """Plot the confusion matrix; colours are shares of a row."""
    chosen = [*confused_most(explanation.confusion), -1]
    names = [shortened(explanation.classes[k].name, LETTERS) for k in chosen[:-1]]
    table = explanation.confusion[np.ix_(chosen, chosen)]
    shares = table / np.maximum(1, explanation.confusion.sum(1)[chosen])[:, None]
    shares[-1] = np.nan  # the row of background has no total
    rows, columns = [*names, "(nothing)"], [*names, "(not found)"]
    texts: dict[str, Any] = {}
    if len(names) <= MAX_WITH_NUMBERS:
        numbers = [[str(n or "") for n in row] for row in table.tolist()]
        numbers[-1][-1] = ""  # nothing that is not found: undefined
        texts = {"text": numbers, "texttemplate": "%{text}"}
    hover = [
        [f"{n} of {rows[i]}: {columns[j]}" for j, n in enumerate(row)]
        for i, row in enumerate(table.tolist())
    ]
    heat = heat_map(
        shares.tolist(), range(len(columns)), rows, xgap=1, hovertext=hover, hoverinfo="text",
        **texts,
    )  # fmt: skip
    return figure(
        [heat], height=220 + (30 if texts else 18) * len(rows),
        xaxis={"title": {"text": "found as"}, "tickangle": -90, "ticktext": columns,
               "tickvals": list(range(len(columns)))},
        yaxis={**rows_axis(rows), "title": {"text": "annotated as"}},
    )  # fmt: skip


def confused_most(confusion: np.ndarray) -> list[int]:
    """Return the classes that a matrix shows: all, or the most confused ones, in their order."""
    mixed = confusion[:-1, :-1].copy()
    np.fill_diagonal(mixed, 0)
    order = np.argsort(-(mixed.sum(0) + mixed.sum(1)), kind="stable")
    return sorted(order[:MAX_CONFUSED].tolist())


def reliability(calibration: Calibration) -> go.Figure:
    """Plot the share of correct detections over their score; calibrated scores are on the line."""
    bins = [one for one in calibration.bins if one[2] > 0]
    most = max((number for *_, number in bins), default=1)
    texts = [f"{n} detections of score {x:.2f}: {y:.0%} correct" for x, y, n in bins]
    sizes = [8 + 14 * (number / most) ** 0.5 for *_, number in bins]
    points = marks([b[0] for b in bins], [b[1] for b in bins], texts, COLORS[0],
                   marker={"size": sizes})  # fmt: skip
    diagonal = go.Scatter(
        x=[0, 1], y=[0, 1], mode="lines", hoverinfo="skip",
        line={"color": MUTED, "width": 1, "dash": "dash"},
    )  # fmt: skip
    return figure(
        [diagonal, points], height=380,
        xaxis={"title": {"text": "score"}, "range": [-0.03, 1.05]},
        yaxis={"title": {"text": "share of correct detections"}, "range": [-0.03, 1.05],
               "tickformat": ".0%"},
    )  # fmt: skip
