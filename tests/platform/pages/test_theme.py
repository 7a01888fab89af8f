"""The colours can be read on their ground, on light pages and on dark ones."""

from __future__ import annotations

import re

import pytest

from deta.platform.pages.figures import COLORS
from deta.platform.pages.render import read_asset

PAIRS = re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\);", read_asset("pages/theme.css"))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_colours_can_be_read_on_their_ground(place: int):
    palette = {name: colors[place] for name, *colors in PAIRS}

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(palette[a]), luminance(palette[b])))
        return (high + 0.05) / (low + 0.05)

    assert contrast("ink", "paper") > 7
    assert contrast("muted", "paper") > 4.5  # WCAG 2.2, text
    for i in range(len(COLORS)):
        assert contrast(f"c{i}", "paper") > 4.5


def test_boxes_have_colours_of_the_light_theme():
    light = {name: color for name, color, _ in PAIRS}
    kinds = re.search(r"\.shot, \.key \{(.*)\}", read_asset("pages/images.css"))
    assert kinds is not None
    assert dict(re.findall(r"--(\w+): (#\w{6});", kinds[1])) == {
        "right": light["c2"], "wrong": light["c1"], "missed": light["c3"],
    }  # fmt: skip
