"""The colours of pages and figures, for the light and the dark scheme.

Six colours are distinguishable with any colour vision (after Okabe and Ito 2008). The light ones
are darkened for a white page and the dark ones lightened for a black one, so that each can be read
on its ground. Nine steps of one hue show quantities. `theme.css` has the same colours.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#59616b",
    "rule": "#dfe2e6",
    "shade": "#f5f6f8",
    "shadow": "#d5d9de",
    "accent": "#0a5c9e",
    "c0": "#0067a8",
    "c1": "#c2500a",
    "c2": "#00775c",
    "c3": "#a5407e",
    "c4": "#866600",
    "c5": "#4a5568",
}
DARK = {
    "paper": "#14171a",
    "ink": "#e8eaed",
    "muted": "#a3abb5",
    "rule": "#333940",
    "shade": "#1d2125",
    "shadow": "#000000",
    "accent": "#7cc0f5",
    "c0": "#62b4f2",
    "c1": "#ff9657",
    "c2": "#3fc89d",
    "c3": "#e796cb",
    "c4": "#dcb63c",
    "c5": "#a9b4c4",
}
NUM_COLORS = 6
NUM_STEPS = 9
BAND_ALPHA = 0.16


def _palette(colors: dict[str, str], pale: str, strong: str) -> dict[str, str]:
    """Return the colours, their translucent forms (b0, b1, ...) and the steps (s0 ... s8)."""
    bands = {
        f"b{i}": "rgba({}, {}, {}, {})".format(*_rgb(colors[f"c{i}"]), BAND_ALPHA)
        for i in range(NUM_COLORS)
    }
    ends = list(zip(_rgb(pale), _rgb(strong), strict=True))
    steps = {
        f"s{i}": "rgb({}, {}, {})".format(
            *(round(a + (b - a) * i / (NUM_STEPS - 1)) for a, b in ends)
        )
        for i in range(NUM_STEPS)
    }
    return colors | bands | steps


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


PALETTES = {
    "light": _palette(LIGHT, "#c3d3e2", "#003e75"),
    "dark": _palette(DARK, "#3b4a5a", "#a8dcff"),
}
