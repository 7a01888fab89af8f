"""Build plotly figures from shared parts: colours of series, points, lines, labels, forest plots.

Figures are plotly's JSON form as plain dictionaries. A colour is a name in the page's palette
(`theme.py`). A text that a person chose goes through `figure_text` first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deta.platform.pages.number_format import Interval, common_decimals, interval_text, signed
from deta.platform.pages.safe_text import figure_text
from deta.platform.pages.theme import NUM_COLORS, NUM_STEPS

LETTERS_WIDE, LETTERS_NARROW = 56, 46  # of a name in a forest plot
ROW_PX, NARROW_ROW_PX = 34, 50

Trace = dict[str, Any]
Plot = dict[str, Any]  # {"data": [...], "layout": {...}}

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
LABEL_PX = 16  # height of a label with its part of the gap
LETTER_PX = 7.6  # about the width of a letter of a label, in DejaVu Sans, the widest usual font
MAX_LETTERS = 34
LOG_RATIO = 20  # positive numbers with a larger ratio get a logarithmic axis


def color_of(index: int) -> str:
    """Return the colour of a series."""
    return f"@c{index % NUM_COLORS}"


def band_of(index: int) -> str:
    """Return the translucent colour of a series."""
    return f"@b{index % NUM_COLORS}"


def dash_of(index: int) -> str:
    return DASHES[index // NUM_COLORS % len(DASHES)]


def symbol_of(index: int) -> str:
    return SYMBOLS[index % len(SYMBOLS)]


def step_color(share: float) -> str:
    """Return the colour of a quantity; 0 is pale, 1 strong."""
    return f"@s{round(min(1.0, max(0.0, share)) * (NUM_STEPS - 1))}"


def shortened(name: str, letters: int = MAX_LETTERS) -> str:
    """Return a name for a label, cut with an ellipsis if it is long."""
    return figure_text(name if len(name) <= letters else name[: letters - 1] + "…")


def label_px(names: Sequence[str], letters: int = MAX_LETTERS) -> int:
    """Return the width that labels beside a figure need."""
    longest = max((min(len(name), letters) for name in names), default=0)
    return round(longest * LETTER_PX) + 16


def points(
    x: Sequence[Any],
    y: Sequence[Any],
    *,
    color: str,
    symbol: str = "circle",
    size: float = 9,
    is_hollow: bool = False,
    opacity: float = 1.0,
    texts: Sequence[str] = (),
    axes: int = 1,
) -> Trace:
    """Return marks; `texts` (already made safe) appear under the pointer."""
    return _on(axes) | {
        "type": "scatter",
        "mode": "markers",
        "x": list(x),
        "y": list(y),
        "opacity": opacity,
        "marker": {
            "color": "@paper" if is_hollow else color,
            "symbol": symbol,
            "size": size,
            "line": {"color": color, "width": 2 if is_hollow else 0},
        },
        **_hover(texts),
    }


def line(
    x: Sequence[Any],
    y: Sequence[Any],
    *,
    color: str,
    width: float = 2,
    dash: str = "solid",
    opacity: float = 1.0,
    texts: Sequence[str] = (),
    axes: int = 1,
    **shape: str,
) -> Trace:
    """Return a line through points. `shape="hv"` makes it a staircase."""
    return _on(axes) | {
        "type": "scatter",
        "mode": "lines",
        "x": list(x),
        "y": list(y),
        "opacity": opacity,
        "line": {"color": color, "width": width, "dash": dash, **shape},
        **_hover(texts),
    }


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], *, color: str, axes: int = 1
) -> Trace:
    """Return the area between two lines."""
    return _on(axes) | {
        "type": "scatter",
        "mode": "lines",
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": color,
        "line": {"width": 0},
        "hoverinfo": "skip",
    }


def label(
    text: str, x: Any, y: Any, *, color: str = "@ink", anchor: str = "left", **more: Any
) -> dict[str, Any]:
    """Return text in a figure, in the units of its axes unless `more` has others."""
    return {
        "text": text,
        "x": x,
        "y": y,
        "xanchor": anchor,
        "yanchor": "middle",
        "showarrow": False,
        "align": "left",
        "font": {"color": color, "size": 13},
        **more,
    }


def rule(*, x: float | None = None, y: float | None = None, dash: str = "solid") -> dict[str, Any]:
    """Return a line across the figure at one value."""
    across = {"x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1}
    along = {"y0": y, "y1": y, "xref": "paper", "x0": 0, "x1": 1}
    return {
        "type": "line",
        "layer": "between",
        "line": {"color": "@muted", "width": 1, "dash": dash},
        **(across if x is not None else along),
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis of a layout."""
    return {"title": {"text": title}, **more}


def spread(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """Return heights of labels, as near to their own as `gap` between any two allows."""
    order = sorted(heights, key=lambda name: heights[name])
    groups: list[tuple[list[str], float]] = []  # names, and the middle of them
    for name in order:
        names, middle = [name], heights[name]
        while groups:
            above, centre = groups[-1]
            if middle - centre >= gap * (len(names) + len(above)) / 2:
                break
            groups.pop()
            total = len(above) + len(names)
            middle = (centre * len(above) + middle * len(names)) / total
            names = above + names
        groups.append((names, middle))
    return {
        name: middle + gap * (place - (len(names) - 1) / 2)
        for names, middle in groups
        for place, name in enumerate(names)
    }


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """Return the range of an axis that shows the values with some space around them."""
    low, high = min(values), max(values)
    air = (high - low) * share or max(abs(high), 1.0) * 0.05
    return low - air, high + air


def _on(axes: int) -> Trace:
    return {} if axes == 1 else {"xaxis": f"x{axes}", "yaxis": f"y{axes}"}


def _hover(texts: Sequence[str]) -> Trace:
    if not texts:
        return {"hoverinfo": "skip"}
    return {"hoverinfo": "text", "hovertext": list(texts)}


@dataclass(frozen=True)
class ForestRow:
    """One estimate with its interval."""

    name: str
    estimate: float
    interval: Interval | None
    values: tuple[tuple[str, float], ...] = ()  # that it is the mean of, each with its name
    is_distinct: bool = False  # differs from zero after correction; drawn filled
    color: str = "@c0"


def forest(rows: Sequence[ForestRow], title: str, *, zero: bool, narrow: bool) -> Plot:
    """Plot estimates below one another, each with its interval and the values it comes from."""
    data: list[Trace] = []
    notes, numbers = [], []
    decimals = common_decimals([row.interval.half_width for row in rows if row.interval])
    shown = [0.0] * zero
    for place, row in enumerate(rows):
        number = interval_text(row.estimate, row.interval, decimals)
        numbers.append(number)
        shown += [row.estimate, *(value for _, value in row.values)]
        shown += [row.interval.low, row.interval.high] if row.interval else []
        data += _forest_marks(row, place, number)
        if narrow:
            name = f"{shortened(row.name, LETTERS_NARROW)}<br>{number}"
            notes.append(label(name, 0, place, xref="paper", yanchor="bottom", yshift=7))
        else:
            notes.append(label(number, 1, place, xref="paper", xshift=14))
    names = [row.name for row in rows]
    row_px = NARROW_ROW_PX + 12 if narrow else ROW_PX
    sides_px = {"l": label_px(names, LETTERS_WIDE), "r": 14 + label_px(numbers)}
    layout = {
        "height": 70 + row_px * len(rows),
        "margin": {"l": 4, "r": 8} if narrow else sides_px,
        "xaxis": axis(title, showgrid=True, range=list(padded(shown))),
        "yaxis": {
            "range": [len(rows) - 0.5, -0.85 if narrow else -0.5],
            "tickvals": list(range(len(rows))),
            "ticktext": [shortened(name, LETTERS_WIDE) for name in names],
            "tickfont": {"color": "@ink", "size": 13},
            "showticklabels": not narrow,
            "ticks": "",
            "showline": False,
            "showgrid": False,
            "fixedrange": True,
        },
        "shapes": [rule(x=0)] if zero else [],
        "annotations": notes,
    }
    return {"data": data, "layout": layout}


def _forest_marks(row: ForestRow, place: int, number: str) -> list[Trace]:
    """Return the values of a row, its interval, and its estimate on top."""
    data: list[Trace] = []
    if row.values:
        texts = [f"{figure_text(name)}: {signed(value, 2)}" for name, value in row.values]
        values = [value for _, value in row.values]
        places = [place] * len(row.values)
        data.append(points(values, places, color="@muted", size=6, opacity=0.55, texts=texts))
    if row.interval is not None:
        ends = [row.interval.low, row.interval.high]
        data.append(line(ends, [place, place], color=row.color, width=2.5))
    data.append(
        points(
            [row.estimate],
            [place],
            color=row.color,
            is_hollow=not row.is_distinct,
            size=11,
            texts=[f"{figure_text(row.name)}<br>{number}"],
        )
    )
    return data
