"""Which detection finds which box: the table from which every AP of these detections follows.

AP needs each detection compared with the ground truth of its own image once. What follows, the
order over all images and the sums, depends on which images count and how often. So this table is
made once, and the AP of any subset or resample of the images comes from it by adding
(`bootstrap.py`). hotcoco gives no such table fast enough, so the rule of pycocotools' evaluateImg
stands here again, for all images at once; the tests compare the two match by match.
"""

# N detections, of all images   G boxes to find   K categories   I images
# A area ranges   T IoU thresholds   M groups (image and category) with detections and boxes
# W boxes of a group, padded   D detections of one group

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO
# All, small, medium and large, in square pixels, both ends included (COCO).
AREA_RANGES = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
MAX_DETECTIONS = 100  # of one category in one image; the best count (COCO)
STRICTEST_IOU = 1 - 1e-10  # pycocotools: a threshold of 1 would let no box in
MAX_CELLS = 4_000_000  # of the largest array while matching, M A T W


@dataclass(frozen=True)
class MatchTable:
    """Every detection that counts, and what it found.

    Detections stand by category, then by falling score; where scores are equal, by image and
    then as they were given (pycocotools). Those of category k are `starts[k]` to `starts[k + 1]`.
    """

    image_ids: tuple[Any, ...]  # I, ascending
    category_ids: tuple[Any, ...]  # K, ascending
    starts: np.ndarray  # K+1
    image: np.ndarray  # N, place in image_ids
    score: np.ndarray  # N
    row: np.ndarray  # N, place in the results list
    true: np.ndarray  # A T N: found a box that counts in this area range
    ignored: np.ndarray  # A T N: neither right nor wrong: a crowd, or of another size
    found: np.ndarray  # T N: which box it found, a place among the truths, or -1; all sizes
    truth_image: np.ndarray  # G, place in image_ids
    truth_category: np.ndarray  # G, place in category_ids
    truth_row: np.ndarray  # G, place in the list of annotations
    truth_counts: np.ndarray  # A G: to be found in this area range; a crowd never is

    @property
    def category(self) -> np.ndarray:
        """N: the place of each detection's category in category_ids."""
        return np.repeat(np.arange(len(self.category_ids)), np.diff(self.starts))


def match_table(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    area_ranges: Sequence[tuple[float, float]] = AREA_RANGES,
) -> MatchTable:
    """Match detections with boxes exactly as pycocotools does.

    Args:
        ground_truth: a COCO dict: `images`, `annotations` and `categories`. Annotations of images
            or categories that are not listed do not count.
        results: COCO results. Those of categories that are not listed do not count.
        area_ranges: the first one is that of `found`.

    Raises:
        ValueError: a result for an image that is not in the ground truth; a key is missing; a
            score or a coordinate is not finite.
    """
    images = _ranks(ground_truth, "images")
    categories = _ranks(ground_truth, "categories")
    truths = _Boxes.read(ground_truth["annotations"], images, categories, "annotation")
    found = _Boxes.read(results, images, categories, "result")
    if unknown := {result["image_id"] for result in results} - images.keys():
        some = ", ".join(map(str, sorted(unknown, key=str)[:5]))
        raise ValueError(
            f"{len(unknown)} images of the results are not in the ground truth: {some}; is this "
            "the right annotation file?"
        )
    annotations = ground_truth["annotations"]
    crowd = np.array([bool(annotations[row].get("iscrowd", 0)) for row in truths.row], bool)
    areas = _areas(annotations, truths)
    score = _numbers(results, found.row, "score", ())

    by_truth = np.argsort(truths.group, kind="stable")
    truths, crowd, areas = truths.take(by_truth), crowd[by_truth], areas[by_truth]
    by_score = np.lexsort((-score, found.group))  # stable: equal scores stay as they were given
    found, score = found.take(by_score), score[by_score]
    kept = _place_in_group(found.group) < MAX_DETECTIONS
    found, score = found.take(kept), score[kept]

    low, high = np.array(area_ranges, np.float64).T[:, :, None]  # A 1
    ignore = crowd | (areas < low) | (areas > high)  # A G
    matched = _match(found, truths, crowd, ignore)  # A T N, places among the truths
    hit = matched >= 0
    picked = np.take_along_axis(
        ignore, matched.reshape(len(ignore), -1).clip(min=0), axis=1
    ).reshape(matched.shape) if len(truths.row) else hit  # fmt: skip
    size = found.box[:, 2] * found.box[:, 3]
    outside = ((size < low) | (size > high))[:, None]  # A 1 N
    order = np.lexsort((found.image, -score, found.category))
    return MatchTable(
        image_ids=tuple(images),
        category_ids=tuple(categories),
        starts=np.searchsorted(found.category[order], np.arange(len(categories) + 1)),
        image=found.image[order],
        score=score[order],
        row=found.row[order],
        true=(hit & ~picked)[..., order],
        ignored=np.where(hit, picked, outside)[..., order],
        found=matched[0][:, order],
        truth_image=truths.image,
        truth_category=truths.category,
        truth_row=truths.row,
        truth_counts=~ignore,
    )


@dataclass(frozen=True)
class _Boxes:
    """Boxes with their image and category, both as places in the ascending ids."""

    row: np.ndarray  # in the list they are from
    image: np.ndarray
    category: np.ndarray
    group: np.ndarray  # one number for image and category
    box: np.ndarray  # xywh

    @staticmethod
    def read(
        entries: Sequence[Mapping[str, Any]],
        images: Mapping[Any, int],
        categories: Mapping[Any, int],
        kind: str,
    ) -> _Boxes:
        for place, entry in enumerate(entries):
            if "image_id" not in entry or "category_id" not in entry:
                raise ValueError(
                    f"{kind} {place} of {len(entries)} lacks image_id or category_id: {entry}"
                )
        rows = np.array(
            [
                place
                for place, entry in enumerate(entries)
                if entry["image_id"] in images and entry["category_id"] in categories
            ],
            np.int64,
        )
        image = np.array([images[entries[row]["image_id"]] for row in rows], np.int64)
        category = np.array([categories[entries[row]["category_id"]] for row in rows], np.int64)
        return _Boxes(
            rows, image, category, category * len(images) + image,
            _numbers(entries, rows, "bbox", (4,)),
        )  # fmt: skip

    def take(self, index: np.ndarray) -> _Boxes:
        return _Boxes(
            self.row[index], self.image[index], self.category[index], self.group[index],
            self.box[index],
        )  # fmt: skip


def _match(found: _Boxes, truths: _Boxes, crowd: np.ndarray, ignore: np.ndarray) -> np.ndarray:
    """The box that each detection takes: A T N, places among the truths, -1 for none.

    Both come sorted by group, detections by falling score within it. Groups do not touch each
    other, so all of about one size take their turns together: first the best detection of each
    group chooses, then the second.
    """
    matched = np.full((len(ignore), len(IOU_THRESHOLDS), len(found.row)), -1, np.int64)
    groups, first, num_found = np.unique(found.group, return_index=True, return_counts=True)
    truth_first = np.searchsorted(truths.group, groups, "left")
    num_truths = np.searchsorted(truths.group, groups, "right") - truth_first
    chosen = np.flatnonzero(num_truths)
    # By width, a power of two; the fullest first, so that each turn is of the first so many.
    width = 2 ** np.ceil(np.log2(num_truths[chosen])).astype(np.int64)
    chosen = chosen[np.lexsort((-num_found[chosen], width))]
    width = np.sort(width)
    at = 0
    while at < len(chosen):
        per_group = int(width[at]) * matched.shape[0] * matched.shape[1]
        end = int(np.searchsorted(width, width[at], "right"))
        end = min(end, at + max(1, MAX_CELLS // per_group))
        part = chosen[at:end]
        slots = np.arange(width[at])
        boxes = truth_first[part, None] + slots  # M W, places among the truths
        valid = slots < num_truths[part, None]
        boxes = np.where(valid, boxes, truth_first[part, None])
        _match_groups(
            matched, found.box, first[part], num_found[part],
            truths.box[boxes], boxes, valid, crowd[boxes], ignore[:, boxes].swapaxes(0, 1),
        )  # fmt: skip
        at = end
    return matched


def _match_groups(
    matched: np.ndarray,  # A T N, filled in
    found_box: np.ndarray,  # N 4
    first: np.ndarray,  # M, place of the group's best detection
    num_found: np.ndarray,  # M, falling
    truth_box: np.ndarray,  # M W 4
    place: np.ndarray,  # M W
    valid: np.ndarray,  # M W
    crowd: np.ndarray,  # M W
    ignore: np.ndarray,  # M A W
) -> None:
    """Groups that have room for equally many boxes, turn by turn."""
    thresholds = np.minimum(IOU_THRESHOLDS, STRICTEST_IOU)[:, None]  # T 1
    taken = np.zeros((*ignore.shape[:2], len(thresholds), ignore.shape[2]), bool)  # M A T W
    for turn in range(int(num_found[0])):
        num_left = int(np.searchsorted(-num_found, -turn, "left"))
        detection = first[:num_left] + turn
        ious = np.where(
            valid[:num_left],
            _ious(found_box[detection], truth_box[:num_left], crowd[:num_left]),
            -1.0,
        )
        near = np.flatnonzero(ious.max(axis=1) >= thresholds[0, 0])
        if not len(near):
            continue
        iou = ious[near][:, None, None]  # M 1 1 W
        free = (iou >= thresholds) & (~taken[near] | crowd[near][:, None, None])  # M A T W
        wanted = free & ~ignore[near][:, :, None]
        # A box that is ignored is taken only if there is no other.
        free = np.where(wanted.any(axis=-1, keepdims=True), wanted, free)
        value = np.where(free, iou, -1.0)
        # Of equal ones the last, as pycocotools.
        best = value.shape[-1] - 1 - value[..., ::-1].argmax(axis=-1)  # M A T
        group, area, threshold = np.nonzero(free.any(axis=-1))
        box = best[group, area, threshold]
        taken[near[group], area, threshold, box] = True
        matched[area, threshold, detection[near[group]]] = place[near[group], box]


def _ious(found: np.ndarray, truths: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Of M detections, each with W boxes: M W. A crowd's is the share of the detection in it.

    The order of operations is that of bbIou in pycocotools, so the last bit is the same.
    """
    x, y, w, h = (found[:, None, i] for i in range(4))
    tx, ty, tw, th = (truths[..., i] for i in range(4))
    wide = np.minimum(w + x, tw + tx) - np.maximum(x, tx)
    high = np.minimum(h + y, th + ty) - np.maximum(y, ty)
    both = np.where((wide > 0) & (high > 0), wide * high, 0.0)
    union = np.where(crowd, w * h, w * h + tw * th - both)
    return np.divide(both, union, out=np.zeros_like(both), where=both > 0)


def _ranks(ground_truth: Mapping[str, Any], kind: str) -> dict[Any, int]:
    if kind not in ground_truth or "annotations" not in ground_truth:
        raise ValueError(
            f"the ground truth lacks {kind} or annotations; is it a COCO annotation file? Its "
            f"keys are {sorted(ground_truth)}"
        )
    return {entry_id: i for i, entry_id in enumerate(sorted({e["id"] for e in ground_truth[kind]}))}


def _place_in_group(group: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal numbers."""
    places = np.arange(len(group))
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return places - np.repeat(starts, np.diff(starts, append=len(group)))


def _areas(annotations: Sequence[Mapping[str, Any]], truths: _Boxes) -> np.ndarray:
    """What sorts a box into a range: the annotation's own area where it has one."""
    areas = truths.box[:, 2] * truths.box[:, 3]
    given = [i for i, row in enumerate(truths.row) if annotations[row].get("area") is not None]
    areas[given] = _numbers(annotations, truths.row[given], "area", ())
    return areas


def _numbers(
    entries: Sequence[Mapping[str, Any]], rows: np.ndarray, key: str, shape: tuple[int, ...]
) -> np.ndarray:
    """What those rows have under a key, float64, all finite."""
    values = [entries[row].get(key) for row in rows]
    try:
        numbers = np.array(values, np.float64).reshape(len(values), *shape)
        if np.isfinite(numbers).all():
            return numbers
    except (TypeError, ValueError):
        pass  # found again below, where the entry can be named
    for row in rows:
        try:
            value = np.array(entries[row].get(key), np.float64)
            wrong = value.shape != shape or not np.isfinite(value).all()
        except (TypeError, ValueError):
            wrong = True
        if wrong:
            what = "a finite number" if not shape else f"{shape[0]} finite numbers"
            raise ValueError(
                f"entry {row}, of image {entries[row]['image_id']!r}, has a {key} that is not "
                f"{what}: {entries[row].get(key)!r}"
            )
    raise AssertionError(f"{key}: all entries are right, and yet they do not fit together")
