"""Make plotly figures in the look of the pages: one template, one set of colours, any width.

Colours are variables of `theme.css`, so that figures follow the light and the dark scheme;
`figures.js` resolves them. A text that a person chose goes through `figure_text` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from deta.platform.pages.number_format import Interval, common_decimals, interval_text, signed
from deta.platform.pages.safe_text import figure_text

INK, MUTED, PAPER = "var(--ink)", "var(--muted)", "var(--paper)"
COLORS = tuple(f"var(--c{i})" for i in range(6))
SCALE = ((0.0, "var(--pale)"), (1.0, "var(--strong)"))  # of a quantity
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
MAX_LETTERS = 44  # of a name in a figure, as many as a phone has room for
BAND_OPACITY = 0.16

AXIS = {
    "gridcolor": "var(--rule)", "linecolor": MUTED, "tickcolor": MUTED, "ticks": "outside",
    "ticklen": 4, "zeroline": False, "showline": True, "automargin": True,
    "title": {"standoff": 10, "font": {"size": 13}},
}  # fmt: skip
TEMPLATE = go.layout.Template(
    layout={
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "family": "-apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif",
            "size": 13,
            "color": MUTED,
        },
        "margin": {"l": 48, "r": 16, "t": 12, "b": 40},
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "var(--shade)", "bordercolor": MUTED, "align": "left",
            "font": {"color": INK, "size": 13},
        },
        "separators": ". ",
        "colorway": COLORS,
        "showlegend": False,
        # Above the plot, in as many lines as the width needs.
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom",
                   "font": {"color": INK}},
        "xaxis": {**AXIS, "showgrid": False},
        "yaxis": AXIS,
    }
)  # fmt: skip


def figure(traces: Sequence[Any], *, height: int, **layout: Any) -> go.Figure:
    """Return a figure as wide as the page; `layout` is that of plotly, such as `xaxis_title_text`.

    Args:
        height: in pixels, legend included.
    """
    return go.Figure(list(traces), go.Layout(template=TEMPLATE, height=height, **layout))


def shortened(name: str, letters: int = MAX_LETTERS) -> str:
    """Return a name for a label, cut with an ellipsis if it is long."""
    return figure_text(name if len(name) <= letters else name[: letters - 1] + "…")


def style(place: int) -> dict[str, Any]:
    """Return colour, dash and symbol of a series; combinations repeat only after 24 series."""
    color = COLORS[place % len(COLORS)]
    return {
        "line": {"color": color, "dash": DASHES[place // len(COLORS) % len(DASHES)]},
        "marker": {"color": color, "symbol": SYMBOLS[place % len(SYMBOLS)]},
    }


def marks(
    x: Sequence[float], y: Sequence[float], texts: Sequence[str], color: str, **more: Any
) -> go.Scatter:
    """Return points; `texts` (already made safe) appear under the pointer."""
    look = {"color": color} | more.pop("marker", {})
    options = {"mode": "markers", "hoverinfo": "text", "showlegend": False} | more
    return go.Scatter(x=list(x), y=list(y), marker=look, hovertext=list(texts), **options)


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, **more: Any
) -> go.Scatter:
    """Return the area between two lines."""
    return go.Scatter(
        x=[*x, *reversed(x)], y=[*high, *reversed(low)], mode="lines", line_width=0, fill="toself",
        fillcolor=color, opacity=BAND_OPACITY, hoverinfo="skip", showlegend=False, **more,
    )  # fmt: skip


def bars(groups: Mapping[str, Mapping[str, float]], title: str) -> go.Figure:
    """Plot numbers by name as bars, one group of bars for each name, with a legend if several."""
    traces = [
        go.Bar(
            name=shortened(group), orientation="h", x=list(values.values()), y=list(values),
            marker_color=COLORS[place], text=[f"{value:.1f}" for value in values.values()],
            textposition="outside", cliponaxis=False, hoverinfo="skip",
        )
        for place, (group, values) in enumerate(groups.items())
    ]  # fmt: skip
    largest = max([1.0, *(value for values in groups.values() for value in values.values())])
    return figure(
        traces, height=200 + 110 * len(groups), showlegend=len(groups) > 1,
        xaxis_title_text=title, xaxis_range=[0, 1.12 * largest], yaxis_autorange="reversed",
        yaxis_showgrid=False, yaxis_showline=False, yaxis_ticks="", yaxis_ticklabelstandoff=6,
    )  # fmt: skip


def heat_map(
    values: Sequence[Sequence[float]], x: Sequence[Any], names: Sequence[str], **more: Any
) -> go.Heatmap:
    """Return shares as colours, in numbered rows: two shortened names may be the same."""
    return go.Heatmap(
        z=[list(row) for row in values], x=list(x), y=list(range(len(names))), zmin=0, zmax=1,
        colorscale=SCALE, showscale=False, ygap=1, **more,
    )  # fmt: skip


def rows_axis(names: Sequence[str]) -> dict[str, Any]:
    """Return the axis that names the rows of a heat map."""
    return {
        "autorange": "reversed", "tickvals": list(range(len(names))), "ticktext": list(names),
        "showgrid": False, "showline": False, "ticks": "", "tickfont": {"size": 12},
    }  # fmt: skip


@dataclass(frozen=True)
class ForestRow:
    """One estimate with its interval."""

    name: str
    estimate: float
    interval: Interval | None
    values: tuple[tuple[str, float], ...] = ()  # that it is the mean of, each with its name
    is_distinct: bool = False  # differs from zero after correction; drawn filled
    color: str = COLORS[0]


def forest(rows: Sequence[ForestRow], title: str, *, zero: bool) -> go.Figure:
    """Plot estimates below one another: name and number, then values, interval and estimate."""
    decimals = common_decimals([row.interval.half_width for row in rows if row.interval])
    numbers = [interval_text(row.estimate, row.interval, decimals) for row in rows]
    names = [shortened(row.name) for row in rows]
    longest = max(len(f"{a}  {b}") for a, b in zip(names, numbers, strict=True))
    between = "  " if longest <= MAX_LETTERS else "<br>"
    traces, notes = [], []
    for place, (row, name, number) in enumerate(zip(rows, names, numbers, strict=True)):
        texts = [f"{figure_text(n)}: {signed(value, 2)}" for n, value in row.values]
        values, places = [value for _, value in row.values], [place] * len(row.values)
        traces.append(marks(values, places, texts, MUTED, marker={"size": 6}, opacity=0.55))
        low, high = (
            (row.interval.low, row.interval.high) if row.interval else (row.estimate, row.estimate)
        )
        fill = row.color if row.is_distinct else PAPER
        look = {"size": 11, "line": {"color": row.color, "width": 2}}
        error = {
            "symmetric": False, "array": [high - row.estimate],
            "arrayminus": [row.estimate - low], "color": row.color, "thickness": 2.5, "width": 0,
        }  # fmt: skip
        text = f"{name}<br>{number}"
        traces.append(marks([row.estimate], [place], [text], fill, marker=look, error_x=error))
        notes.append(
            {"text": f"{name}{between}{number}", "x": 0, "xref": "paper", "xanchor": "left",
             "y": place, "yanchor": "bottom", "yshift": 7, "showarrow": False, "align": "left",
             "font": {"color": INK}}
        )  # fmt: skip
    row_px = 46 if between == "  " else 62
    plot = figure(
        traces, height=70 + row_px * len(rows), annotations=notes, xaxis_title_text=title,
        xaxis_showgrid=True, yaxis_range=[len(rows) - 0.6, -0.85], yaxis_visible=False,
        margin={"l": 8, "r": 8},
    )  # fmt: skip
    if zero:
        plot.add_vline(0, line={"color": MUTED, "width": 1}, layer="below")
        plot.update_xaxes(rangemode="tozero")
    return plot
