"""Classify the errors of a detector as TIDE does, and compute what each error type costs.

Six types, after TIDE (Bolya et al. 2020, https://arxiv.org/abs/2008.08115; thresholds 0.5 and 0.1):

| type | a false detection, or a missed true box |
|---|---|
| localisation | its class is there, at an IoU of 0.1 to 0.5 |
| classification | another class is there, at 0.5 or more |
| duplicate | its class is there, at 0.5 or more, and a detection with a higher score has it |
| background | nothing is there at more than 0.1 |
| both | another class is there, at an IoU of 0.1 to 0.5 |
| missed | a true box that no detection has, and none of the first two kinds could have |

A detection has the first type that fits, in this order. The cost of a type is how much AP50 would
rise if only its errors were repaired. Costs are comparable between types, but do not add up to the
missing AP. Repairing means: of the detections with the same best true box, the one with the highest
score becomes correct, with that box's class. All others of the type are removed. Missed boxes are
removed from the ground truth.

Without crowd regions these are hotcoco's own costs, except that of missed boxes: here a class whose
boxes are all missed is left out of the mean once they are removed. With crowds they differ: here a
detection within a crowd region does not count, as in AP. hotcoco also has no type for a single
detection, which the rest of the analysis needs. tidecv differs further: it takes the best 100
detections of an image, not of an image and class. Detections and boxes are matched as for AP, by
hotcoco, so the AP to improve is AP50 itself.
"""

# M detections   A true boxes   P pairs of both   K categories

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from hotcoco import metrics as hotcoco_metrics
from hotcoco.mask import iou

from deta.platform.evaluation.coco_engines import Matched

TRUE_FROM, BACKGROUND_UP_TO = 0.5, 0.1  # IoU (TIDE)
KINDS = ("classification", "localisation", "both", "duplicate", "background")
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
CORRECT, NOT_COUNTED = -1, -2  # in place of a kind


class Near(NamedTuple):
    """Pairs with an IoU of 0.1 or more, crowd regions left out: P each."""

    found: np.ndarray  # int64
    true: np.ndarray  # int64
    iou: np.ndarray
    is_own: np.ndarray  # bool: of one class


@dataclass(frozen=True)
class Overlaps:
    """Detections and true boxes of one image with an IoU of 0.1 or more.

    For each detection: the best true box of its own class, and of the others; M each. Crowd
    regions are not boxes. Where no box is near, the IoU is 0 and the box -1. Of equally good boxes
    the first is taken.
    """

    own_iou: np.ndarray  # float64
    own: np.ndarray  # int64, which true box
    other_iou: np.ndarray
    other: np.ndarray
    crowd_share: np.ndarray  # of the detection's area that lies in one crowd region, of any class
    near: Near


@dataclass(frozen=True)
class DetectionErrors:
    """The error type of every detection, and which true boxes were found."""

    kind: np.ndarray  # M int8: an index of KINDS, CORRECT or NOT_COUNTED
    box: np.ndarray  # M int64: the true box it matches, or would after a repair; or -1
    found_by: np.ndarray  # A int64: the detection that matches it; or -1
    missed: np.ndarray  # A bool: not found, and no repair would find it
    counts: np.ndarray  # K 6: number of each kind of KINDS, then missed; by the detection's class
    cost: dict[str, float]  # of each kind and "missed": rise of AP50, in 0..1
    false_positives_cost: float  # rise of AP50 if no detection were wrong
    false_negatives_cost: float  # rise of AP50 if no box were missing
    ap50: float  # -1 without a true box


def find_errors(matched: Matched, overlaps: Overlaps) -> DetectionErrors:
    """Return the type of every error, and the cost of each type."""
    found_by, correct, counted = _pairs_of(matched)
    num_found = len(matched.scores)
    is_found, near = found_by >= 0, overlaps.near
    # A box of the class, at 0.5 or more, that is taken; the best one need not be.
    is_taken = near.is_own & is_found[near.true] & (near.iou >= TRUE_FROM)
    own_iou, other_iou = overlaps.own_iou, overlaps.other_iou
    kind = np.full(num_found, BOTH, np.int8)
    kind[np.maximum(own_iou, other_iou) <= BACKGROUND_UP_TO] = BACKGROUND
    kind[near.found[is_taken]] = DUPLICATE
    kind[other_iou >= TRUE_FROM] = CLASSIFICATION
    kind[(own_iou >= BACKGROUND_UP_TO) & (own_iou <= TRUE_FROM)] = LOCALISATION
    kind[correct >= 0] = CORRECT
    kind[~counted] = NOT_COUNTED

    box = correct.copy()
    box[kind == LOCALISATION] = overlaps.own[kind == LOCALISATION]
    box[kind == CLASSIFICATION] = overlaps.other[kind == CLASSIFICATION]
    repairs = _repairs(matched, kind, box, is_found)
    reachable = np.zeros(len(found_by), bool)
    reachable[box[repairs]] = True
    missed = ~is_found & ~reachable & ~matched.crowd

    num_classes = len(matched.category_ids)
    counts = np.zeros((num_classes, len(KINDS) + 1), np.int64)
    wrong = kind >= 0
    np.add.at(counts, (matched.found.categories[wrong] - 1, kind[wrong]), 1)
    np.add.at(counts, (matched.true.categories[missed] - 1, len(KINDS)), 1)
    return DetectionErrors(
        kind, box, found_by, missed, counts, *_costs(matched, kind, box, repairs, missed, found_by)
    )


def best_overlaps(matched: Matched) -> Overlaps:
    """Return the true boxes near each detection, and its share in a crowd region."""
    found, true, crowd = matched.found, matched.true, matched.crowd
    crowd_share = np.zeros(len(matched.scores))
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for rows, boxes in of_each_image(found.images, true.images):
        table = iou(found.boxes[rows], true.boxes[boxes], crowd[boxes].tolist())
        crowd_share[rows] = (table * crowd[boxes]).max(1)
        i, j = np.nonzero((table >= BACKGROUND_UP_TO) & ~crowd[boxes])
        parts.append((rows[i], boxes[j], table[i, j]))
    rows, boxes, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    near = Near(rows, boxes, values, found.categories[rows] == true.categories[boxes])
    length = len(matched.scores)
    return Overlaps(
        *_best(near, near.is_own, length), *_best(near, ~near.is_own, length), crowd_share, near
    )


def _best(near: Near, which: np.ndarray, num_found: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the highest IoU of each detection among some pairs, and its box."""
    found, true, iou = near.found[which], near.true[which], near.iou[which]
    order = np.lexsort((true, -iou, found))
    detections, first = np.unique(found[order], return_index=True)
    best_iou, best = np.zeros(num_found), np.full(num_found, -1, np.int64)
    best_iou[detections] = iou[order[first]]
    best[detections] = true[order[first]]
    return best_iou, best


def of_each_image(
    images: np.ndarray, others: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of both columns that are of one image, ascending, where both have any."""
    orders = [np.argsort(column, kind="stable") for column in (images, others)]
    common = np.intersect1d(images, others)
    ends = [
        (
            np.searchsorted(column[order], common, "left"),
            np.searchsorted(column[order], common, "right"),
        )
        for column, order in zip((images, others), orders, strict=True)
    ]
    for a, b, c, d in zip(*ends[0], *ends[1], strict=True):
        yield orders[0][a:b], orders[1][c:d]


def _pairs_of(matched: Matched) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the detection of each true box, the box of each detection, and which ones count.

    Detections beyond the best 100 of an image and class do not count, nor those in a crowd region.
    """
    diagnostics = matched.evaluation.image_diagnostics(iou_thr=TRUE_FROM, score_thr=2.0)
    found_by = np.full(len(matched.crowd), -1, np.int64)
    correct = np.full(len(matched.scores), -1, np.int64)
    pairs = np.array(list(diagnostics["dt_match"].items()), np.int64).reshape(-1, 2) - 1
    correct[pairs[:, 0]] = pairs[:, 1]
    found_by[pairs[:, 1]] = pairs[:, 0]
    counted = np.zeros(len(matched.scores), bool)
    counted[np.fromiter(diagnostics["dt_status"], np.int64) - 1] = True
    return found_by, correct, counted


def _repairs(
    matched: Matched, kind: np.ndarray, box: np.ndarray, is_found: np.ndarray
) -> np.ndarray:
    """Return the detections that a repair makes correct: the highest score of each free box."""
    wrong = np.flatnonzero((kind == LOCALISATION) | (kind == CLASSIFICATION))
    free = wrong[~is_found[box[wrong]]]
    surest_first = free[np.argsort(-matched.scores[free], kind="stable")]
    _, first = np.unique(box[surest_first], return_index=True)
    return surest_first[first]


def _costs(
    matched: Matched, kind: np.ndarray, box: np.ndarray, repairs: np.ndarray,
    missed: np.ndarray, found_by: np.ndarray,
) -> tuple[dict[str, float], float, float, float]:  # fmt: skip
    """Return the cost of each type, of all false detections, of all missed boxes; and AP50."""
    own, of_box = matched.found.categories - 1, matched.true.categories - 1
    correct, counts = kind == CORRECT, kind != NOT_COUNTED

    def ap50(gone: np.ndarray, classes=own, right=correct, kept=counts) -> float:
        num_true = np.bincount(of_box[~matched.crowd & ~gone], minlength=len(matched.category_ids))
        return _mean_ap(matched.scores, classes, right, counts & kept, num_true)

    none = np.zeros_like(missed)
    base = ap50(none)
    aps = {}
    for index, name in enumerate(KINDS):
        repaired = np.zeros(len(kind), bool)
        repaired[repairs] = kind[repairs] == index
        classes = own.copy()
        classes[repaired] = of_box[box[repaired]]
        aps[name] = ap50(none, classes, correct | repaired, (kind != index) | repaired)
    aps |= {"missed": ap50(missed), "all false": ap50(none, kept=correct)}
    aps["all missed"] = ap50(found_by < 0)
    cost = {name: max(0.0, ap - base) for name, ap in aps.items()}
    of_false, of_lost = cost.pop("all false"), cost.pop("all missed")
    return cost, of_false, of_lost, base


def _mean_ap(
    scores: np.ndarray,
    classes: np.ndarray,
    right: np.ndarray,
    kept: np.ndarray,
    num_true: np.ndarray,
) -> float:
    """Return the mean 101-point AP of the classes with a true box; -1 without such a class."""
    rows = np.flatnonzero(kept)
    rows = rows[np.argsort(classes[rows], kind="stable")]
    ends = np.searchsorted(classes[rows], np.arange(len(num_true) + 1))
    aps = []
    for k in np.flatnonzero(num_true > 0):
        part = rows[ends[k] : ends[k + 1]]
        aps.append(hotcoco_metrics.average_precision(scores[part], right[part], int(num_true[k])))
    return float(np.mean(aps)) if aps else -1.0
