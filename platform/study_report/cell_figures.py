"""Plot a study: its cells, their differences, its effects and interactions.

Each figure is made twice: with labels beside the marks for a wide window, and above them for a
narrow one. Missing numbers are left out of a figure; the table names them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """Return the cells with a mean, in the order of the design."""
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
    """Return the differences with an estimate and an interval, each with its seeds."""
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
    """Return the effects with an estimate."""
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
    """Return differences between cells that differ in one factor, and all with a named cell."""
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


@dataclass(frozen=True)
class _Panel:
    """One panel of the interaction figure: a factor along x, lines for levels of another."""

    cells: Sequence[CellSummary]
    across: str
    lines: str  # "" for a single line
    number: int  # of the panel, from 1
    narrow: bool
    metric: str

    @property
    def axis_number(self) -> str:
        return "" if self.number == 1 else str(self.number)

    @property
    def levels(self) -> list[str]:
        return list(dict.fromkeys(cell.cell.labels[self.across] for cell in self.cells))

    @property
    def series(self) -> list[str]:
        if not self.lines:
            return [""]
        return list(dict.fromkeys(cell.cell.labels[self.lines] for cell in self.cells))


def interactions(analysis: Analysis, *, narrow: bool) -> Plot | None:
    """Plot the mean over cells at each level of one factor, a line for each level of another.

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
    for place, (across, lines) in enumerate(pairs):
        panel = _Panel(crossed, across, lines, place + 1, narrow, analysis.metric)
        layout |= _panel_axes(panel, divmod(place, columns), columns, num_rows)
        ends = {}
        for index, level in enumerate(panel.series):
            traces, end = _panel_line(panel, index, level)
            data += traces
            if lines and end is not None:
                ends[level] = end
        layout["annotations"] += _panel_labels(panel, ends)
    return {"data": data, "layout": layout}


def _range_of(panel: _Panel) -> tuple[float, float]:
    return padded([value for cell in panel.cells for value in cell.values.values()], 0.1)


def _panel_axes(panel: _Panel, place: tuple[int, int], columns: int, num_rows: int) -> Plot:
    """Return the axes of a panel, by its row and column."""
    (row, column), number, levels = place, panel.axis_number, panel.levels
    width, height = 1 / columns, 1 / num_rows
    top = 1 - row * height
    return {
        f"xaxis{number}": axis(
            figure_text(panel.across),
            domain=[column * width + (0.03 if column else 0), (column + 1) * width - 0.05],
            anchor=f"y{number}",
            tickvals=list(range(len(levels))),
            ticktext=[shortened(level, 16) for level in levels],
            range=[-0.25, len(levels) - 0.45 + (0.35 if panel.lines else 0)],
            fixedrange=True,
        ),
        f"yaxis{number}": axis(
            f"{panel.metric} (mean)" if column == 0 else "",
            domain=[top - height * (0.74 if num_rows > 1 else 1), top],
            anchor=f"x{number}",
            range=list(_range_of(panel)),
            showticklabels=column == 0,
        ),
    }


def _panel_line(
    panel: _Panel, index: int, level: str
) -> tuple[list[Trace], tuple[float, float, str] | None]:
    """Return the traces of one line, and its last point with its colour."""
    across, lines, levels = panel.across, panel.lines, panel.levels
    chosen = [c for c in panel.cells if not lines or c.cell.labels[lines] == level]
    means = {
        x: [c.mean for c in chosen if c.cell.labels[across] == name and c.mean is not None]
        for x, name in enumerate(levels)
    }
    x = [x for x, values in means.items() if values]
    y = [sum(means[i]) / len(means[i]) for i in x]
    if not x:
        return [], None
    nudge = (index - (len(panel.series) - 1) / 2) * 0.05
    color = color_of(index)
    texts = [
        figure_text(f"{across} {levels[i]}" + (f", {lines} {level}" if lines else ""))
        + f"<br>{signed(value, 2)}"
        for i, value in zip(x, y, strict=True)
    ]
    shifted = [i + nudge for i in x]
    marks = points(shifted, y, color=color, symbol=symbol_of(index), texts=texts, axes=panel.number)
    traces = [
        _seeds_of(chosen, across, levels, nudge, color, panel.number),
        line(shifted, y, color=color, axes=panel.number),
        marks,
    ]
    return traces, (shifted[-1], y[-1], color)


def _panel_labels(panel: _Panel, ends: Mapping[str, tuple[float, float, str]]) -> list[Plot]:
    """Label the lines of a panel at their ends, spread so that no two overlap."""
    low, high = _range_of(panel)
    gap = (high - low) * LABEL_PX / (240 if not panel.narrow else 180)
    heights = spread({name: y for name, (_, y, _) in ends.items()}, gap)
    return [
        label(
            f"{shortened(panel.lines, 12)} {shortened(level, 12)}",
            ends[level][0],
            height,
            color=ends[level][2],
            xref=f"x{panel.axis_number}",
            yref=f"y{panel.axis_number}",
            xshift=10,
        )
        for level, height in heights.items()
    ]


def _seeds_of(
    cells: Sequence[CellSummary],
    across: str,
    levels: Sequence[str],
    nudge: float,
    color: str,
    axes: int,
) -> Trace:
    """Return a small mark for every seed of every cell behind a line."""
    x, y, texts = [], [], []
    for cell in cells:
        for seed, value in cell.values.items():
            x.append(levels.index(cell.cell.labels[across]) + nudge)
            y.append(value)
            texts.append(f"{figure_text(cell.cell.key)}<br>seed {seed}: {signed(value, 2)}")
    return points(x, y, color=color, size=5, opacity=0.4, texts=texts, axes=axes)
