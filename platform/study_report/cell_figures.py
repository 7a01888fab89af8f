"""Figures of a study: its cells, their differences, its effects and interactions.

Each is made twice, for a wide window with labels beside the marks, and for a narrow one with the
labels above them. Numbers that cannot be had are left out of a figure; the table names them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from deta.platform.pages.number_format import signed
from deta.platform.pages.plotly_parts import (
    LABEL_PX,
    ForestRow,
    Plot,
    Trace,
    axis,
    color_of,
    label,
    line,
    padded,
    points,
    shortened,
    spread,
    symbol_of,
)
from deta.platform.pages.safe_text import figure_text
from deta.platform.study.study_types import Analysis, CellDifference, CellSummary

MAX_PANEL_COLUMNS = 3


def cell_rows(analysis: Analysis) -> list[ForestRow]:
    """The cells with a mean, in the order of the design."""
    return [
        ForestRow(
            cell.cell.key,
            cell.mean,
            cell.interval,
            tuple((f"seed {seed}", value) for seed, value in cell.values.items()),
            is_distinct=True,
            color=color_of(place),
        )
        for place, cell in enumerate(analysis.cells)
        if cell.mean is not None
    ]


def difference_rows(analysis: Analysis, differences: Sequence[CellDifference]) -> list[ForestRow]:
    """Differences with an estimate and an interval, each with that of every seed."""
    rows = []
    for item in differences:
        if item.estimate is None or item.interval is None:
            continue
        first, second = analysis.cell(item.first).values, analysis.cell(item.second).values
        values = tuple(
            (f"seed {seed}", first[seed] - second[seed])
            for seed in item.seeds
            if seed in first and seed in second
        )
        alpha = 1 - analysis.confidence
        rows.append(
            ForestRow(
                item.title, item.estimate, item.interval, values, item.is_distinguishable(alpha)
            )
        )
    return rows


def effect_rows(analysis: Analysis) -> list[ForestRow]:
    alpha = 1 - analysis.confidence
    return [
        ForestRow(
            effect.name,
            effect.estimate,
            effect.interval,
            is_distinct=effect.p_holm is not None and effect.p_holm < alpha,
        )
        for effect in analysis.effects
        if effect.estimate is not None
    ]


def neighbours(analysis: Analysis) -> list[CellDifference]:
    """Differences between cells that differ in one factor, and all with a named cell."""
    labels = {cell.cell.key: cell.cell.labels for cell in analysis.cells}
    return [
        item
        for item in analysis.differences
        if not labels[item.first]
        or not labels[item.second]
        or sum(
            labels[item.first][name] != labels[item.second].get(name) for name in labels[item.first]
        )
        == 1
    ]


def interactions(analysis: Analysis, *, narrow: bool) -> Plot | None:
    """Mean over cells at each level of one factor, a line for each level of another.

    Returns:
        None where no factor has two levels with values.
    """
    crossed = [cell for cell in analysis.cells if cell.cell.labels and cell.mean is not None]
    if not crossed:
        return None
    factors = list(crossed[0].cell.labels)
    pairs: list[tuple[str, str]] = (
        [(factors[0], ""), ] if len(factors) == 1
        else list(itertools.permutations(factors, 2)) if len(factors) == 2
        else list(itertools.combinations(factors, 2))
    )  # fmt: skip
    columns = 1 if narrow else min(len(pairs), MAX_PANEL_COLUMNS)
    num_rows = -(-len(pairs) // columns)
    data: list[Trace] = []
    layout: Plot = {
        "annotations": [],
        "height": num_rows * (300 if narrow else 360),
        "margin": {"l": 56, "r": 8 if narrow else 24, "t": 34, "b": 48},
    }
    seen = [value for cell in crossed for value in cell.values.values()]
    for place, (across, lines) in enumerate(pairs):
        row, column = divmod(place, columns)
        number = "" if place == 0 else str(place + 1)
        width, height = 1 / columns, 1 / num_rows
        top = 1 - row * height
        levels = list(dict.fromkeys(cell.cell.labels[across] for cell in crossed))
        series = list(dict.fromkeys(cell.cell.labels[lines] for cell in crossed)) if lines else [""]
        layout[f"xaxis{number}"] = axis(
            figure_text(across),
            domain=[column * width + (0.03 if column else 0), (column + 1) * width - 0.05],
            anchor=f"y{number}",
            tickvals=list(range(len(levels))),
            ticktext=[shortened(level, 16) for level in levels],
            range=[-0.25, len(levels) - 0.45 + (0.35 if lines else 0)],
            fixedrange=True,
        )
        layout[f"yaxis{number}"] = axis(
            f"{analysis.metric} (mean)" if column == 0 else "",
            domain=[top - height * (0.74 if num_rows > 1 else 1), top],
            anchor=f"x{number}",
            range=list(padded(seen, 0.1)),
            showticklabels=column == 0,
        )
        ends = {}
        for index, level in enumerate(series):
            chosen = [c for c in crossed if not lines or c.cell.labels[lines] == level]
            means = {
                x: [c.mean for c in chosen if c.cell.labels[across] == name and c.mean is not None]
                for x, name in enumerate(levels)
            }
            x = [x for x, values in means.items() if values]
            y = [sum(means[i]) / len(means[i]) for i in x]
            if not x:
                continue
            nudge = (index - (len(series) - 1) / 2) * 0.05
            color = color_of(index)
            data.append(_seeds_of(chosen, across, levels, nudge, color, place + 1))
            data.append(line([i + nudge for i in x], y, color=color, axes=place + 1))
            texts = [
                figure_text(f"{across} {levels[i]}" + (f", {lines} {level}" if lines else ""))
                + f"<br>{signed(value, 2)}"
                for i, value in zip(x, y, strict=True)
            ]
            data.append(
                points(
                    [i + nudge for i in x],
                    y,
                    color=color,
                    symbol=symbol_of(index),
                    texts=texts,
                    axes=place + 1,
                )
            )
            if lines:
                ends[level] = (x[-1] + nudge, y[-1], color)
        low, high = padded(seen, 0.1)
        gap = (high - low) * LABEL_PX / (240 if not narrow else 180)
        for level, y_label in spread({name: end[1] for name, end in ends.items()}, gap).items():
            layout["annotations"].append(
                label(
                    f"{shortened(lines, 12)} {shortened(level, 12)}",
                    ends[level][0],
                    y_label,
                    color=ends[level][2],
                    xref=f"x{number}",
                    yref=f"y{number}",
                    xshift=10,
                )
            )
    return {"data": data, "layout": layout}


def _seeds_of(
    cells: Sequence[CellSummary],
    across: str,
    levels: Sequence[str],
    nudge: float,
    color: str,
    axes: int,
) -> Trace:
    """A small mark for every seed of every cell behind a line."""
    x, y, texts = [], [], []
    for cell in cells:
        for seed, value in cell.values.items():
            x.append(levels.index(cell.cell.labels[across]) + nudge)
            y.append(value)
            texts.append(f"{figure_text(cell.cell.key)}<br>seed {seed}: {signed(value, 2)}")
    return points(x, y, color=color, size=5, opacity=0.4, texts=texts, axes=axes)
