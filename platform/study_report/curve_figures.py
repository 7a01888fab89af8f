"""Plot the learning curves of a study or a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deta.platform.pages.number_format import signed
from deta.platform.pages.plotly_parts import (
    LABEL_PX,
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
    shortened,
    spread,
    step_color,
)
from deta.platform.pages.safe_text import figure_text
from deta.platform.study.trial_record import TrialRecord

MANY_CELLS = 8  # above it, curves are coloured by their AP and only the best are named
NUM_BEST = 3
MIN_LATE_EVALUATIONS = 3  # of each curve; below it, the last third is not drawn again


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
class _Curves:
    """The curves of a figure, with what decides their colour and labels."""

    trials: Sequence[TrialRecord]
    cells: Sequence[str]
    means: Mapping[str, MeanCurve]
    named: Sequence[str]  # cells with a label
    metric: str

    @property
    def final(self) -> dict[str, float]:
        return {key: curve.mean[-1] for key, curve in self.means.items()}

    @property
    def is_many(self) -> bool:
        return len(self.cells) > MANY_CELLS

    def color(self, key: str) -> str:
        if not self.is_many:
            return color_of(self.cells.index(key))
        final = self.final
        low, high = padded(list(final.values()), 0) if final else (0.0, 1.0)
        return step_color((final.get(key, low) - low) / (high - low))


def learning_curves(
    trials: Sequence[TrialRecord], cells: Sequence[str], metric: str, *, narrow: bool
) -> Plot | None:
    """Plot AP over samples seen: each cell's mean of finished trials, and their range as a band.

    Beside it, the last third is plotted again at its own scale, where differences are visible. A
    trial that did not finish is a thin line: in a mean, trials that were stopped early for a low
    AP would bias the others upwards.
    """
    values = [y for trial in trials for _, y in trial.curve]
    if not values:
        return None
    means = {key: curve for key, curve in mean_learning_curves(trials).items() if key in cells}
    best = sorted(means, key=lambda key: -means[key].mean[-1])
    named = best[:NUM_BEST] if len(cells) > MANY_CELLS else best
    curves = _Curves(trials, cells, means, named, metric)
    end = max(x for trial in trials for x, _ in trial.curve)
    begin = end * 2 / 3
    late_counts = [sum(x >= begin for x in curve.samples) for curve in means.values()]
    has_late = bool(means) and min(late_counts) >= MIN_LATE_EVALUATIONS

    data = _curve_traces(curves, axes=1)
    ranges = [((0.0, end * 1.02), padded(values))]
    if has_late:
        late = [y for curve in means.values() for side in (curve.low, curve.high)
                for x, y in zip(curve.samples, side, strict=True) if x >= begin]  # fmt: skip
        data += _curve_traces(curves, axes=2)
        air = (end - begin) * 0.04
        ranges.append(((begin - air, end + air), padded(late)))
    return {"data": data, "layout": _curve_layout(curves, ranges, narrow)}


def _curve_layout(
    curves: _Curves,
    ranges: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    narrow: bool,
) -> Plot:
    """Return the layout with labels; each panel is given by its ranges of x and y."""
    named, is_split = curves.named, len(ranges) > 1
    room_px = 0 if narrow else label_px(named, 30) + 8
    legend_px = (LABEL_PX + 4) * len(named) if narrow else 0
    drawn_px = 380 if not narrow else 300 * len(ranges)
    layout: Plot = {
        "height": drawn_px + legend_px + 64,
        "margin": {"r": 12 + room_px, "t": 16 + legend_px},
    }
    for place, (across, up) in enumerate(ranges):
        number = "" if place == 0 else "2"
        whole = (0.0, 1.0)
        beside = ((0.0, 0.45), (0.55, 1.0))[place] if is_split else whole
        below = ((0.6, 1.0), (0.0, 0.4))[place] if is_split else whole
        layout[f"xaxis{number}"] = axis(
            "training samples seen" + (", last third" if place else ""),
            range=list(across), domain=list(whole if narrow else beside), anchor=f"y{number}",
            nticks=5,
        )  # fmt: skip
        layout[f"yaxis{number}"] = axis(
            f"{figure_text(curves.metric)} (0 to 100)" if place == 0 or narrow else "",
            range=list(up), domain=list(below if narrow else whole), anchor=f"x{number}",
        )  # fmt: skip
    final = curves.final
    if narrow:
        layout["annotations"] = [
            label(f"— {shortened(key, 36)}  {signed(final[key], 1)}", 0, 1,
                  color=curves.color(key), xref="paper", yref="paper", yanchor="bottom",
                  yshift=6 + (LABEL_PX + 4) * (len(named) - 1 - place))
            for place, key in enumerate(named)
        ]  # fmt: skip
        return layout
    low, high = ranges[-1][1]
    places = {key: (final[key] - low) / (high - low) for key in named}
    layout["annotations"] = [
        label(shortened(key, 30), 1, place, color=curves.color(key), xref="paper", yref="paper",
              xshift=4)
        for key, place in spread(places, (LABEL_PX + 2) / drawn_px).items()
    ]  # fmt: skip
    return layout


def _curve_traces(curves: _Curves, *, axes: int) -> list[Trace]:
    data: list[Trace] = []
    for trial in curves.trials:
        if trial.status != "finished" and trial.curve and trial.cell in curves.cells:
            color = "@muted" if curves.is_many else curves.color(trial.cell)
            texts = [figure_text(f"{trial.name}: {trial.status}")] * len(trial.curve)
            x, y = [x for x, _ in trial.curve], [y for _, y in trial.curve]
            data.append(line(x, y, color=color, width=1, dash="dot", texts=texts, axes=axes))
            data.append(
                points(x[-1:], y[-1:], color=color, symbol="x-thin-open", texts=texts[:1],
                       axes=axes)
            )  # fmt: skip
    for place, key in enumerate(curves.cells):
        curve = curves.means.get(key)
        if curve is None:
            continue
        if curve.num_seeds > 1 and not curves.is_many:
            data.append(band(curve.samples, curve.low, curve.high, color=band_of(place), axes=axes))
        texts = [
            f"{figure_text(key)}<br>{x:,} samples: {signed(y, 2)} {figure_text(curves.metric)}"
            for x, y in zip(curve.samples, curve.mean, strict=True)
        ]
        data.append(
            line(
                curve.samples,
                curve.mean,
                color=curves.color(key),
                width=2.5 if key in curves.named else 1.5,
                dash="solid" if curves.is_many else dash_of(place),
                texts=texts,
                axes=axes,
            )
        )
    return data
