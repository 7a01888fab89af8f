"""Computes the COCO AP of weighted images from a match table, without matching again.

The weight of an image is the number of its copies in a resampled data set, where the copies are
adjacent. A true detection that counts m times has its best precision at its last copy, and the
recalls in between lie under the same envelope, so the weight alone is enough.
"""

# N detections   S true detections of all segments   K categories   T IoU thresholds
# P segments, K times T   R recall thresholds   I images

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deta.platform.evaluation.match_table import IOU_THRESHOLDS, MatchTable

RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)  # COCO
NUM_RECALLS, NUM_IOUS = len(RECALL_THRESHOLDS), len(IOU_THRESHOLDS)


@dataclass(frozen=True)
class ApTable:
    """A match table prepared so that the AP of weighted images needs only sums.

    Precision peaks at true detections, so only these are evaluated. A segment is one category at
    one IoU threshold. If detections of one image and category have equal scores, copies of the
    image interleave them. Such detections are listed once for each copy, with the number of the
    copy in `copy`; for all others it is 0, and they count with the weight of their image.
    """

    num_images: int
    num_categories: int
    image: np.ndarray  # N
    copied: np.ndarray  # indices of detections that are listed for each copy
    copy: np.ndarray  # number of the copy of each of these, from 1
    starts: np.ndarray  # K+1
    true: np.ndarray  # S, indices of the true detections, by segment
    segment: np.ndarray  # S
    segment_starts: np.ndarray  # P+1
    ignored: np.ndarray  # indices of the ignored detections, by segment
    ignored_before: np.ndarray  # S, number of these before the true detection
    ignored_starts: np.ndarray  # P
    truth_image: np.ndarray  # of the boxes that count
    truth_category: np.ndarray

    @staticmethod
    def build(table: MatchTable, max_copies: int, area: int = 0) -> ApTable:
        """Prepare a table for weights of up to `max_copies`."""
        source, copy = _expand_ties(table, max_copies, area)
        category = table.category[source]
        num_categories = len(table.category_ids)
        true, segment = _by_segment(table.true[area][:, source], category)
        ignored, ignored_segment = _by_segment(table.ignored[area][:, source], category)
        numbers = np.arange(num_categories * NUM_IOUS + 1)
        ignored_starts = np.searchsorted(ignored_segment, numbers)
        span = len(source) + 1
        counts = table.truth_counts[area]
        return ApTable(
            num_images=len(table.image_ids),
            num_categories=num_categories,
            image=table.image[source],
            copied=np.flatnonzero(copy),
            copy=copy[copy > 0],
            starts=np.searchsorted(category, np.arange(num_categories + 1)),
            true=true,
            segment=segment,
            segment_starts=np.searchsorted(segment, numbers),
            ignored=ignored,
            ignored_before=np.searchsorted(ignored_segment * span + ignored, segment * span + true),
            ignored_starts=ignored_starts[:-1],
            truth_image=table.truth_image[counts],
            truth_category=table.truth_category[counts],
        )


def weighted_ap(table: ApTable, weights: np.ndarray) -> np.ndarray:
    """Return the AP of each category at each IoU threshold, with each image weighted.

    Args:
        weights: I, integers from 0 to the table's `max_copies`.

    Returns:
        K T, 0..1; NaN for a category without a box in any image of positive weight.
    """
    num_segments = table.num_categories * NUM_IOUS
    weight = weights[table.image]
    weight[table.copied] = weight[table.copied] >= table.copy
    seen = _sums(weight)  # N+1
    ignored = _sums(weight[table.ignored])
    right = _sums(weight[table.true])  # S+1

    lengths = np.diff(table.segment_starts)
    before = np.repeat(seen[table.starts[:-1]], NUM_IOUS) - ignored[table.ignored_starts]  # P
    num_seen = seen[table.true + 1] - ignored[table.ignored_before] - np.repeat(before, lengths)
    num_right = right[1:] - np.repeat(right[table.segment_starts[:-1]], lengths)
    num_boxes = np.bincount(
        table.truth_category, weights=weights[table.truth_image], minlength=table.num_categories
    )
    to_find = np.repeat(np.maximum(num_boxes, 1), NUM_IOUS)

    precision = num_right / (num_seen + np.spacing(1))  # this term is from pycocotools
    recall = num_right / np.repeat(to_find, lengths)
    # The first detection of a segment that reaches each recall; the segment's end if none does.
    reached = np.searchsorted(RECALL_THRESHOLDS, recall, side="right")  # 0..R
    counts = np.bincount(
        table.segment * (NUM_RECALLS + 1) + reached, minlength=num_segments * (NUM_RECALLS + 1)
    ).reshape(num_segments, NUM_RECALLS + 1)
    at = table.segment_starts[:-1, None] + counts.cumsum(axis=1)[:, :-1]  # P R
    # The best precision from one recall to the next, then from each recall to the end.
    best = np.maximum.reduceat(np.append(precision, 0.0), at.ravel()).reshape(at.shape)
    best[at >= table.segment_starts[1:, None]] = 0.0
    envelope = np.maximum.accumulate(best[:, ::-1], axis=1)
    ap = envelope.mean(axis=1).reshape(table.num_categories, NUM_IOUS)
    ap[num_boxes == 0] = np.nan
    return ap


def _expand_ties(table: MatchTable, max_copies: int, area: int) -> tuple[np.ndarray, np.ndarray]:
    """Return detections with copies of tied ones: indices into the table, and the copy (0: all)."""
    num = len(table.image)
    if num == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    category = table.category
    new = np.ones(num, bool)
    new[1:] = (np.diff(category) != 0) | (np.diff(table.image) != 0) | (np.diff(table.score) != 0)
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=num)
    # If all detections are false, their order does not matter.
    true = np.add.reduceat(table.true[area].any(axis=0).astype(np.int64), starts)
    tied = (lengths > 1) & (true > 0)
    sizes = np.where(tied, lengths * max_copies, lengths)
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    length = np.repeat(lengths, sizes)
    source = np.repeat(starts, sizes) + within % length
    return source, np.where(np.repeat(tied, sizes), within // length + 1, 0)


def _by_segment(flags: np.ndarray, category: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the set flags (T N), by segment, and the segment of each."""
    threshold, index = np.nonzero(flags)
    segment = category[index] * NUM_IOUS + threshold
    order = np.lexsort((index, segment))
    return index[order], segment[order]


def _sums(values: np.ndarray) -> np.ndarray:
    """Return 0, then the cumulative sums."""
    return np.concatenate([[0], np.cumsum(values)])
