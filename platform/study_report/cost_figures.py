"""Plot AP over cost, and the smallest difference that more seeds would detect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deta.platform.pages.number_format import amount, short, signed
from deta.platform.pages.plotly_parts import (
    LABEL_PX,
    LOG_RATIO,
    Plot,
    Trace,
    axis,
    band,
    color_of,
    label,
    line,
    padded,
    points,
    rule,
    shortened,
    spread,
    symbol_of,
)
from deta.platform.pages.safe_text import figure_text
from deta.platform.study.power import PilotPlan
from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.curve_figures import MANY_CELLS, NUM_BEST

HEIGHT_PX = 380
MAX_SEEDS = 24  # on the axis of the power figure


@dataclass(frozen=True)
class CostMark:
    """A cell, or a single trial, with what it cost on average."""

    name: str
    cost: float
    ap: float
    place: int  # among the cells; decides its colour
    trials: tuple[TrialRecord, ...] = ()


@dataclass(frozen=True)
class _Ranges:
    """The visible ranges of cost and AP."""

    is_log: bool
    left: float  # of the place of a cost on the axis, as `place` returns it
    right: float
    low: float
    high: float

    def place(self, cost: float) -> float:
        return math.log10(cost) if self.is_log else float(cost)


def cost_against_ap(
    cells: Sequence[CostMark],
    front: Sequence[str],
    cost_title: str,
    metric: str,
    costs: Mapping[str, float],
    *,
    narrow: bool,
) -> Plot:
    """Plot AP over cost: cells large, their trials small, and the Pareto front of the cells.

    Args:
        front: names of the cells on the front, cheapest first.
        costs: the cost of each trial by its name.
    """
    ranges = _ranges(cells, costs)
    by_name = {cell.name: cell for cell in cells}
    data = _front_traces([by_name[name] for name in front], ranges)
    for cell in cells:
        data += _cell_traces(cell, costs, is_many=len(cells) > MANY_CELLS, front=front)
    layout = {
        "height": HEIGHT_PX,
        "xaxis": axis(
            cost_title,
            range=[ranges.left, ranges.right],
            type="log" if ranges.is_log else "linear",
            nticks=5 if narrow else 9,
        ),
        "yaxis": axis(f"{figure_text(metric)} (0 to 100)", range=[ranges.low, ranges.high]),
        "annotations": _cell_labels(cells, front, ranges, narrow),
    }
    return {"data": data, "layout": layout}


def _ranges(cells: Sequence[CostMark], costs: Mapping[str, float]) -> _Ranges:
    all_costs = [cell.cost for cell in cells] + list(costs.values())
    values = [cell.ap for cell in cells] + [
        t.ap for cell in cells for t in cell.trials if t.ap is not None
    ]
    is_log = min(all_costs) > 0 and max(all_costs) / min(all_costs) > LOG_RATIO
    place = math.log10 if is_log else float
    return _Ranges(is_log, *padded([place(cost) for cost in all_costs], 0.08), *padded(values, 0.1))


def _front_traces(on_front: Sequence[CostMark], ranges: _Ranges) -> list[Trace]:
    if not on_front:
        return []
    edge = 10**ranges.right if ranges.is_log else ranges.right
    return [
        line(
            [on_front[0].cost, *(cell.cost for cell in on_front), edge],
            [ranges.low, *(cell.ap for cell in on_front), on_front[-1].ap],
            color="@muted", width=1.5, dash="dot", shape="hv",
        )
    ]  # fmt: skip


def _cell_traces(
    cell: CostMark, costs: Mapping[str, float], *, is_many: bool, front: Sequence[str]
) -> list[Trace]:
    """Return the marks of a cell and of its trials."""
    data: list[Trace] = []
    color = "@c0" if is_many else color_of(cell.place)
    symbol = "circle" if is_many else symbol_of(cell.place)
    if len(cell.trials) > 1:
        shown = [t for t in cell.trials if t.name in costs and t.ap is not None]
        data.append(
            points(
                [costs[t.name] for t in shown],
                [t.ap for t in shown],
                color=color,
                symbol=symbol,
                size=6,
                opacity=0.45,
                texts=[f"{figure_text(t.name)}<br>{signed(t.ap or 0, 2)}" for t in shown],
            )
        )
    data.append(
        points(
            [cell.cost],
            [cell.ap],
            color=color,
            symbol=symbol,
            size=12 if not is_many else 9,
            is_hollow=cell.name not in front,
            texts=[f"{figure_text(cell.name)}<br>{signed(cell.ap, 2)} at {amount(cell.cost)}"],
        )
    )
    return data


def _cell_labels(
    cells: Sequence[CostMark], front: Sequence[str], ranges: _Ranges, narrow: bool
) -> list[Plot]:
    """Label every cell on the front, and the others if cells are few."""
    is_many = len(cells) > MANY_CELLS
    named = [c for c in cells if c.name in front or not is_many][: MANY_CELLS + NUM_BEST]
    gap = (ranges.high - ranges.low) * (LABEL_PX + 2) / (HEIGHT_PX - 64)
    near = (ranges.right - ranges.left) * (0.6 if narrow else 0.22)
    by_name = {cell.name: cell for cell in named}
    heights: dict[str, float] = {}
    for group in _neighbours({cell.name: ranges.place(cell.cost) for cell in named}, near):
        heights |= spread({name: by_name[name].ap for name in group}, gap)
    notes = []
    for cell in named:
        x = ranges.place(cell.cost)
        is_right = x > (ranges.left + ranges.right) / 2
        notes.append(
            label(
                shortened(cell.name, 24 if narrow else 34),
                x,
                min(max(heights[cell.name], ranges.low), ranges.high),
                color="@c0" if is_many else color_of(cell.place),
                anchor="right" if is_right else "left",
                xshift=-10 if is_right else 10,
                yshift=9 if cell.name in front else 0,  # above the line of the front
            )
        )
    return notes


def _neighbours(places: Mapping[str, float], near: float) -> list[list[str]]:
    """Group names: one that is nearer than `near` to another is in its group."""
    groups: list[list[str]] = []
    for name in sorted(places, key=lambda name: places[name]):
        if groups and places[name] - places[groups[-1][-1]] < near:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def power_curve(
    plan: PilotPlan, seeds_now: int, relevant: float, metric: str, *, narrow: bool
) -> Plot:
    """Plot the smallest detectable difference over seeds, at the measured noise and its limit."""
    last = min(MAX_SEEDS, max(12, 2 * seeds_now, 2 * (plan.estimate.seeds_for(relevant) or 0)))
    seeds = list(range(2, last + 1))
    measured = [plan.estimate.smallest_difference(n) or 0.0 for n in seeds]
    cautious = [plan.cautious.smallest_difference(n) or 0.0 for n in seeds]
    top = max(1.15 * measured[0], 1.3 * relevant)
    texts = [
        f"{n} seeds of each cell: {low:.2f} {figure_text(metric)}<br>{high:.2f} if the noise is as "
        "large as the pilot allows"
        for n, low, high in zip(seeds, measured, cautious, strict=True)
    ]
    data = [
        band(seeds, measured, cautious, color="@b0"),
        line(seeds, measured, color="@c0", width=2.5),
        points(seeds, measured, color="@c0", size=6, texts=texts),
    ]
    number = figure_text(metric)
    notes = [
        label(f"{short(relevant)} {number}, what matters here", 1, relevant, color="@c1",
              xref="paper", anchor="right", yanchor="bottom", yshift=2),
        label("band: noise up to<br>its upper limit" if narrow else "band: noise up to its upper "
              "limit", seeds[len(seeds) // 2], min(top * 0.93, cautious[len(seeds) // 2]),
              color="@c0", yanchor="bottom", yshift=4),
    ]  # fmt: skip
    shapes = [rule(y=relevant, dash="dash")]
    shapes[0]["line"]["color"] = "@c1"
    if seeds_now >= 2:
        shapes.append(rule(x=seeds_now, dash="dot"))
        notes.append(
            label("this study", seeds_now, 1, color="@muted", yref="paper", yanchor="top", xshift=5)
        )
    layout = {
        "height": 360,
        "xaxis": axis("seeds of each cell", range=[1.6, last + 0.4], nticks=8 if narrow else 14),
        "yaxis": axis(
            f"difference found, {number}" if narrow else f"smallest difference found, {number}",
            range=[0, top],
        ),
        "shapes": shapes,
        "annotations": notes,
    }
    return {"data": data, "layout": layout}
