"""COCO box AP: detections and ground truth to the twelve numbers everybody reports.

The matching is done by hotcoco, whose numbers are those of pycocotools; the tests compare the two.
Everything is renumbered before it is handed over, images and categories in ascending order of
their ids and annotations from 1. So ids may be of any size, or strings, and an annotation whose
id is 0 counts like any other, where pycocotools would take a match with it for none.
"""

# N detections of one image   M entries of a list   K categories
# T IoU thresholds   R recall thresholds   A area ranges   D limits on detections per image

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import hotcoco
import numpy as np

from deta.platform.system.short_list import short_list

if TYPE_CHECKING:
    from deta.model.postprocess import Detections
    from deta.platform.data.coco_dataset import Category

ALL, SMALL, MEDIUM, LARGE = range(4)  # area ranges, split at 32² and 96² pixels (COCO)
TOP1, TOP10, TOP100 = range(3)  # detections kept per image and category (COCO)
AP50_INDEX, AP75_INDEX = 0, 5  # in the IoU thresholds 0.50, 0.55, ... 0.95
TABLE_WIDTH = 100  # characters


@dataclass(frozen=True)
class CocoMetrics:
    """The twelve COCO numbers, in 0..1, and -1 where there is no box to find.

    APs, APm, APl and their recalls count boxes of up to 32², 96² and more pixels. AR1, AR10 and
    AR100 keep that many detections per image and category.

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
        """The twelve numbers by name, in 0..1, -1 where undefined."""
        names = [field.name for field in fields(self) if field.name != "ap_per_category"]
        return {name: getattr(self, name) for name in names}

    def percent(self) -> dict[str, float]:
        """The twelve numbers as people quote them, in 0..100; undefined ones are left out."""
        return {name: 100 * value for name, value in self.as_dict().items() if value >= 0}

    def table(self, categories: Iterable[Category]) -> str:
        """A text for the terminal: the twelve numbers, then the AP of each category, in 0..100.

        Args:
            categories: names the rows and gives their order. Those without a box to find show "-".
        """
        cells = [f"{name:<6}{percent_text(value):>5}" for name, value in self.as_dict().items()]
        lines = ["   ".join(cells[:6]), "   ".join(cells[6:])]

        named = [(category.name, self.ap_per_category.get(category.id)) for category in categories]
        if named:
            name_width = min(24, max(len(name) for name, _ in named))
            rows = [f"{name:<{name_width}.24} {percent_text(ap):>5}" for name, ap in named]
            num_columns = max(1, min(TABLE_WIDTH // (name_width + 9), -(-len(rows) // 4)))
            num_lines = -(-len(rows) // num_columns)
            lines += ["", "AP by category"]
            lines += ["   ".join(rows[line::num_lines]) for line in range(num_lines)]
        return "\n".join(lines)


def percent_text(value: float | None) -> str:
    """Return a metric in percent, such as "43.7"; "-" where it is not defined."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


class Columns(NamedTuple):
    """Boxes of all images as columns. Images and categories by rank of their ids, from 1."""

    images: np.ndarray  # M int64
    categories: np.ndarray  # M int64
    boxes: np.ndarray  # M 4 float64, xywh in pixels


@dataclass(frozen=True)
class Matched:
    """True boxes and detections, matched by the rules of COCO."""

    evaluation: hotcoco.COCOeval  # accumulated; knows detection m as id m + 1
    image_ids: list[Any]  # by rank - 1
    category_ids: list[Any]  # by rank - 1
    true: Columns  # annotations of listed images and categories, in the order of the file
    crowd: np.ndarray  # which of them are `iscrowd`
    found: Columns  # detections of listed categories, in the order of the results
    scores: np.ndarray  # of the detections


def evaluate_detections(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> CocoMetrics:
    """Box AP and AR of a list of detections, as pycocotools gives them.

    Args:
        ground_truth: a COCO dict: `images`, `annotations` and `categories`. The area that sorts a
            box into small, medium or large is the annotation's own, its mask's in COCO; only where
            there is none is it that of the box. `iscrowd` regions are ignored, other `ignore`
            keys too. Annotations of images or categories that are not listed are not counted.
        results: COCO results, `image_id`, `category_id`, `bbox` (xywh in pixels) and `score` each.
            Where scores are equal, the earlier one counts first. Detections of categories that
            are not listed are not counted. Up to 100 count per image and category.

    Returns:
        All numbers 0 for no results, and -1 where there is no box to find.

    Raises:
        ValueError: a result for an image that is not in the ground truth, which usually means
            the wrong annotation file (pycocotools refuses it too); a key is missing; a score or
            a coordinate is not finite.
    """
    return metrics_of(match_detections(ground_truth, results))


def match_detections(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]
) -> Matched:
    """Match detections with true boxes, as `evaluate_detections`, and keep who met whom.

    Raises:
        ValueError: as for `evaluate_detections`.
    """
    if missing := {"images", "annotations", "categories"} - ground_truth.keys():
        raise ValueError(
            f"the ground truth lacks {sorted(missing)}; is it a COCO annotation file? "
            f"Its keys are {sorted(ground_truth)}"
        )
    image_ranks = _ranks(ground_truth, "images")
    category_ranks = _ranks(ground_truth, "categories")
    annotations = _listed(ground_truth["annotations"], image_ranks, category_ranks)
    counted = _listed(results, image_ranks, category_ranks)
    if unknown := {result["image_id"] for result in results} - image_ranks.keys():
        raise ValueError(
            f"{len(unknown)} images of the results are not in the ground truth: "
            f"{short_list(sorted(unknown, key=str))}; is this the right annotation file?"
        )

    true = Columns(
        np.array([image_ranks[entry["image_id"]] for entry in annotations], np.int64),
        np.array([category_ranks[entry["category_id"]] for entry in annotations], np.int64),
        _numbers(annotations, "bbox", 4),
    )
    crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in annotations], bool)
    found = Columns(
        np.array([image_ranks[result["image_id"]] for result in counted], np.int64),
        np.array([category_ranks[result["category_id"]] for result in counted], np.int64),
        _numbers(counted, "bbox", 4),
    )
    scores = _numbers(counted, "score", 1)[:, 0]
    expected = hotcoco.COCO.from_arrays(
        [{"id": rank} for rank in image_ranks.values()],
        [{"id": rank, "name": str(rank)} for rank in category_ranks.values()],
        true.images,
        true.categories,
        true.boxes,
        area=_areas(annotations),
        iscrowd=crowd,
    )
    # M 7, the order of columns that load_res asks for
    rows = np.column_stack([found.images, found.boxes, scores, found.categories])
    detected = expected.load_res(rows.astype(np.float64))

    evaluation = hotcoco.COCOeval(expected, detected, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    return Matched(evaluation, list(image_ranks), list(category_ranks), true, crowd, found, scores)


def metrics_of(matched: Matched) -> CocoMetrics:
    """The twelve numbers, and the AP of each category."""
    evaluation = matched.evaluation
    assert evaluation.eval is not None
    precision = evaluation.eval["precision"]  # T R K A D, -1 where a category has no box
    recall = evaluation.eval["recall"]  # T K A D, the same

    return CocoMetrics(
        AP=_mean(precision[..., ALL, TOP100]),
        AP50=_mean(precision[AP50_INDEX, ..., ALL, TOP100]),
        AP75=_mean(precision[AP75_INDEX, ..., ALL, TOP100]),
        APs=_mean(precision[..., SMALL, TOP100]),
        APm=_mean(precision[..., MEDIUM, TOP100]),
        APl=_mean(precision[..., LARGE, TOP100]),
        AR1=_mean(recall[..., ALL, TOP1]),
        AR10=_mean(recall[..., ALL, TOP10]),
        AR100=_mean(recall[..., ALL, TOP100]),
        ARs=_mean(recall[..., SMALL, TOP100]),
        ARm=_mean(recall[..., MEDIUM, TOP100]),
        ARl=_mean(recall[..., LARGE, TOP100]),
        ap_per_category={
            category_id: ap
            for k, category_id in enumerate(matched.category_ids)
            if (ap := _mean(precision[:, :, k, ALL, TOP100])) >= 0
        },
    )


def to_coco_results(
    detections: Detections, image_id: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The detections of one image as entries of a COCO results list.

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
    """One results list from those of several workers, with every image in it once.

    A shard maps the id of each image that a worker looked at to the results for it. An image
    without any detection is an empty list there, which tells it from one nobody looked at. Where
    several shards hold an image, as after a sampler has padded them to equal length, the first
    one's results are kept: were all kept, each detection but one would be a false positive.

    Args:
        shards: one per worker, in order of rank.
        image_ids: the images that must be there, and the order of the answer.

    Raises:
        RuntimeError: an image is in no shard, or a shard holds an image that is not asked for.
    """
    merged: dict[int, Sequence[Mapping[str, Any]]] = {}
    for shard in shards:
        for image_id, results in shard.items():
            merged.setdefault(image_id, results)

    wanted = dict.fromkeys(image_ids)
    if missing := [image_id for image_id in wanted if image_id not in merged]:
        raise RuntimeError(
            f"{len(missing)} of {len(wanted)} images were evaluated by none of {len(shards)} "
            f"workers: {short_list(missing)}; AP would be too low; look for a worker that stopped"
        )
    if unknown := [image_id for image_id in merged if image_id not in wanted]:
        raise RuntimeError(
            f"workers evaluated {len(unknown)} images that are not of this data set: "
            f"{short_list(unknown)}; do all of them read the same annotation file?"
        )
    return [dict(result) for image_id in wanted for result in merged[image_id]]


def _ranks(ground_truth: Mapping[str, Any], kind: str) -> dict[Any, int]:
    """Each id of `kind` to its rank, from 1. COCO breaks equal scores by the order of image ids."""
    ids = {entry["id"] for entry in ground_truth[kind]}
    return {entry_id: rank for rank, entry_id in enumerate(sorted(ids), start=1)}


def _listed(
    entries: Sequence[Mapping[str, Any]],
    image_ranks: Mapping[Any, int],
    category_ranks: Mapping[Any, int],
) -> list[Mapping[str, Any]]:
    """The entries whose image and category both are in the ground truth's lists."""
    for position, entry in enumerate(entries):
        if "image_id" not in entry or "category_id" not in entry:
            raise ValueError(
                f"entry {position} of {len(entries)} lacks image_id or category_id: {entry}"
            )
    return [
        entry
        for entry in entries
        if entry["image_id"] in image_ranks and entry["category_id"] in category_ranks
    ]


def _areas(annotations: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """What sorts each annotation into small, medium or large: M, in square pixels."""
    boxes = _numbers(annotations, "bbox", 4)  # M 4, xywh
    areas = boxes[:, 2] * boxes[:, 3]
    given = [i for i, entry in enumerate(annotations) if entry.get("area") is not None]
    areas[given] = _numbers([annotations[i] for i in given], "area", 1)[:, 0]
    return areas


def _numbers(entries: Sequence[Mapping[str, Any]], key: str, width: int) -> np.ndarray:
    """What all entries have under a key: M width, float64, every number finite."""
    if not entries:
        return np.empty((0, width))
    try:
        values = np.array([entry[key] for entry in entries], np.float64)
        if values.shape[1:] == _shape(width) and np.isfinite(values).all():
            return values.reshape(len(entries), width)
    except (KeyError, TypeError, ValueError):
        pass  # found again below, where the entry can be named
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


def _mean(values: np.ndarray) -> float:
    """The mean of what is defined, or -1."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0
