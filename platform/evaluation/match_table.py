"""The match table: which detection matches which box, at every IoU threshold and area range.

AP compares each detection with the ground truth of its own image once. The order over all images
and the sums depend on which images count, and how often. So this table is computed once, and the AP
of any subset or resample of the images follows from it by sums (`weighted_ap.py`). hotcoco does
not give such a table fast enough, so this file implements evaluateImg of pycocotools again, for all
images at once; the tests compare the two match by match.
"""

# N detections, of all images   G boxes to find   K categories   I images
# A area ranges   T IoU thresholds   M groups (image and category) with detections and boxes
# W boxes of a group, padded   D detections of one group

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deta.platform.evaluation.coco_columns import Columns, read_columns

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO
# All, small, medium and large, in square pixels, both ends included (COCO).
AREA_RANGES = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
MAX_DETECTIONS = 100  # the best of one category in one image count (COCO)
STRICTEST_IOU = 1 - 1e-10  # pycocotools: no box would pass a threshold of 1
MAX_CELLS = 4_000_000  # of the largest array while matching, M A T W


@dataclass(frozen=True)
class MatchTable:
    """Every detection that counts, and the boxes that it matches.

    Detections are sorted by category, then by descending score; equal scores by image, then in the
    given order (pycocotools). Those of category k are `starts[k]` to `starts[k + 1]`.
    """

    image_ids: tuple[Any, ...]  # I, ascending
    category_ids: tuple[Any, ...]  # K, ascending
    starts: np.ndarray  # K+1
    image: np.ndarray  # N, index into image_ids
    score: np.ndarray  # N
    row: np.ndarray  # N, index into the results list
    true: np.ndarray  # A T N: matches a box that counts in this area range
    ignored: np.ndarray  # A T N: neither true nor false: a crowd, or another size
    found: np.ndarray  # T N: the box that it matches, an index into the truths, or -1; all sizes
    truth_image: np.ndarray  # G, index into image_ids
    truth_category: np.ndarray  # G, index into category_ids
    truth_row: np.ndarray  # G, index into the list of annotations
    truth_counts: np.ndarray  # A G: counts in this area range; a crowd never does

    @property
    def category(self) -> np.ndarray:
        """Return the index of each detection's category in category_ids: N."""
        return np.repeat(np.arange(len(self.category_ids)), np.diff(self.starts))

    def of_images(self, chosen: np.ndarray) -> MatchTable:
        """Return the table of some images.

        Args:
            chosen: indices into image_ids, ascending, each once.
        """
        place = np.full(len(self.image_ids), -1)
        place[chosen] = np.arange(len(chosen))
        kept, here = place[self.image] >= 0, place[self.truth_image] >= 0
        rank = np.append(np.cumsum(here) - 1, -1)  # of each box that stays; -1 stays -1
        return MatchTable(
            image_ids=tuple(self.image_ids[i] for i in chosen),
            category_ids=self.category_ids,
            starts=np.append(0, np.cumsum(kept))[self.starts],
            image=place[self.image[kept]],
            score=self.score[kept],
            row=self.row[kept],
            true=self.true[..., kept],
            ignored=self.ignored[..., kept],
            found=rank[self.found[:, kept]],
            truth_image=place[self.truth_image[here]],
            truth_category=self.truth_category[here],
            truth_row=self.truth_row[here],
            truth_counts=self.truth_counts[:, here],
        )


def match_table(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    area_ranges: Sequence[tuple[float, float]] = AREA_RANGES,
) -> MatchTable:
    """Match detections with boxes exactly as pycocotools does.

    Args:
        ground_truth, results: as for `evaluate_detections`.
        area_ranges: `found` is that of the first one.

    Raises:
        ValueError: as for `evaluate_detections`.
    """
    columns = read_columns(ground_truth, results)
    num_images = len(columns.image_ids)
    truths = _Boxes.of(columns.true, columns.true_rows, num_images)
    found = _Boxes.of(columns.found, columns.found_rows, num_images)
    crowd, areas, score = columns.crowd, columns.areas, columns.scores

    by_truth = np.argsort(truths.group, kind="stable")
    truths, crowd, areas = truths.take(by_truth), crowd[by_truth], areas[by_truth]
    by_score = np.lexsort((-score, found.group))  # stable: equal scores stay in the given order
    found, score = found.take(by_score), score[by_score]
    kept = _place_in_group(found.group) < MAX_DETECTIONS
    found, score = found.take(kept), score[kept]

    low, high = np.array(area_ranges, np.float64).T[:, :, None]  # A 1
    ignore = crowd | (areas < low) | (areas > high)  # A G
    matched = _match(found, truths, crowd, ignore)  # A T N, indices into the truths
    hit = matched >= 0
    picked = np.take_along_axis(
        ignore, matched.reshape(len(ignore), -1).clip(min=0), axis=1
    ).reshape(matched.shape) if len(truths.row) else hit  # fmt: skip
    size = found.box[:, 2] * found.box[:, 3]
    outside = ((size < low) | (size > high))[:, None]  # A 1 N
    order = np.lexsort((found.image, -score, found.category))
    return MatchTable(
        image_ids=tuple(columns.image_ids),
        category_ids=tuple(columns.category_ids),
        starts=np.searchsorted(found.category[order], np.arange(len(columns.category_ids) + 1)),
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


class _Boxes(NamedTuple):
    """Boxes with their image and category, both as indices into the ascending ids."""

    row: np.ndarray  # index into the list that they are from
    image: np.ndarray
    category: np.ndarray
    group: np.ndarray  # one number for each image and category
    box: np.ndarray  # xywh

    @staticmethod
    def of(columns: Columns, row: np.ndarray, num_images: int) -> _Boxes:
        image, category = columns.images - 1, columns.categories - 1
        return _Boxes(row, image, category, category * num_images + image, columns.boxes)

    def take(self, index: np.ndarray) -> _Boxes:
        return _Boxes(*(column[index] for column in self))


def _match(found: _Boxes, truths: _Boxes, crowd: np.ndarray, ignore: np.ndarray) -> np.ndarray:
    """Return the box that each detection takes: A T N, indices into the truths, -1 for none.

    Both arguments are sorted by group, and detections by descending score within it. Groups do not
    affect each other, so groups of similar size are matched together: first the best detection of
    each group chooses, then the second.
    """
    matched = np.full((len(ignore), len(IOU_THRESHOLDS), len(found.row)), -1, np.int64)
    groups, first, num_found = np.unique(found.group, return_index=True, return_counts=True)
    truth_first = np.searchsorted(truths.group, groups, "left")
    num_truths = np.searchsorted(truths.group, groups, "right") - truth_first
    chosen = np.flatnonzero(num_truths)
    # By width, a power of two; the fullest first, so that each turn is a prefix of the groups.
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
        boxes = truth_first[part, None] + slots  # M W, indices into the truths
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
    first: np.ndarray,  # M, index of the group's best detection
    num_found: np.ndarray,  # M, descending
    truth_box: np.ndarray,  # M W 4
    place: np.ndarray,  # M W
    valid: np.ndarray,  # M W
    crowd: np.ndarray,  # M W
    ignore: np.ndarray,  # M A W
) -> None:
    """Match groups that are padded to the same number of boxes, turn by turn."""
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
        # An ignored box is taken only if no other is free.
        free = np.where(wanted.any(axis=-1, keepdims=True), wanted, free)
        value = np.where(free, iou, -1.0)
        # Of equal IoUs the last one wins, as in pycocotools.
        best = value.shape[-1] - 1 - value[..., ::-1].argmax(axis=-1)  # M A T
        group, area, threshold = np.nonzero(free.any(axis=-1))
        box = best[group, area, threshold]
        taken[near[group], area, threshold, box] = True
        matched[area, threshold, detection[near[group]]] = place[near[group], box]


def _ious(found: np.ndarray, truths: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU of M detections with W boxes each: M W.

    For a crowd, it is the share of the detection inside it. The order of operations is that of
    bbIou in pycocotools, so the last bit is the same.
    """
    x, y, w, h = (found[:, None, i] for i in range(4))
    tx, ty, tw, th = (truths[..., i] for i in range(4))
    wide = np.minimum(w + x, tw + tx) - np.maximum(x, tx)
    high = np.minimum(h + y, th + ty) - np.maximum(y, ty)
    both = np.where((wide > 0) & (high > 0), wide * high, 0.0)
    union = np.where(crowd, w * h, w * h + tw * th - both)
    return np.divide(both, union, out=np.zeros_like(both), where=both > 0)


def _place_in_group(group: np.ndarray) -> np.ndarray:
    """Return 0, 1, 2, ... within each run of equal numbers."""
    places = np.arange(len(group))
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return places - np.repeat(starts, np.diff(starts, append=len(group)))
