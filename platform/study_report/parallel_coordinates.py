"""Plot the parameters and results of a sweep: one line for each trial through all axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deta.platform.pages.number_format import short, signed
from deta.platform.pages.plotly_parts import (
    LOG_RATIO,
    Plot,
    Trace,
    label,
    label_px,
    line,
    padded,
    shortened,
    step_color,
)
from deta.platform.pages.safe_text import figure_text
from deta.platform.study.trial_record import TrialRecord

MAX_AXES = 9  # parameters that are plotted; the table has all of them


@dataclass(frozen=True)
class ParallelAxis:
    """One quantity of every trial: places from 0 to 1, and ticks at some of them."""

    name: str
    places: Mapping[str, float]  # by name of the trial; missing where it has no value
    ticks: Mapping[str, float]  # text to place


def parallel_axes(trials: Sequence[TrialRecord], metric: str) -> list[ParallelAxis]:
    """Return the parameters that differ between trials, and the AP of those that finished.

    The seed is left out: it was not searched, and the AP shows its influence.
    """
    keys = dict.fromkeys(key for t in trials for key in t.parameters if key != "seed")
    axes = []
    for key in keys:
        values = {t.name: t.parameters[key] for t in trials if key in t.parameters}
        if len({repr(value) for value in values.values()}) > 1:
            axes.append(_axis_of(key, values))
    results = {t.name: t.ap for t in trials if t.ap is not None and t.status == "finished"}
    kept = axes[: MAX_AXES - 1]
    return [*kept, _axis_of(metric, results)] if results else kept


def _axis_of(name: str, values: Mapping[str, Any]) -> ParallelAxis:
    numbers = {
        trial: float(value)
        for trial, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    distinct = sorted(set(numbers.values()))
    if len(numbers) == len(values) and all(map(math.isfinite, distinct)) and len(distinct) > 5:
        low, high = distinct[0], distinct[-1]
        is_log = low > 0 and high / low >= LOG_RATIO
        scale = math.log10 if is_log else float

        def place(value: float) -> float:
            return (scale(value) - scale(low)) / (scale(high) - scale(low))

        return ParallelAxis(
            name,
            {trial: place(value) for trial, value in numbers.items()},
            {short(float(f"{low:.3g}")): 0.0, short(float(f"{high:.3g}")): 1.0},
        )
    # Few values, or words: one place each, numbers in their order, then words.
    levels = sorted(
        {repr(value): value for value in values.values()}.values(),
        key=lambda v: (0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v)),
    )
    count = max(1, len(levels) - 1)
    texts = [short(v) if _is_number(v) else "none" if v is None else str(v) for v in levels]
    of_value = {repr(value): place / count for place, value in enumerate(levels)}
    return ParallelAxis(
        name,
        {trial: of_value[repr(value)] for trial, value in values.items()},
        {text: place / count for place, text in enumerate(texts)},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parallel_coordinates(
    trials: Sequence[TrialRecord], axes: Sequence[ParallelAxis], *, narrow: bool
) -> Plot:
    """Plot a line for each trial through its values on parallel axes; darker is a higher AP.

    The lines are plain: plotly's own parallel coordinates need WebGL and compile code, which the
    page forbids. In a narrow window the axes are horizontal, one below the other.
    """
    notes, shapes = [], []
    for i, item in enumerate(axes):
        ends = {"x0": 0, "x1": 1, "y0": i, "y1": i} if narrow else {
            "x0": i, "x1": i, "y0": 0, "y1": 1}  # fmt: skip
        shapes.append(
            {"type": "line", "layer": "below", "line": {"color": "@muted", "width": 1}, **ends}
        )
        notes += _axis_labels(i, item, narrow, alternates=len(axes) > 5)
    count = len(axes) - 1
    left_px = max(label_px(list(axes[0].ticks), 14), 8 + _half_px(axes[0].name))
    hidden = {"showticklabels": False, "ticks": "", "showline": False, "showgrid": False,
              "fixedrange": True}  # fmt: skip
    layout = {
        "height": 60 + 74 * len(axes) if narrow else 420,
        "margin": {"l": 8, "r": 8, "t": 24, "b": 24} if narrow
        else {"l": left_px, "r": 12 + _half_px(axes[-1].name), "t": 64, "b": 16},
        "xaxis": hidden | {"range": [-0.04, 1.04] if narrow else [-0.05, count + 0.05]},
        "yaxis": hidden | {"range": [count + 0.3, -0.4] if narrow else [-0.05, 1.05]},
        "shapes": shapes,
        "annotations": notes,
    }  # fmt: skip
    return {"data": _trial_lines(trials, axes, narrow), "layout": layout}


def _trial_lines(
    trials: Sequence[TrialRecord], axes: Sequence[ParallelAxis], narrow: bool
) -> list[Trace]:
    """Return the lines, those of low AP first, so that the best are on top."""
    results = [t.ap for t in trials if t.ap is not None and t.status == "finished"]
    low, high = padded(results, 0) if results else (0.0, 1.0)
    data: list[Trace] = []
    ordered = sorted(trials, key=lambda t: -math.inf if t.ap is None else t.ap)
    for number, trial in enumerate(ordered):
        along = [(i, item.places[trial.name]) for i, item in enumerate(axes)
                 if trial.name in item.places]  # fmt: skip
        # Shifted a little, so that trials with the same values are distinguishable.
        shift = ((number * 0.618) % 1 - 0.5) * 0.05
        across = [place + (shift if i < len(axes) - 1 else 0) for i, place in along]
        steps: list[float] = [i for i, _ in along]
        x, y = (across, steps) if narrow else (steps, across)
        result = "no AP" if trial.ap is None else signed(trial.ap, 2)
        share = (trial.ap - low) / (high - low) if trial.ap and trial.status == "finished" else 0.0
        data.append(
            line(
                x,
                y,
                color="@c1" if trial.status == "failed" else step_color(share),
                width=1.2 + 1.3 * share,
                dash="solid" if trial.status == "finished" else "dot",
                opacity=0.9,
                texts=[f"{figure_text(trial.name)}<br>{result} ({trial.status})"] * len(x),
            )
        )
    return data


def _axis_labels(i: int, item: ParallelAxis, narrow: bool, *, alternates: bool) -> list[Plot]:
    """Return the title of an axis and its ticks.

    Args:
        alternates: every second title is higher, since titles of many axes would overlap.
    """
    title = f"<b>{shortened(item.name, 40 if narrow else 22)}</b>"
    if narrow:
        notes = [label(title, 0, i, yanchor="bottom", yshift=7, bgcolor="@paper")]
        for text, place in item.ticks.items():
            anchor = "left" if place < 0.1 else "right" if place > 0.9 else "center"
            notes.append(
                label(shortened(text, 14), place, i, color="@muted", yanchor="top", yshift=-4,
                      anchor=anchor, bgcolor="@paper")
            )  # fmt: skip
        return notes
    height = 26 if i % 2 and alternates else 9
    return [
        label(title, i, 1, anchor="center", yanchor="bottom", yshift=height),
        *(
            label(shortened(text, 14), i, place, color="@muted", anchor="right", xshift=-6,
                  bgcolor="@paper")
            for text, place in item.ticks.items()
        ),
    ]  # fmt: skip


def _half_px(title: str) -> int:
    return max(36, label_px([title], 22) * 11 // 20)  # in bold letters
