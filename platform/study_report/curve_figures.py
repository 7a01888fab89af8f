"""Figures of any sweep: learning curves and cost; and what more seeds would show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deta.platform.pages.number_format import short, signed
from deta.platform.pages.plotly_parts import (
    LABEL_PX,
    LOG_RATIO,
    Plot,
    Trace,
    axis,
    band,
    band_of,
    color_of,
    dash_of,
    label,
    label_px,
    line,
    padded,
    points,
    rule,
    shortened,
    spread,
    step_color,
    symbol_of,
)
from deta.platform.pages.safe_text import figure_text
from deta.platform.study.power import PilotPlan
from deta.platform.study.trial_record import TrialRecord
from deta.platform.study_report.tables import amount

MANY_CELLS = 8  # above it, marks are coloured by their AP and only the best are named
NUM_BEST = 3
MIN_LATE_EVALUATIONS = 3  # of each curve; below it, the last third is not drawn again
MAX_SEEDS = 24  # on the axis of the power figure


def learning_curves(
    trials: Sequence[TrialRecord], cells: Sequence[str], metric: str, *, narrow: bool
) -> Plot | None:
    """AP over samples seen: of a cell the mean of its finished trials, and their range as a band.

    Beside the whole, its last third at a scale of its own, where differences can be seen. A trial
    that did not finish is a thin line of its own: in a mean, those that were stopped for being bad
    would make the rest look good.
    """
    values = [y for trial in trials for _, y in trial.curve]
    if not values:
        return None
    curves = {key: curve for key, curve in mean_curves(trials).items() if key in cells}
    final = {key: curve.mean[-1] for key, curve in curves.items()}
    best = sorted(final, key=lambda key: -final[key])
    named = best[:NUM_BEST] if len(cells) > MANY_CELLS else best
    end = max(x for trial in trials for x, _ in trial.curve)
    begin = end * 2 / 3
    late_counts = [sum(x >= begin for x in curve.samples) for curve in curves.values()]
    has_late = bool(curves) and min(late_counts) >= MIN_LATE_EVALUATIONS

    data = _curve_traces(trials, cells, curves, final, named, metric, axes=1)
    low, high = padded(values)
    ranges = [((0.0, end * 1.02), (low, high))]
    if has_late:
        late = [y for curve in curves.values() for side in (curve.low, curve.high)
                for x, y in zip(curve.samples, side, strict=True) if x >= begin]  # fmt: skip
        data += _curve_traces(trials, cells, curves, final, named, metric, axes=2)
        low, high = padded(late)
        ranges.append(((begin - (end - begin) * 0.04, end + (end - begin) * 0.04), (low, high)))

    room_px = 0 if narrow else label_px(named, 30) + 8
    legend_px = (LABEL_PX + 4) * len(named) if narrow else 0
    drawn_px = 380 if not narrow else 300 * len(ranges)
    layout: Plot = {
        "height": drawn_px + legend_px + 64,
        "margin": {"r": 12 + room_px, "t": 16 + legend_px},
    }
    for place, (across, up) in enumerate(ranges):
        number = "" if place == 0 else "2"
        whole, share = (0.0, 1.0), len(ranges) > 1
        beside = whole if not share else ((0.0, 0.45), (0.55, 1.0))[place]
        below = whole if not share else ((0.6, 1.0), (0.0, 0.4))[place]
        layout[f"xaxis{number}"] = axis(
            "training samples seen" + (", last third" if place else ""),
            range=list(across), domain=list(whole if narrow else beside), anchor=f"y{number}",
            nticks=5,
        )  # fmt: skip
        layout[f"yaxis{number}"] = axis(
            f"{figure_text(metric)} (0 to 100)" if place == 0 or narrow else "",
            range=list(up), domain=list(below if narrow else whole), anchor=f"x{number}",
        )  # fmt: skip
    colors = {key: _curve_color(key, cells, final) for key in named}
    if narrow:
        layout["annotations"] = [
            label(f"— {shortened(key, 36)}  {signed(final[key], 1)}", 0, 1, color=colors[key],
                  xref="paper", yref="paper", yanchor="bottom",
                  yshift=6 + (LABEL_PX + 4) * (len(named) - 1 - place))
            for place, key in enumerate(named)
        ]  # fmt: skip
    else:
        places = {key: (final[key] - low) / (high - low) for key in named}
        layout["annotations"] = [
            label(shortened(key, 30), 1, place, color=colors[key], xref="paper", yref="paper",
                  xshift=4)
            for key, place in spread(places, (LABEL_PX + 2) / drawn_px).items()
        ]  # fmt: skip
    return {"data": data, "layout": layout}


def _curve_color(key: str, cells: Sequence[str], final: Mapping[str, float]) -> str:
    if len(cells) <= MANY_CELLS:
        return color_of(cells.index(key))
    low, high = padded(list(final.values()), 0) if final else (0.0, 1.0)
    return step_color((final.get(key, low) - low) / (high - low))


def _curve_traces(
    trials: Sequence[TrialRecord],
    cells: Sequence[str],
    curves: Mapping[str, MeanCurve],
    final: Mapping[str, float],
    named: Sequence[str],
    metric: str,
    *,
    axes: int,
) -> list[Trace]:
    data: list[Trace] = []
    is_many = len(cells) > MANY_CELLS
    for trial in trials:
        if trial.status != "finished" and trial.curve and trial.cell in cells:
            color = "@muted" if is_many else _curve_color(trial.cell, cells, final)
            texts = [figure_text(f"{trial.name}: {trial.status}")] * len(trial.curve)
            x, y = [x for x, _ in trial.curve], [y for _, y in trial.curve]
            data.append(line(x, y, color=color, width=1, dash="dot", texts=texts, axes=axes))
            data.append(
                points(x[-1:], y[-1:], color=color, symbol="x-thin-open", texts=texts[:1],
                       axes=axes)
            )  # fmt: skip
    for place, key in enumerate(cells):
        curve = curves.get(key)
        if curve is None:
            continue
        if curve.num_seeds > 1 and not is_many:
            data.append(band(curve.samples, curve.low, curve.high, color=band_of(place), axes=axes))
        texts = [
            f"{figure_text(key)}<br>{x:,} samples: {signed(y, 2)} {figure_text(metric)}"
            for x, y in zip(curve.samples, curve.mean, strict=True)
        ]
        data.append(
            line(
                curve.samples,
                curve.mean,
                color=_curve_color(key, cells, final),
                width=2.5 if key in named else 1.5,
                dash="solid" if is_many else dash_of(place),
                texts=texts,
                axes=axes,
            )
        )
    return data


@dataclass(frozen=True)
class MeanCurve:
    """The finished trials of one cell, at the numbers of samples that all of them were seen at."""

    samples: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    num_seeds: int


def mean_curves(trials: Sequence[TrialRecord]) -> Mapping[str, MeanCurve]:
    """By cell; a cell without a finished trial that has a curve is missing."""
    curves = {}
    for key in dict.fromkeys(trial.cell for trial in trials):
        found = [
            dict(t.curve) for t in trials if t.cell == key and t.status == "finished" and t.curve
        ]
        if not found:
            continue
        samples = sorted(set(found[0]).intersection(*found[1:]))
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


@dataclass(frozen=True)
class CostMark:
    """A cell, or a single trial, with what it cost on average."""

    name: str
    cost: float
    ap: float
    place: int  # among the cells: its colour
    trials: tuple[TrialRecord, ...] = ()


def cost_against_ap(
    cells: Sequence[CostMark],
    front: Sequence[str],
    cost_title: str,
    metric: str,
    costs: Mapping[str, float],
    *,
    narrow: bool,
) -> Plot:
    """AP over cost: cells large, their trials small, and the front that no cell beats.

    Args:
        front: names of the cells on the front, cheapest first.
        costs: what each trial cost, by its name.
    """
    data: list[Trace] = []
    of_name = {cell.name: cell for cell in cells}
    is_many = len(cells) > MANY_CELLS
    on_front = [of_name[name] for name in front]
    all_costs = [cell.cost for cell in cells] + list(costs.values())
    values = [cell.ap for cell in cells] + [
        t.ap for cell in cells for t in cell.trials if t.ap is not None
    ]
    is_log = min(all_costs) > 0 and max(all_costs) / min(all_costs) > LOG_RATIO
    place_of = math.log10 if is_log else float
    left, right = padded([place_of(cost) for cost in all_costs], 0.08)
    low, high = padded(values, 0.1)
    if on_front:
        edge = 10**right if is_log else right
        data.append(
            line(
                [on_front[0].cost, *(cell.cost for cell in on_front), edge],
                [low, *(cell.ap for cell in on_front), on_front[-1].ap],
                color="@muted", width=1.5, dash="dot", shape="hv",
            )
        )  # fmt: skip
    for cell in cells:
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
    # On the front everything is named; elsewhere too, where cells are few.
    named = [c for c in cells if c.name in front or not is_many][: MANY_CELLS + NUM_BEST]
    height = 380
    gap = (high - low) * (LABEL_PX + 2) / (height - 64)
    letters = 24 if narrow else 34
    near = (right - left) * (0.6 if narrow else 0.22)
    heights: dict[str, float] = {}
    for group in _neighbours({cell.name: place_of(cell.cost) for cell in named}, near):
        heights |= spread({name: of_name[name].ap for name in group}, gap)
    middle = (left + right) / 2
    notes = []
    for cell in named:
        x = place_of(cell.cost)
        is_right = x > middle
        notes.append(
            label(
                shortened(cell.name, letters),
                x,
                min(max(heights[cell.name], low), high),
                color="@c0" if is_many else color_of(cell.place),
                anchor="right" if is_right else "left",
                xshift=-10 if is_right else 10,
                yshift=9 if cell.name in front else 0,  # above the line of the front
            )
        )
    layout = {
        "height": height,
        "xaxis": axis(
            cost_title,
            range=[left, right],
            type="log" if is_log else "linear",
            nticks=5 if narrow else 9,
        ),
        "yaxis": axis(f"{figure_text(metric)} (0 to 100)", range=[low, high]),
        "annotations": notes,
    }
    return {"data": data, "layout": layout}


def _neighbours(places: Mapping[str, float], near: float) -> list[list[str]]:
    """Names in groups; whoever is nearer than `near` to another is in its group."""
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
    """The smallest difference that so many seeds find, by the noise measured and at its worst."""
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
