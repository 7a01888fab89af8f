"""The colours can be read on their ground, and the style sheets have the same ones."""

from __future__ import annotations

import re

import pytest

from deta.platform.pages.render import read_asset
from deta.platform.pages.theme import DARK, LIGHT, NUM_COLORS, NUM_STEPS, PALETTES


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_read_on_their_ground(palette: dict[str, str]):
    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(palette[a]), luminance(palette[b])))
        return (high + 0.05) / (low + 0.05)

    assert contrast("ink", "paper") > 7
    assert contrast("muted", "paper") > 4.5  # WCAG 2.2, text
    for i in range(NUM_COLORS):
        assert contrast(f"c{i}", "paper") > 4.5  # they are the colours of labels too


def test_the_style_sheets_have_the_same_colours():
    blocks = re.findall(r":root \{([^}]*)\}", read_asset("pages/theme.css"))
    found = [dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in blocks]
    assert found == [LIGHT, DARK, LIGHT]  # on a screen, on a dark one, and printed
    kinds = re.search(r"\.shot, \.key \{(.*)\}", read_asset("pages/slideshow.css"))
    assert kinds is not None
    assert dict(re.findall(r"--(\w+): (#\w{6});", kinds[1])) == {
        "right": LIGHT["c2"], "wrong": LIGHT["c1"], "missed": LIGHT["c3"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["light", "dark"])
def test_a_palette_has_bands_and_steps(name: str):
    assert PALETTES[name]["b0"].startswith("rgba(")
    assert len({PALETTES[name][f"s{i}"] for i in range(NUM_STEPS)}) == NUM_STEPS
