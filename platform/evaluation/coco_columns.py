"""Annotations and detections in COCO's format as checked columns of numbers.

Images, categories and annotations are renumbered from 1, images and categories in ascending order
of their ids. So ids may be of any size, or strings, and an annotation with the id 0 counts like any
other. (pycocotools would read a match with it as no match.)
"""

# M entries of a list

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from deta.platform.system.short_list import short_list

Entries = Sequence[Mapping[str, Any]]
# The values of each key, of all entries at once.
VALID: dict[str, TypeAdapter] = {
    "bbox": TypeAdapter(list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]]),
    "area": TypeAdapter(list[FiniteFloat | None]),
    "score": TypeAdapter(list[FiniteFloat]),
}


class Columns(NamedTuple):
    """Boxes of all images as columns. Images and categories are ranks of their ids, from 1."""

    images: np.ndarray  # M int64
    categories: np.ndarray  # M int64
    boxes: np.ndarray  # M 4 float64, xywh in pixels


@dataclass(frozen=True)
class CocoColumns:
    """Ground truth and detections of a data set."""

    image_ids: list[Any]  # by rank - 1
    category_ids: list[Any]  # by rank - 1
    true: Columns  # annotations of listed images and categories, in the order of the file
    true_rows: np.ndarray  # M int64, position of each in the list of annotations
    crowd: np.ndarray  # M bool: `iscrowd`
    areas: np.ndarray  # M, square pixels: the area that makes an annotation small, medium or large
    found: Columns  # detections of listed categories, in the order of the results
    found_rows: np.ndarray  # M int64, position of each in the list of results
    scores: np.ndarray  # M


def read_columns(ground_truth: Mapping[str, Any], results: Entries) -> CocoColumns:
    """Return the entries that count, checked. The arguments are those of `evaluate_detections`.

    Raises:
        ValueError: as for `evaluate_detections`.
    """
    if missing := {"images", "annotations", "categories"} - ground_truth.keys():
        raise ValueError(
            f"the ground truth lacks {sorted(missing)}; is it a COCO annotation file? "
            f"Its keys are {sorted(ground_truth)}"
        )
    # Ranks from 1 in ascending order of ids: COCO orders equal scores by image id.
    images, categories = (
        {key: rank for rank, key in enumerate(sorted({one["id"] for one in entries}), start=1)}
        for entries in (ground_truth["images"], ground_truth["categories"])
    )
    if unknown := {result.get("image_id") for result in results} - images.keys() - {None}:
        raise ValueError(
            f"{len(unknown)} images of the results are not in the ground truth: "
            f"{short_list(sorted(unknown, key=str))}; is this the right annotation file?"
        )
    annotations, true_rows, true = _listed(ground_truth["annotations"], images, categories)
    results, found_rows, found = _listed(results, images, categories)
    areas = _numbers(annotations, "area")  # NaN where an annotation has none
    return CocoColumns(
        image_ids=list(images),
        category_ids=list(categories),
        true=true,
        true_rows=true_rows,
        crowd=np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], bool),
        areas=np.where(np.isnan(areas), true.boxes[:, 2] * true.boxes[:, 3], areas),
        found=found,
        found_rows=found_rows,
        scores=_numbers(results, "score"),
    )


def _listed(
    entries: Entries, images: Mapping[Any, int], categories: Mapping[Any, int]
) -> tuple[Entries, np.ndarray, Columns]:
    """Return the entries whose image and category are listed, their positions and columns."""
    try:
        pairs = [
            (images.get(entry["image_id"], 0), categories.get(entry["category_id"], 0))
            for entry in entries
        ]
    except KeyError as error:
        raise ValueError(f"an entry of {len(entries)} lacks image_id or category_id") from error
    ranks = np.array(pairs, np.int64).reshape(-1, 2)
    rows = np.flatnonzero(ranks.all(axis=1))
    listed = [entries[row] for row in rows.tolist()]
    boxes = _numbers(listed, "bbox").reshape(-1, 4)
    return listed, rows, Columns(ranks[rows, 0], ranks[rows, 1], boxes)


def _numbers(entries: Entries, key: str) -> np.ndarray:
    """Return the values under a key as float64, every number finite."""
    values = [entry.get(key) for entry in entries]
    try:
        return np.array(VALID[key].validate_python(values), np.float64)
    except ValidationError as error:
        wrong = sorted({int(fault["loc"][0]) for fault in error.errors()})
        first = entries[wrong[0]]
        raise ValueError(
            f"{len(wrong)} of {len(entries)} entries have a {key} that is not "
            f"{'4 finite numbers' if key == 'bbox' else 'a finite number'}; the first is of image "
            f"{first['image_id']!r}, category {first['category_id']!r}: {first.get(key)!r}"
        ) from error
