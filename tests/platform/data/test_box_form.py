"""Test `box_form.py`: boxes in other forms are recognised, and those of COCO never."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from deta.platform.data.box_form import box_form_warning

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
REAL = sorted(SHARED.glob("data/*/annotations/instances_*.json"))


def boxes(seed: int, count: int = 60, *, share: float = 0.45) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes inside their images, xywh, and the sizes of these."""
    rng = np.random.default_rng(seed)
    size_px = rng.integers(80, 700, (count, 2))
    sides = np.maximum(4, size_px[:, ::-1] * rng.uniform(0.05, share, (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (size_px[:, ::-1] - sides)
    return np.concatenate([corner, sides], axis=1).round(1), size_px


def corners(b: np.ndarray) -> np.ndarray:
    return np.concatenate([b[:, :2], b[:, :2] + b[:, 2:]], axis=1)


def centres(b: np.ndarray) -> np.ndarray:
    return np.concatenate([b[:, :2] + b[:, 2:] / 2, b[:, 2:]], axis=1)


FORMS = {
    "x1 y1 x2 y2": lambda b, _: corners(b),
    "y1 x1 y2 x2": lambda b, _: corners(b)[:, [1, 0, 3, 2]],
    "y, x, height, width": lambda b, _: b[:, [1, 0, 3, 2]],
    "centre x, centre y": lambda b, _: centres(b),
    "normalised": lambda b, size_px: b / size_px[:, [1, 0, 1, 0]],
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count", [6, 60, 2000])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_named_with_numbers(form: str, count: int, seed: int) -> None:
    bbox, size_px = boxes(seed, count)
    areas = bbox[:, 2] * bbox[:, 3] * 0.7  # of a mask

    said = box_form_warning(FORMS[form](bbox, size_px), areas, size_px)

    if said is None and count == 6:  # so few boxes may lie where every form fits
        assert form not in ("x1 y1 x2 y2", "normalised")
        return
    assert said is not None
    assert f"of {count} boxes" in said
    assert form in said or count == 6


def test_normalised_centres_and_corners_are_normalised() -> None:
    bbox, size_px = boxes(0)
    for change in (corners, centres):
        said = box_form_warning(
            change(bbox / size_px[:, [1, 0, 1, 0]]), np.ones(len(bbox)), size_px
        )
        assert said is not None
        assert "60 of 60" in said
        assert "normalised" in said


def test_corners_of_boxes_that_do_not_overhang_are_told_by_their_areas() -> None:
    bbox, size_px = boxes(1)
    bbox = bbox / 5  # near the upper left corner
    areas = bbox[:, 2] * bbox[:, 3]

    assert box_form_warning(bbox, areas, size_px) is None
    said = box_form_warning(corners(bbox), areas, size_px)
    assert said is not None
    assert "x1 y1 x2 y2" in said


def test_percent_of_the_image_is_told() -> None:
    bbox, size_px = boxes(2)
    size_px += 200
    said = box_form_warning(bbox / size_px[:, [1, 0, 1, 0]] * 100, np.ones(60), size_px)
    assert said is not None
    assert "percent" in said


def test_boxes_of_larger_images_are_told() -> None:
    bbox, size_px = boxes(3)
    said = box_form_warning(bbox * 3, np.ones(60), size_px)
    assert said is not None
    assert "another size" in said or "x1 y1" in said


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.1, 0.45, 1.0])
@pytest.mark.parametrize("count", [1, 2, 6, 60, 2000])
def test_boxes_inside_their_images_give_no_warning(share: float, count: int, seed: int) -> None:
    bbox, size_px = boxes(seed, count, share=share)
    areas = bbox[:, 2] * bbox[:, 3]
    assert box_form_warning(bbox, areas, size_px) is None
    assert box_form_warning(bbox, areas * 0.6, size_px) is None
    bbox[0, 2:] += 30  # one sloppy box
    assert count < 10 or box_form_warning(bbox, areas, size_px) is None


@pytest.mark.parametrize("seed", range(10))
def test_large_sloppy_boxes_are_not_taken_for_corners(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size_px = rng.integers(200, 700, (100, 2))
    low, high = rng.uniform(-0.02, 0.1, (100, 2)), rng.uniform(0.9, 1.02, (100, 2))
    bbox = np.concatenate([low, high - low], axis=1) * size_px[:, [1, 0, 1, 0]]

    said = box_form_warning(bbox, bbox[:, 2] * bbox[:, 3], size_px)

    assert said is None or "another size" in said


def test_no_boxes_give_no_warning() -> None:
    assert box_form_warning(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 2), int)) is None


@pytest.mark.parametrize("path", REAL, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_published_data_set_gives_no_warning_also_in_parts(path: Path) -> None:
    coco = json.loads(path.read_text(encoding="utf-8"))
    size_of = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    own = [a for a in coco["annotations"] if not a.get("iscrowd")]
    images = sorted({a["image_id"] for a in own})
    for chosen in (images, *([image] for image in images), images[:5], images[-5:]):
        part = [a for a in own if a["image_id"] in set(chosen)]
        assert (
            box_form_warning(
                np.array([a["bbox"] for a in part], float),
                np.array([a["area"] for a in part], float),
                np.array([size_of[a["image_id"]] for a in part]),
            )
            is None
        )
