"""Plot an evaluation: error costs, precision-recall curves, confusion matrix, calibration."""

# K categories   R recall thresholds

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deta.platform.analysis.analysis import Calibration, ClassMetrics, Explanation
from deta.platform.analysis.tide_errors import KINDS
from deta.platform.pages.plotly_parts import (
    Plot,
    axis,
    color_of,
    label,
    label_px,
    line,
    points,
    shortened,
    step_color,
)
from deta.platform.pages.theme import NUM_STEPS

MAX_LINES = 6  # classes drawn as lines; more become rows of a heat map
MAX_CONFUSED = 40  # classes in the confusion matrix; of more, those that are confused most
LETTERS = 22
RECALLS = [step / 100 for step in range(101)]
SCALE = [[step / (NUM_STEPS - 1), step_color(step / (NUM_STEPS - 1))] for step in range(NUM_STEPS)]


def error_costs(explanation: Explanation) -> Plot:
    """Plot how much AP50 each error type costs, as bars."""
    cost = explanation.errors.cost
    names = [*KINDS, "missed"]
    values = [100 * cost[name] for name in names]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": names,
        "marker": {"color": "@c0"},
        "text": [f"{value:.1f}" for value in values],
        "textposition": "outside",
        "cliponaxis": False,
        "hoverinfo": "skip",
    }
    return {
        "data": [bars],
        "layout": {
            "height": 300,
            "margin": {"l": 100, "r": 48},
            "xaxis": axis("rise of AP50 if repaired", range=[0, 1.08 * max([*values, 1.0])]),
            "yaxis": {"autorange": "reversed", "showgrid": False, "showline": False, "ticks": ""},
        },
    }


def mean_precision_recall(explanation: Explanation, *, narrow: bool) -> Plot:
    """Plot precision over recall, the mean over classes, at several IoU thresholds."""
    data, notes = [], []
    for place, (iou, curve) in enumerate(explanation.curves.items()):
        texts = [
            f"IoU {iou:g}: precision {100 * p:.0f}% at recall {100 * r:.0f}%"
            for r, p in zip(RECALLS, curve, strict=True)
        ]
        data.append(line(RECALLS, curve, color=color_of(place), texts=texts))
        notes.append((f"IoU {iou:g}", curve, color_of(place)))
    return _curves(data, notes, narrow)


def class_precision_recall(classes: Sequence[ClassMetrics], *, narrow: bool) -> Plot:
    """Plot precision over recall of each class at an IoU of 0.5: lines, or rows of a heat map."""
    shown = sorted((one for one in classes if one.precision_at_recall), key=lambda one: -one.AP50)
    if len(shown) <= MAX_LINES:
        data, notes = [], []
        for place, one in enumerate(shown):
            texts = [
                f"{shortened(one.name)}: precision {100 * p:.0f}% at recall {100 * r:.0f}%"
                for r, p in zip(RECALLS, one.precision_at_recall, strict=True)
            ]
            data.append(line(RECALLS, one.precision_at_recall, color=color_of(place), texts=texts))
            notes.append((one.name, one.precision_at_recall, color_of(place)))
        return _curves(data, notes, narrow)
    letters = 12 if narrow else LETTERS
    step = 5 if narrow else 2
    heat = _heat_map(
        [one.precision_at_recall[::step] for one in shown],
        RECALLS[::step],
        [shortened(one.name, letters) for one in shown],
        "%{y}: precision %{z:.0%} at recall %{x:.0%}<extra></extra>",
    )
    return {
        "data": [heat],
        "layout": {
            "height": 80 + 17 * len(shown),
            "margin": {"l": label_px([one.name for one in shown], letters), "r": 8},
            "xaxis": axis("recall", tickformat=".0%"),
            "yaxis": _rows(shown_names=[shortened(one.name, letters) for one in shown]),
        },
    }


def confusion_matrix(explanation: Explanation, *, narrow: bool) -> Plot:
    """Plot the confusion matrix; colours are shares of a row."""
    chosen = confused_most(explanation.confusion)
    letters = 10 if narrow else LETTERS
    names = [shortened(explanation.classes[k].name, letters) for k in chosen]
    table = explanation.confusion[np.ix_([*chosen, -1], [*chosen, -1])]
    totals = explanation.confusion.sum(1)[[*chosen, -1]]
    shares = table / np.maximum(1, totals)[:, None]
    shares[-1] = np.nan  # the row of background has no total
    rows, columns = [*names, "(nothing)"], [*names, "(not found)"]
    is_small = len(chosen) <= 12 and not narrow
    texts = [
        [f"{n}" if n and (i < len(names) or j < len(names)) else "" for j, n in enumerate(row)]
        for i, row in enumerate(table.tolist())
    ]
    heat = _heat_map(shares.tolist(), columns, rows, "%{customdata}<extra></extra>")
    heat["customdata"] = [
        [f"{n} of {rows[i]}: {columns[j]}" for j, n in enumerate(row)]
        for i, row in enumerate(table.tolist())
    ]
    notes = []
    if is_small:
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                share = shares[i, j]
                color = "@paper" if np.isfinite(share) and share > 0.45 else "@ink"
                if text:
                    notes.append(label(text, j, i, color=color, anchor="center"))
    side = 15 if len(chosen) > 12 else 30
    room = label_px(columns, letters)
    return {
        "data": [heat],
        "layout": {
            "height": 70 + room + side * len(rows),
            "margin": {"l": room + 10, "r": 8, "b": room + 10},
            "xaxis": axis("found as", tickangle=-90, tickvals=list(range(len(columns))),
                          ticktext=columns, constrain="domain"),
            "yaxis": {**_rows(rows), "title": {"text": "annotated as"}},
            "annotations": notes,
        },
    }  # fmt: skip


def confused_most(confusion: np.ndarray) -> list[int]:
    """Return the classes that a matrix shows: all, or the most confused ones, in their order."""
    num_classes = len(confusion) - 1
    if num_classes <= MAX_CONFUSED:
        return list(range(num_classes))
    mixed = confusion[:-1, :-1].copy()
    np.fill_diagonal(mixed, 0)
    order = np.argsort(-(mixed.sum(0) + mixed.sum(1)), kind="stable")
    return sorted(order[:MAX_CONFUSED].tolist())


def reliability(calibration: Calibration) -> Plot:
    """Plot the share of correct detections over their score; calibrated scores are on the line."""
    bins = [one for one in calibration.bins if one[2] > 0]
    texts = [
        f"{number} detections of score {score:.2f}: {share:.0%} correct"
        for score, share, number in bins
    ]
    most = max((number for *_, number in bins), default=1)
    marks = points([b[0] for b in bins], [b[1] for b in bins], color="@c0", texts=texts)
    marks["marker"]["size"] = [8 + 14 * (number / most) ** 0.5 for *_, number in bins]
    return {
        "data": [line([0, 1], [0, 1], color="@muted", width=1, dash="dash"), marks],
        "layout": {
            "height": 380,
            "xaxis": axis("score", range=[-0.03, 1.05]),
            "yaxis": axis("share of correct detections", range=[-0.03, 1.05], tickformat=".0%"),
        },
    }


def _curves(
    data: list[dict[str, object]],
    notes: Sequence[tuple[str, Sequence[float], str]],
    narrow: bool,
) -> Plot:
    """Return a plot of precision over recall with the names in a legend."""
    for trace, (name, _, _) in zip(data, notes, strict=True):
        trace["name"], trace["showlegend"] = shortened(name), True
    return {
        "data": data,
        "layout": {
            "height": 380 if not narrow else 400,
            "showlegend": True,
            "legend": {"orientation": "h", "y": -0.25, "x": 0},
            "xaxis": axis("recall", range=[0, 1.01], tickformat=".0%"),
            "yaxis": axis("precision", range=[0, 1.03], tickformat=".0%"),
        },
    }


def _heat_map(
    values: Sequence[Sequence[float]],
    x: Sequence[object],
    names: Sequence[str],
    hover: str,
) -> dict[str, object]:
    """Return a heat map with numbered rows: two classes may share a shortened name."""
    is_text = bool(x) and isinstance(x[0], str)
    return {
        "type": "heatmap",
        "z": [list(row) for row in values],
        "x": list(range(len(x))) if is_text else list(x),
        "y": list(range(len(names))),
        "zmin": 0,
        "zmax": 1,
        "colorscale": SCALE,
        "showscale": False,
        "xgap": 1 if is_text else 0,
        "ygap": 1,
        "hovertemplate": hover,
    }


def _rows(shown_names: Sequence[str]) -> dict[str, object]:
    return {
        "autorange": "reversed",
        "tickvals": list(range(len(shown_names))),
        "ticktext": list(shown_names),
        "showgrid": False,
        "showline": False,
        "ticks": "",
        "automargin": False,
        "tickfont": {"size": 12},
    }
