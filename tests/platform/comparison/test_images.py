"""Images of a comparison carry the boxes of both models, within their bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deta.platform.comparison import images
from deta.platform.comparison.compare import Comparison
from deta.platform.comparison.images import slides_of
from tests.platform.comparison.cases import compared

__all__ = ["compared"]  # the fixture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        Image.fromarray(np.full((60, 160, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_a_slide_has_both_views_with_boxes_in_shares(compared: Comparison, folder: Path):
    first = slides_of(compared, folder)[0]
    assert (first.title, first.group, first.jpeg.size_px) == ("0.png", "Gained", (160, 60))
    assert [[box.kind for box in boxes] for _, boxes in first.views] == [
        ["right", "missed"], ["right", "right"],
    ]  # fmt: skip
    box = first.views[0][1][1]
    assert (box.left, box.width, box.is_strong) == (100 / 160, 40 / 160, True)


def test_a_missing_image_is_left_out(compared: Comparison, folder: Path):
    (folder / "1.png").unlink()
    assert [slide.title for slide in slides_of(compared, folder)] == ["0.png", "2.png", "3.png"]
    assert slides_of(compared, None) == []


def test_images_stop_at_their_limit(
    compared: Comparison, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    one = len(slides_of(compared, folder)[0].jpeg.content)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 3 * one)
    groups = [slide.group for slide in slides_of(compared, folder)]
    assert groups == ["Gained", "Lost"]  # half of the bytes are for images that are lost
