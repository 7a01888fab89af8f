"""COCO box metrics: the twelve numbers of COCO, and AP by category."""

# N detections of one image   K categories
# T IoU thresholds   R recall thresholds   A area ranges   D limits on detections per image

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deta.platform.evaluation.coco_columns import read_columns
from deta.platform.evaluation.coco_engines import evaluated
from deta.platform.run.config import Engine
from deta.platform.system.short_list import short_list

if TYPE_CHECKING:
    from deta.model.postprocess import Detections
    from deta.platform.data.coco_dataset import Category

ALL, SMALL, MEDIUM, LARGE = range(4)  # area ranges, split at 32² and 96² pixels (COCO)
TOP100 = 2  # of the limits 1, 10 and 100 on detections per image and category (COCO)
AP50_INDEX, AP75_INDEX = 0, 5  # in the IoU thresholds 0.50, 0.55, ... 0.95
TABLE_WIDTH = 100  # characters


@dataclass(frozen=True)
class CocoMetrics:
    """The twelve COCO numbers, in 0..1, and -1 where there is no box to find.

    APs, APm, APl and their recalls count boxes of up to 32², 96² and more pixels. AR1, AR10 and
    AR100 count that many detections per image and category.

    Source: https://cocodataset.org/#detection-eval, and summarize() in pycocotools.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    ap_per_category: dict[int, float]
    """By category id, in 0..1. A category without a box to find is left out."""

    def as_dict(self) -> dict[str, float]:
        """Return the twelve numbers by name, in 0..1, -1 where undefined."""
        return {name: value for name, value in vars(self).items() if name != "ap_per_category"}

    def percent(self) -> dict[str, float]:
        """Return the twelve numbers in 0..100; undefined ones are left out."""
        return {name: 100 * value for name, value in self.as_dict().items() if value >= 0}

    def table(self, categories: Iterable[Category]) -> str:
        """Return a text for the terminal: the twelve numbers and the AP of each category, 0..100.

        Args:
            categories: the rows, in this order. A category without a box to find shows "-".
        """
        cells = [f"{name:<6}{percent_text(value):>5}" for name, value in self.as_dict().items()]
        lines = ["   ".join(cells[:6]), "   ".join(cells[6:])]
        names = [(one.name, self.ap_per_category.get(one.id)) for one in categories]
        if names:
            width = min(24, max(len(name) for name, _ in names))
            rows = [f"{name:<{width}.24} {percent_text(ap):>5}" for name, ap in names]
            num_columns = max(1, min(TABLE_WIDTH // (width + 9), -(-len(rows) // 4)))
            num_lines = -(-len(rows) // num_columns)
            lines += ["", "AP by category"]
            lines += ["   ".join(rows[line::num_lines]) for line in range(num_lines)]
        return "\n".join(lines)


def percent_text(value: float | None) -> str:
    """Return a metric in percent, such as "43.7"; "-" where it is not defined."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def evaluate_detections(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    engine: Engine = "hotcoco",
) -> CocoMetrics:
    """Return the box AP and AR of detections, with the numbers of pycocotools.

    Args:
        ground_truth: a COCO dict: `images`, `annotations` and `categories`. An annotation's own
            `area` (that of its mask in COCO) makes it small, medium or large; if it has none, the
            area of its box does. `iscrowd` regions are ignored; other `ignore` keys have no effect.
            Annotations of images or categories that are not listed do not count.
        results: COCO results, each with `image_id`, `category_id`, `bbox` (xywh in pixels) and
            `score`. Of equal scores, the earlier one counts first. Detections of categories that
            are not listed do not count. Up to 100 count per image and category.
        engine: the program that matches; the numbers do not depend on it.

    Returns:
        All numbers 0 if there are no results, and -1 where there is no box to find.

    Raises:
        ValueError: a result for an image that is not in the ground truth, which usually means
            the wrong annotation file (pycocotools refuses it too); a key is missing; a score or
            a coordinate is not finite.
    """
    columns = read_columns(ground_truth, results)
    evaluation = evaluated(columns, engine)
    # K T R, -1 where a category has no box
    precision = np.moveaxis(evaluation.eval["precision"][..., ALL, TOP100], 2, 0)
    by_category = zip(columns.category_ids, precision.mean(axis=(1, 2)).tolist(), strict=True)
    numbers = [*evaluation.stats.tolist(), {key: ap for key, ap in by_category if ap >= 0}]
    return CocoMetrics(*numbers)


def to_coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the detections of one image as entries of a COCO results list.

    Args:
        detections: scores N, labels N (class indices), boxes_px N 4, xyxy.
        image_id: the image's id in the annotation file.
        category_ids: the category id of each class index, in ascending order in this project.

    Raises:
        ValueError: a label has no category, so the model has more classes than the data set.
    """
    labels = detections.labels.tolist()
    if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
        raise ValueError(
            f"image {image_id}: detections carry class indices {min(labels)} to {max(labels)}, but "
            f"there are {len(category_ids)} categories; is the model one for this data set?"
        )
    boxes = detections.boxes_px.detach().cpu().double()  # N 4, xyxy
    boxes[:, 2:] -= boxes[:, :2].clone()  # N 4, xywh
    return [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for label, box, score in zip(
            labels, boxes.tolist(), detections.scores.tolist(), strict=True
        )
    ]


def merge_shards(
    shards: Sequence[Mapping[int, Sequence[Mapping[str, Any]]]], image_ids: Iterable[int]
) -> list[dict[str, Any]]:
    """Merge the results of several workers into one list, with every image in it once.

    A shard maps the id of each image that a worker evaluated to its results. An image without
    detections has an empty list there. If several shards hold an image, as after a sampler has
    padded them to equal length, the results of the first one count: with all of them, each
    detection but one would be a false positive.

    Args:
        shards: one per worker, in order of rank.
        image_ids: the images that must be there, and the order of the merged list.

    Raises:
        RuntimeError: an image is in no shard, or a shard holds an image that is not in `image_ids`.
    """
    merged: dict[int, Sequence[Mapping[str, Any]]] = {}
    for shard in reversed(shards):
        merged |= shard
    wanted = dict.fromkeys(image_ids)
    if missing := [image_id for image_id in wanted if image_id not in merged]:
        raise RuntimeError(
            f"{len(missing)} of {len(wanted)} images were evaluated by none of {len(shards)} "
            f"workers: {short_list(missing)}; AP would be too low; look for a worker that stopped"
        )
    if unknown := [image_id for image_id in merged if image_id not in wanted]:
        raise RuntimeError(
            f"workers evaluated {len(unknown)} images that are not in this data set: "
            f"{short_list(unknown)}; do all of them read the same annotation file?"
        )
    return [dict(result) for image_id in wanted for result in merged[image_id]]
