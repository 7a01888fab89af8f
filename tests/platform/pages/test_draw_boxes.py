"""Test `draw_boxes.py`: boxes and names are drawn where they belong, and nothing else changes."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.pages.draw_boxes import (
    colour_of,
    contact_sheet,
    draw_detections,
    write_validation_sheet,
)

NAMES = ["disc", "Käse 猫 🐈", "a very long name " * 20]


def grey(width: int = 128, height: int = 96) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 90, 90))


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Return H W, true where two images differ."""
    return (np.asarray(before) != np.asarray(after)).any(axis=2)


@pytest.mark.parametrize("size", [(128, 96), (1000, 700)])
def test_a_box_is_drawn_along_its_edges_and_the_input_stays_as_it_was(
    size: tuple[int, int],
) -> None:
    image = grey(*size)
    unit = size[0] // 128
    box_px = [30 * unit, 40 * unit, 100 * unit, 90 * unit]
    x1, y1, x2, y2 = box_px

    drawn = draw_detections(
        image, torch.tensor([box_px]).float(), torch.tensor([0]), torch.tensor([0.5]), NAMES
    )

    assert drawn.size == size
    assert not changed(image, grey(*size)).any()
    different = changed(image, drawn)
    assert different[y1:y2, x1].all()
    assert different[y1:y2, x2 - 1].all()
    assert different[y2 - 1, x1:x2].all()
    assert not different[y1 + 10 * unit : y2 - 10 * unit, x1 + 10 * unit : x2 - 10 * unit].any()
    assert not different[:, x2:].any()  # the text is shorter than the box
    assert not different[y2:].any()
    assert drawn.getpixel((x2 - 1, y2 - 20)) == colour_of(0)


def test_dashes_cover_a_part_of_each_edge() -> None:
    drawn = draw_detections(grey(), [[10, 30, 110, 90]], [0], None, NAMES, dashed=True)

    for edge in (changed(grey(), drawn)[89, 10:110], changed(grey(), drawn)[30:90, 109]):
        assert 0.3 < edge.mean() < 0.8


def test_no_detections_change_nothing() -> None:
    drawn = draw_detections(grey(), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), NAMES)

    assert not changed(grey(), drawn).any()
    assert not changed(grey(), draw_detections(grey(), [], [], None, NAMES)).any()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (64, 64)])
def test_any_box_name_and_image_can_be_drawn(mode: str, size: tuple[int, int]) -> None:
    image = Image.new(mode, size)
    width, height = size
    boxes_px = np.array(
        [
            [-50, -50, -10, -10],
            [width + 5, height + 5, width + 50, height + 50],
            [-1e9, -1e9, 1e9, 1e9],
            [3, 3, 3, 3],
            [9, 9, 2, 2],
            [0, 0, width, height],
            [np.nan, 0, np.inf, 5],
        ]
    )

    drawn = draw_detections(image, boxes_px, [0, 1, 2, 1, 2, 99, -1], [0.5] * 7, NAMES)

    assert drawn.size == size
    assert drawn.mode == "RGB"


@pytest.mark.parametrize("corner", [(0, 0), (112, 0), (0, 84), (112, 84)])
def test_the_whole_text_is_in_the_image_wherever_the_box_is(corner: tuple[int, int]) -> None:
    x, y = corner
    box_px = [x, y, x + 16, y + 12]

    in_corner = draw_detections(grey(), [box_px], [0], [0.5], NAMES)
    in_middle = draw_detections(grey(), [[56, 42, 72, 54]], [0], [0.5], NAMES)

    def letters(drawn: Image.Image) -> int:
        return int((np.asarray(drawn).sum(axis=2) < 60).sum())  # black ink on a bright patch

    assert letters(in_corner) == pytest.approx(letters(in_middle), rel=0.02)
    assert letters(in_corner) > 20


def test_two_boxes_at_one_place_have_their_texts_beside_each_other() -> None:
    image, box_px = grey(400, 300), [100, 100, 200, 200]

    drawn = draw_detections(image, [box_px, box_px], [0, 3], [0.9, 0.8], ["disc"] * 4)

    pixels = np.asarray(drawn)
    for label in (0, 3):
        assert (pixels == colour_of(label)).all(axis=2).sum() > 300


def test_numbers_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="1 boxes, 2 labels"):
        draw_detections(grey(), [[0, 0, 1, 1]], [0, 1], None, NAMES)


def test_neighbouring_classes_have_different_colours() -> None:
    colours = [colour_of(label) for label in range(24)]

    assert len(set(colours)) == 24
    for one, other in pairwise(colours):
        assert np.abs(np.subtract(one, other)).max() > 90


@pytest.mark.parametrize("columns", [1, 2, 5])
@pytest.mark.parametrize("size", [(128, 96), (96, 128), (1000, 750), (3000, 40)])
def test_a_sheet_has_room_for_every_image(columns: int, size: tuple[int, int]) -> None:
    cells = [(grey(*size), ["Bild é 猫" * 20, "b"])] * 3
    legend = [(f"class {label} 猫", colour_of(label)) for label in range(12)]

    sheet = np.asarray(contact_sheet(cells, columns, ["one", "two"], legend))

    assert (sheet == 90).all(axis=2).sum() == 3 * size[0] * size[1]
    for _, colour in legend:
        assert (sheet == colour).all(axis=2).any()


def test_a_sheet_of_a_data_set_is_written_with_and_without_detections(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "shapes", num_train=1, num_val=5)
    dataset = CocoDataset.open(shapes.val_images, shapes.val_annotations)
    annotations = json.loads(shapes.val_annotations.read_text())["annotations"]
    results = [{**annotation, "score": 0.9} for annotation in annotations]
    with_boxes, without = tmp_path / "new" / "with.png", tmp_path / "new" / "without.png"

    write_validation_sheet(with_boxes, dataset, results, num_images=3)
    write_validation_sheet(without, dataset, [], num_images=3)
    write_validation_sheet(tmp_path / "all.png", dataset, results, num_images=100)
    high = tmp_path / "high.png"
    write_validation_sheet(high, dataset, results, num_images=3, score_threshold=0.95)

    with Image.open(with_boxes) as one, Image.open(without) as other:
        assert one.size == other.size
        different = changed(one, other)
        assert different[:, one.width // 2 :].any()
        with Image.open(tmp_path / "all.png") as larger:
            assert larger.height > one.height
        with Image.open(high) as few:
            right = np.s_[60:-60, one.width // 4 :]
            assert few.size == one.size
            assert changed(one, few)[right].any()
    assert sorted(path.name for path in with_boxes.parent.iterdir()) == ["with.png", "without.png"]
