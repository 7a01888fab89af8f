"""Plot a study or a sweep: cells, differences, effects, learning curves, cost and power.

Missing numbers are left out of a figure; the tables name them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from deta.platform.pages.figures import COLORS, MUTED, PAPER, ForestRow, band, figure, marks, style
from deta.platform.pages.number_format import amount, short, signed
from deta.platform.pages.safe_text import figure_text
from deta.platform.study.power import PilotPlan
from deta.platform.study.study_types import Analysis, CellDifference, CellSummary
from deta.platform.study.trial_record import TrialRecord

MANY_CELLS = 8  # above it, only the best are coloured and named
NUM_BEST = 3
MIN_LATE_EVALUATIONS = 3  # of each curve; below it, the last third is not drawn again
LOG_RATIO = 20  # costs with a larger ratio get a logarithmic axis
MAX_SEEDS = 24  # on the axis of the power figure


def cell_rows(analysis: Analysis) -> list[ForestRow]:
    """Return the cells with a mean, in the order of the design."""
    return [
        ForestRow(
            cell.cell.key,
            cell.mean,
            cell.interval,
            tuple((f"seed {seed}", value) for seed, value in cell.values.items()),
            is_distinct=True,
            color=COLORS[place % len(COLORS)],
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
        is_distinct = item.is_distinguishable(1 - analysis.confidence)
        rows.append(ForestRow(item.title, item.estimate, item.interval, values, is_distinct))
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

    def num_changed(first: Mapping[str, str], second: Mapping[str, str]) -> int:
        return sum(first[name] != second.get(name) for name in first) if first and second else 1

    return [d for d in analysis.differences if num_changed(labels[d.first], labels[d.second]) == 1]


def interactions(analysis: Analysis) -> list[go.Figure]:
    """Plot the mean over cells at each level of one factor, a line for each level of another.

    Returns:
        A plot for each pair of factors; empty where no factor has two levels with values.
    """
    crossed = [cell for cell in analysis.cells if cell.cell.labels and cell.mean is not None]
    factors = list(crossed[0].cell.labels) if crossed else []
    pairs: list[tuple[str, str]] = [(factors[0], "")] if len(factors) == 1 else []
    pairs += itertools.permutations(factors, 2) if len(factors) == 2 else ()
    pairs += itertools.combinations(factors, 2) if len(factors) > 2 else ()
    return [_means_at_levels(crossed, across, by, analysis.metric) for across, by in pairs]


def _means_at_levels(cells: Sequence[CellSummary], across: str, by: str, metric: str) -> go.Figure:
    levels = list(dict.fromkeys(cell.cell.labels[across] for cell in cells))
    traces = []
    series = list(dict.fromkeys(cell.cell.labels.get(by, "") for cell in cells))
    for place, name in enumerate(series):
        own = [cell for cell in cells if cell.cell.labels.get(by, "") == name]
        nudge = (place - (len(series) - 1) / 2) * 0.05  # so that lines do not hide each other
        seeds = [
            (levels.index(cell.cell.labels[across]) + nudge, value,
             figure_text(f"{cell.cell.key}, seed {seed}") + f": {signed(value, 2)}")
            for cell in own for seed, value in cell.values.items()
        ]  # fmt: skip
        x, y, texts = zip(*seeds, strict=True)
        look = style(place)
        color = look["line"]["color"]
        traces.append(marks(x, y, texts, color, marker={"size": 5}, opacity=0.4))
        means = {}
        for place_of_level, level in enumerate(levels):
            values = [c.mean for c in own if c.cell.labels[across] == level and c.mean is not None]
            if values:
                means[place_of_level + nudge] = sum(values) / len(values)
        traces.append(
            go.Scatter(x=list(means), y=list(means.values()), mode="lines+markers", **look,
                       name=figure_text(f"{by} {name}"), hovertemplate="%{y:.2f}")
        )  # fmt: skip
        traces[-1].marker.size = 9
    return figure(
        traces, height=340, showlegend=bool(by), xaxis_title_text=figure_text(across),
        xaxis_tickvals=list(range(len(levels))),
        xaxis_ticktext=[figure_text(level) for level in levels],
        xaxis_range=[-0.3, len(levels) - 0.7], yaxis_title_text=f"{figure_text(metric)} (mean)",
    )  # fmt: skip


@dataclass(frozen=True)
class MeanCurve:
    """The mean of a cell's finished trials, at the samples at which all were evaluated."""

    samples: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_seeds: int


def mean_learning_curves(trials: Sequence[TrialRecord]) -> Mapping[str, MeanCurve]:
    """Return a mean curve for each cell that has a finished trial with a curve."""
    curves = {}
    for key in dict.fromkeys(trial.cell for trial in trials):
        found = [
            dict(t.curve) for t in trials if t.cell == key and t.status == "finished" and t.curve
        ]
        samples = sorted(set.intersection(*map(set, found))) if found else []
        if samples:
            values = [[curve[x] for curve in found] for x in samples]
            curves[key] = MeanCurve(
                tuple(samples),
                tuple(sum(v) / len(v) for v in values),
                tuple(map(min, values)),
                tuple(map(max, values)),
                len(found),
            )
    return curves


def learning_curves(
    trials: Sequence[TrialRecord], cells: Sequence[str], metric: str
) -> list[go.Figure]:
    """Plot AP over samples seen: each cell's mean of finished trials, and their range as a band.

    Beside it, the last third is plotted again at its own scale, where differences are visible. A
    trial that did not finish is a thin line: in a mean, trials that were stopped early for a low
    AP would bias the others upwards. Cells with a single evaluation are points, with their range.
    """
    end = max((x for trial in trials for x, _ in trial.curve), default=0)
    if not end:
        return []
    means = {key: curve for key, curve in mean_learning_curves(trials).items() if key in cells}
    late = [sum(x >= end * 2 / 3 for x in curve.samples) for curve in means.values()]
    begins = [0.0, end * 2 / 3] if min(late, default=0) >= MIN_LATE_EVALUATIONS else [0.0]
    return [
        figure(
            _curve_traces(trials, cells, means, begin), height=440, showlegend=True,
            xaxis_title_text="training samples seen" + (", last third" if begin else ""),
            xaxis_nticks=5, yaxis_title_text=f"{figure_text(metric)} (0 to 100)",
        )
        for begin in begins
    ]  # fmt: skip


def _curve_traces(
    trials: Sequence[TrialRecord], cells: Sequence[str], means: Mapping[str, MeanCurve],
    begin: float,
) -> list[go.Scatter]:  # fmt: skip
    """Return the curves from `begin` on."""
    is_many = len(cells) > MANY_CELLS
    best = sorted(means, key=lambda key: -means[key].mean[-1])
    places = {key: i for i, key in enumerate(best[:NUM_BEST] if is_many else cells)}
    traces = []
    for trial in trials:
        points = [point for point in trial.curve if point[0] >= begin]
        if trial.status != "finished" and points and trial.cell in cells:
            color = MUTED if is_many else style(places[trial.cell])["line"]["color"]
            x, y = zip(*points, strict=True)
            traces.append(
                go.Scatter(
                    x=x, y=y, mode="lines+markers", line={"color": color, "width": 1,
                    "dash": "dot"}, marker={"color": color, "symbol": "x-thin-open",
                    "size": [0] * (len(x) - 1) + [9]}, showlegend=False, hoverinfo="text",
                    hovertext=figure_text(f"{trial.name}: {trial.status}"),
                )
            )  # fmt: skip
    for key in (key for key in cells if key in means):
        curve, look = means[key], style(places.get(key, 0))
        first = sum(x < begin for x in curve.samples)
        x, low, high = (v[first:] for v in (curve.samples, curve.low, curve.high))
        y, has_range = curve.mean[first:], curve.num_seeds > 1 and not is_many
        if has_range and len(x) > 1:
            traces.append(band(x, low, high, look["line"]["color"]))
        line = {**look["line"], "width": 2.5} if key in places else {"color": MUTED, "width": 1}
        # A line through one point would not be seen.
        is_point, whisker = len(x) == 1, None
        if is_point and has_range:
            whisker = {"array": [high[0] - y[0]], "arrayminus": [y[0] - low[0]]}
        traces.append(
            go.Scatter(
                x=x, y=y, mode="markers" if is_point else "lines", line=line, error_y=whisker,
                marker={**look["marker"], "color": line["color"], "size": 9 if is_point else 0},
                name=figure_text(key), showlegend=key in places,
                hovertemplate="%{x:,} samples: %{y:.2f}",
            )
        )  # fmt: skip
    return traces


@dataclass(frozen=True)
class CostMark:
    """A cell, or a single trial, with what it cost on average."""

    name: str
    cost: float
    ap: float
    trials: Sequence[tuple[str, float, float]] = ()  # name, cost and AP of each, if several


def cost_against_ap(
    cells: Sequence[CostMark], front: Sequence[str], cost_title: str, metric: str
) -> go.Figure:
    """Plot AP over cost: cells large, their trials small, and the Pareto front of the cells.

    Args:
        front: names of the cells on the front, cheapest first.
    """
    is_many = len(cells) > MANY_CELLS
    steps = [cell for name in front for cell in cells if cell.name == name]
    traces = [
        go.Scatter(x=[cell.cost for cell in steps], y=[cell.ap for cell in steps], mode="lines",
                   line={"color": MUTED, "width": 1.5, "dash": "dot", "shape": "hv"},
                   name="Pareto front", hoverinfo="skip")
    ]  # fmt: skip
    for place, cell in enumerate(cells):
        marker: dict[str, Any] = style(0 if is_many else place)["marker"]
        color, name = marker["color"], figure_text(cell.name)
        texts = [f"{figure_text(n)}: {signed(ap, 2)}" for n, _, ap in cell.trials]
        x, y = [cost for _, cost, _ in cell.trials], [ap for *_, ap in cell.trials]
        traces.append(marks(x, y, texts, color, marker=marker | {"size": 6}, opacity=0.45))
        text = f"{name}<br>{signed(cell.ap, 2)} at {amount(cell.cost)}"
        marker |= {"size": 9 if is_many else 12, "line": {"color": color, "width": 2}}
        marker["color"] = color if cell.name in front else PAPER
        traces.append(
            marks([cell.cost], [cell.ap], [text], color, marker=marker, name=name,
                  showlegend=not is_many)
        )  # fmt: skip
    costs = [cell.cost for cell in cells]
    costs += [cost for cell in cells for _, cost, _ in cell.trials]
    is_log = min(costs) > 0 and max(costs) / min(costs) > LOG_RATIO
    return figure(
        traces, height=420, showlegend=True, xaxis_title_text=cost_title,
        xaxis_type="log" if is_log else "linear",
        yaxis_title_text=f"{figure_text(metric)} (0 to 100)",
    )  # fmt: skip


def power_curve(plan: PilotPlan, seeds_now: int, relevant: float, metric: str) -> go.Figure:
    """Plot the smallest detectable difference over seeds, at the measured noise and its limit."""
    last = min(MAX_SEEDS, max(12, 2 * seeds_now, 2 * (plan.estimate.seeds_for(relevant) or 0)))
    seeds = list(range(2, last + 1))
    measured = [plan.estimate.smallest_difference(n) or 0.0 for n in seeds]
    cautious = [plan.cautious.smallest_difference(n) or 0.0 for n in seeds]
    limit = band(seeds, measured, cautious, COLORS[0], name="noise up to its upper limit")
    limit.showlegend = True
    line = go.Scatter(
        x=seeds, y=measured, mode="lines+markers", **style(0), name="measured noise",
        hovertemplate="%{x} seeds of each cell: %{y:.2f}",
    )  # fmt: skip
    number = figure_text(metric)
    plot = figure(
        [limit, line], height=380, showlegend=True, xaxis_title_text="seeds of each cell",
        yaxis_title_text=f"smallest difference, {number}",
        yaxis_range=[0, max(1.15 * measured[0], 1.3 * relevant)],
    )  # fmt: skip
    plot.add_hline(relevant, line={"color": COLORS[1], "dash": "dash"}, showlegend=True,
                   name=f"{short(relevant)} {number}, what matters here")  # fmt: skip
    if seeds_now >= 2:
        plot.add_vline(seeds_now, line={"color": MUTED, "dash": "dot"}, name="this study",
                       showlegend=True)  # fmt: skip
    return plot
