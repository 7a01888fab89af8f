"""Sine encodings against published numbers and the formula."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deta.model.position import encode_boxes, encode_pixels

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
CASES = [
    (path, name)
    for path in sorted((SHARED / "parity").glob("*/functions/functions*.safetensors"))
    for name in sorted({key.split(".")[0] for key in load_file(path)})
]


def cases(prefix: str) -> dict:
    """Return the arguments of parametrize for every shared case with this prefix."""
    chosen = [case for case in CASES if case[1].startswith(prefix)]
    return {
        "argnames": ("path", "name"),
        "argvalues": chosen,
        "ids": [f"{path.stem}-{name}" for path, name in chosen],
    }


@pytest.mark.parametrize(**cases("posenc"))
def test_parity_of_pixel_encoding(path: Path, name: str, compare):
    case = load_file(path)
    meta = json.loads(path.with_suffix(".json").read_text())["meta"][name]
    found = encode_pixels(case[f"{name}.mask"], 2 * meta["feats_per_axis"])
    compare("functions", "pixel encoding", found.permute(0, 3, 1, 2), case[f"{name}.pos"], 1e-6)


@pytest.mark.parametrize(**cases("box_embed"))
def test_parity_of_box_encoding(path: Path, name: str, compare):
    case = load_file(path)
    expected = case[f"{name}.embed"]
    found = encode_boxes(case[f"{name}.unactivated"].sigmoid(), expected.shape[-1] // 4)
    compare("functions", "box encoding", found, expected, 1e-6)


def test_pixel_encoding_equals_the_formula():
    padding = torch.ones(1, 4, 5, dtype=torch.bool)
    padding[:, :3, :4] = False
    encoded = encode_pixels(padding, 8)
    for row in range(3):
        for column in range(4):
            expected = []
            for position in ((row + 0.5) / 3, (column + 0.5) / 4):
                for wavelength in (1.0, 10_000**0.5):
                    angle = 2 * math.pi * position / wavelength
                    expected += [math.sin(angle), math.cos(angle)]
            # 1e-6 is added to the count of valid pixels.
            torch.testing.assert_close(
                encoded[0, row, column], torch.tensor(expected), atol=1e-5, rtol=0
            )


def test_more_padding_does_not_move_a_pixel():
    padding = torch.zeros(1, 3, 4, dtype=torch.bool)
    wider = torch.nn.functional.pad(padding, (0, 5, 0, 2), value=True)
    assert torch.equal(encode_pixels(wider, 16)[:, :3, :4], encode_pixels(padding, 16))


def test_box_encoding_is_the_pixel_encoding_of_its_centre():
    padding = torch.zeros(1, 10, 10, dtype=torch.bool)
    y, x = 3, 7
    box = torch.tensor([[[(x + 0.5) / 10, (y + 0.5) / 10, 0.2, 0.3]]])
    encoded = encode_boxes(box, 16)[0, 0]
    pixel = encode_pixels(padding, 32)[0, y, x]
    torch.testing.assert_close(encoded[:16], pixel[16:], atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded[16:32], pixel[:16], atol=1e-5, rtol=0)
