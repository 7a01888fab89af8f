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

from deta.platform.system.short_list import short_list


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


def read_columns(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> CocoColumns:
    """Return the entries that count, checked. The arguments are those of `evaluate_detections`.

    Raises:
        ValueError: as for `evaluate_detections`.
    """
    if missing := {"images", "annotations", "categories"} - ground_truth.keys():
        raise ValueError(
            f"the ground truth lacks {sorted(missing)}; is it a COCO annotation file? "
            f"Its keys are {sorted(ground_truth)}"
        )
    images, categories = _ranks(ground_truth["images"]), _ranks(ground_truth["categories"])
    annotations = ground_truth["annotations"]
    true_rows = _listed(annotations, images, categories)
    found_rows = _listed(results, images, categories)
    if unknown := {result["image_id"] for result in results} - images.keys():
        raise ValueError(
            f"{len(unknown)} images of the results are not in the ground truth: "
            f"{short_list(sorted(unknown, key=str))}; is this the right annotation file?"
        )
    true_entries = [annotations[row] for row in true_rows]
    found_entries = [results[row] for row in found_rows]
    true = _columns(true_entries, images, categories)
    return CocoColumns(
        image_ids=list(images),
        category_ids=list(categories),
        true=true,
        true_rows=np.array(true_rows, np.int64),
        crowd=np.array([bool(entry.get("iscrowd", 0)) for entry in true_entries], bool),
        areas=_areas(true_entries, true.boxes),
        found=_columns(found_entries, images, categories),
        found_rows=np.array(found_rows, np.int64),
        scores=_numbers(found_entries, "score", 1)[:, 0],
    )


def _ranks(entries: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    """Map each id to its rank, from 1, in ascending order. COCO orders equal scores by image id."""
    return {key: rank for rank, key in enumerate(sorted({one["id"] for one in entries}), start=1)}


def _listed(
    entries: Sequence[Mapping[str, Any]], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> list[int]:
    """Return the positions of entries whose image and category the ground truth lists."""
    for position, entry in enumerate(entries):
        if "image_id" not in entry or "category_id" not in entry:
            raise ValueError(
                f"entry {position} of {len(entries)} lacks image_id or category_id: {entry}"
            )
    return [
        position
        for position, entry in enumerate(entries)
        if entry["image_id"] in images and entry["category_id"] in categories
    ]


def _columns(
    entries: Sequence[Mapping[str, Any]], images: Mapping[Any, int], categories: Mapping[Any, int]
) -> Columns:
    return Columns(
        np.array([images[entry["image_id"]] for entry in entries], np.int64),
        np.array([categories[entry["category_id"]] for entry in entries], np.int64),
        _numbers(entries, "bbox", 4),
    )


def _areas(annotations: Sequence[Mapping[str, Any]], boxes: np.ndarray) -> np.ndarray:
    """Return the area of each annotation: its own (the mask's in COCO), else that of its box."""
    areas = boxes[:, 2] * boxes[:, 3]
    given = [i for i, entry in enumerate(annotations) if entry.get("area") is not None]
    areas[given] = _numbers([annotations[i] for i in given], "area", 1)[:, 0]
    return areas


def _numbers(entries: Sequence[Mapping[str, Any]], key: str, width: int) -> np.ndarray:
    """Return the values under a key: M width, float64, every number finite."""
    if not entries:
        return np.empty((0, width))
    try:
        values = np.array([entry[key] for entry in entries], np.float64)
        if values.shape[1:] == _shape(width) and np.isfinite(values).all():
            return values.reshape(len(entries), width)
    except (KeyError, TypeError, ValueError):
        pass  # the code below finds the entry and names it
    wrong = [entry for entry in entries if not _is_finite(entry.get(key), width)]
    raise ValueError(
        f"{len(wrong)} of {len(entries)} entries have a {key} that is not "
        f"{'a finite number' if width == 1 else f'{width} finite numbers'}; the first is of image "
        f"{wrong[0]['image_id']!r}, category {wrong[0]['category_id']!r}: {wrong[0].get(key)!r}"
    )


def _is_finite(value: Any, width: int) -> bool:
    try:
        numbers = np.array(value, np.float64)
    except (TypeError, ValueError):
        return False
    return numbers.shape == _shape(width) and bool(np.isfinite(numbers).all())


def _shape(width: int) -> tuple[int, ...]:
    return () if width == 1 else (width,)
