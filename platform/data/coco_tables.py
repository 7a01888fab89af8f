"""Convert checked COCO lists to two flat tables: a row per image and a row per annotation.

Arrays are used instead of objects because they pickle fast, and because they have no reference
counts, whose updates would copy a forked worker's memory page by page.
"""

# I images   A annotations of all images

from __future__ import annotations

import sys
from collections import Counter
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from deta.platform.data.box_form import box_form_warning
from deta.platform.data.coco_annotations import WARNING, CocoFile, DatasetError, records_note

MIN_SIDE_PX = 0.01  # smaller is rounding noise: float32 has steps of 0.0005 at 4096 px

IMAGE_ROW = np.dtype(
    [
        ("id", "<i8"),
        ("height", "<i8"),
        ("width", "<i8"),
        ("num_bytes", "<i8"),
        ("start", "<i8"),  # its annotations are rows start .. end - 1
        ("end", "<i8"),
    ]
)
ANNOTATION_ROW = np.dtype(
    [
        ("bbox", "<f8", 4),  # x, y, width, height in pixels, as in the file
        ("area", "<f8"),
        ("label", "<i8"),  # class index
        ("crowd", "?"),
        ("box_px", "<f4", 4),  # xyxy, clipped to the image
        ("target", "?"),  # true: a training box
    ]
)


class CocoTables(NamedTuple):
    """All images, sorted by id, and their annotations; do not modify."""

    file_names: list[str]  # I
    images: np.ndarray  # I rows of IMAGE_ROW
    annotations: np.ndarray  # A rows of ANNOTATION_ROW, sorted by image

    def take(self, chosen: list[int]) -> CocoTables:
        """Return the tables of some images, given their indices in rising order."""
        images = self.images[chosen]
        rows = [self.annotations[image["start"] : image["end"]] for image in images]
        set_ranges(images, images["end"] - images["start"])
        return CocoTables([self.file_names[i] for i in chosen], images, np.concatenate(rows))


def training_boxes(
    bbox: np.ndarray, size_px: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Clip boxes to their images, and find those that cannot be trained on.

    Args:
        bbox: A 4 float64, x, y, width, height in pixels.
        size_px: A 2, (height, width) of each box's image.

    Returns:
        A 4 float32, xyxy, clipped; and for each reason to drop a box an A bool mask. A box has
        at most one reason.
    """
    low = np.zeros(2)
    high = size_px[:, ::-1]  # A 2, (width, height)
    with np.errstate(over="ignore"):  # infinity is clipped like any other value
        top_left = np.clip(bbox[:, :2], low, high)
        bottom_right = np.clip(bbox[:, :2] + bbox[:, 2:], low, high)
    boxes_px = np.concatenate([top_left, bottom_right], axis=1).astype(np.float32)

    no_area = (bbox[:, 2:] <= 0).any(axis=1)
    outside = (top_left >= bottom_right).any(axis=1) & ~no_area
    too_narrow = (boxes_px[:, 2:] - boxes_px[:, :2] < MIN_SIDE_PX).any(axis=1)
    return boxes_px, {
        "not trained on: box has no area": no_area,
        "not trained on: box is outside the image": outside,
        f"not trained on: box has a side under {MIN_SIDE_PX} px": too_narrow & ~no_area & ~outside,
    }


def set_training_boxes(rows: np.ndarray, size_px: np.ndarray) -> dict[str, np.ndarray]:
    """Fill `box_px` and `target` of annotation rows, and return the masks of `training_boxes`.

    Args:
        rows: A rows of ANNOTATION_ROW with all other fields.
        size_px: A 2, (height, width) of each box's image.
    """
    rows["box_px"], reasons = training_boxes(rows["bbox"], size_px)
    rows["target"] = ~rows["crowd"] & ~np.logical_or.reduce(list(reasons.values()))
    return reasons


def set_ranges(image_rows: np.ndarray, num_annotations: np.ndarray) -> None:
    """Fill `start` and `end` of image rows, given the number of annotations of each image."""
    image_rows["end"] = np.cumsum(num_annotations)
    image_rows["start"] = image_rows["end"] - num_annotations


def make_tables(
    path: Path,
    coco: CocoFile,
    images: list[dict[str, Any]],
    category_ids: list[int],
    num_bytes: dict[int, int],
) -> tuple[CocoTables, list[str]]:
    """Return the tables of some images, sorted by id, and notes on suspicious records.

    Raises:
        DatasetError: there are boxes, and none of them can be trained on.
    """
    place_of = {image["id"]: place for place, image in enumerate(images)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    annotations = [a for a in coco.annotations if a["image_id"] in place_of]
    places = np.array([place_of[a["image_id"]] for a in annotations], np.int64)  # A
    by_image = np.argsort(places, kind="stable")  # file order within an image
    places = places[by_image]

    image_rows = np.zeros(len(images), IMAGE_ROW)
    image_rows["id"] = [image["id"] for image in images]
    image_rows["height"] = [image["height"] for image in images]
    image_rows["width"] = [image["width"] for image in images]
    image_rows["num_bytes"] = [num_bytes[image["id"]] for image in images]
    set_ranges(image_rows, np.bincount(places, minlength=len(images)))

    rows = np.zeros(len(annotations), ANNOTATION_ROW)
    numbers = chain.from_iterable(a["bbox"] for a in annotations)
    rows["bbox"] = np.fromiter(numbers, np.float64, 4 * len(annotations)).reshape(-1, 4)
    rows["area"] = [a["area"] if "area" in a else _box_area(a["bbox"]) for a in annotations]
    rows["label"] = [label_of[a["category_id"]] for a in annotations]
    rows["crowd"] = [a.get("iscrowd", 0) for a in annotations]
    ids = np.array([a["id"] for a in annotations], np.int64)[by_image]
    rows = rows[by_image]

    size_px = np.stack([image_rows["height"], image_rows["width"]], axis=1)[places]  # A 2
    reasons = set_training_boxes(rows, size_px)

    notes = [
        records_note(path, reason, ids[dropped & ~rows["crowd"]].tolist())
        for reason, dropped in reasons.items()
        if (dropped & ~rows["crowd"]).any()
    ]
    boxes = ~rows["crowd"]
    if boxes.any() and not rows["target"].any():
        raise DatasetError(
            f"{path}: none of its {boxes.sum()} boxes can be trained on:\n  "
            + "\n  ".join(notes)
            + "\nRepair the boxes; COCO has [x, y, width, height] in pixels of the image"
        )
    file_names = [str(PurePosixPath(image["file_name"])) for image in images]
    tables = CocoTables(file_names, image_rows, rows)
    suspicious = []
    if form := box_form_warning(rows["bbox"][boxes], rows["area"][boxes], size_px[boxes]):
        suspicious.append(f"{WARNING}{path}: {form}")
    repeated = _repeated_boxes(rows[boxes], places[boxes])
    if repeated.any():
        what = "of the same class and place as another in the same image; each counts as an object"
        note = records_note(path, what, ids[boxes][repeated].tolist())
        suspicious.append(f"{WARNING}{note}; was a file merged with itself?")
    return tables, suspicious + notes + _warnings(path, coco, image_rows, rows)


def _repeated_boxes(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return which boxes are an earlier one again, up to a tenth of a pixel: A."""
    tenths = np.clip(np.round(rows["bbox"] * 10), -1e15, 1e15).astype(np.int64)
    keys = np.column_stack([places, rows["label"], tenths])
    # Sorting one hash is four times as fast as sorting six columns; what is equal is compared.
    hashes = keys @ np.random.default_rng(0).integers(1 << 62, size=keys.shape[1])  # wraps
    order = np.argsort(hashes, kind="stable")  # of equal boxes, the first one stays first
    repeated = np.zeros(len(rows), bool)
    repeated[order[1:]] = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    return repeated


def _warnings(path: Path, coco: CocoFile, image_rows: np.ndarray, rows: np.ndarray) -> list[str]:
    """Return notes on what is allowed but looks like a mistake."""
    notes = []
    name, count = Counter(category["name"] for category in coco.categories).most_common(1)[0]
    if count > 1:
        notes.append(f"{path}: {count} categories of different ids share the name {name!r}")
    if not rows["target"].any():
        notes.append(f"{path}: has no box to train on, in any of {len(image_rows)} images")
    if any("neg_category_ids" in image for image in coco.images):
        notes.append(
            f"{WARNING}{path}: holds annotations of LVIS, which leave out objects of most classes "
            "of an image: training takes these for background, and AP is not that of LVIS"
        )
    return notes


def _box_area(bbox: list[float]) -> float:
    """Return the area in px² of an annotation without `area`."""
    area = float(max(bbox[2], 0)) * float(max(bbox[3], 0))
    return min(area, sys.float_info.max)
