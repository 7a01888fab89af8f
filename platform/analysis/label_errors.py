"""Find annotations that are likely wrong, where a mostly correct model contradicts them.

| kind | condition | suspicion, 0..1 |
|---|---|---|
| wrong class | another class is detected on the box (IoU 0.5) | score minus the own class's there |
| missing box | a detection where no box and no crowd is (IoU 0.1) | score |
| shifted box | its class is detected beside it (IoU 0.1 to 0.5), and not on it | score |
| needless box | every detection that touches it (IoU 0.1) has a low score | see below |

The first three are the label errors of ObjectLab (Tkachenko et al. 2023,
https://arxiv.org/abs/2309.00832: swapped, overlooked, badly located). The suspicion is our own: one
number for how confidently the model contradicts the annotation. A box without a detection means
little in a class of low recall. So the suspicion of the last kind is the recall of the class, times
1 - s / o, where s is the highest score on the box and o the operating score. A suspicion is only a
reason to check: a model repeats what it has learned, wrong labels too.

A weak model contradicts right labels. So nothing is listed if F1 is below `LEAST_F1`, and nothing
of a suspicion below `LEAST_SUSPICION`. These limits were chosen and measured on the same 1,000
drawn pictures with 2,529 boxes, with all labels right and with 99 of them made wrong:

| AP | F1 | listed with right labels | listed with wrong labels | of these wrong |
|---|---|---|---|---|
| 75 | 0.92 | 4 (107 without the limits) | 56 (180) | 52 (70) |
| 61 | 0.86 | 0 (235) | 19 (295) | 19 (67) |
| 28 | 0.55 | 0 (1,022) | 0 (1,050) | 0 (63) |

The last model with its scores raised to the power 0.3, so that it is confident as well: 16 and 35,
of which 19 are wrong, without the limit of F1.
"""

# M detections   A true boxes

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hotcoco.mask import iou

from deta.platform.analysis.tide_errors import (
    BACKGROUND_UP_TO,
    NOT_COUNTED,
    TRUE_FROM,
    DetectionErrors,
    Near,
    Overlaps,
    of_each_image,
)
from deta.platform.evaluation.coco_engines import Matched

WRONG_CLASS, MISSING, SHIFTED, NEEDLESS = (
    "wrong class",
    "missing box",
    "shifted box",
    "needless box",
)
IN_CROWD_FROM = 0.5  # share of a detection that lies in a crowd region
# Below these, contradictions are the model's errors and not those of the labels; see the docstring.
LEAST_F1 = 0.6  # of the model
LEAST_SUSPICION = {WRONG_CLASS: 0.6, MISSING: 0.6, SHIFTED: 0.6, NEEDLESS: 0.8}


@dataclass(frozen=True)
class LabelError:
    """An annotation that is likely wrong, or a place where one is likely missing."""

    kind: str
    suspicion: float  # 0..1
    image_id: Any
    true: int | None  # row of the annotation in `Matched.true`; None for a missing one
    found: int | None  # row of the contradicting detection; None for a needless box


def find_label_errors(
    matched: Matched, overlaps: Overlaps, errors: DetectionErrors, operating_score: float
) -> list[LabelError]:
    """Return the label errors, most suspicious first; each annotation once, by its highest one.

    They are none if the model is too weak to tell, `is_too_weak`.

    Args:
        operating_score: only detections from here on contradict, and count for recall.
    """
    scores = matched.scores
    counted = errors.kind != NOT_COUNTED
    is_free = np.append(errors.found_by < 0, False)  # -1 is no box
    sure = counted & (scores >= operating_score)

    own_score = _best_own_score(matched, overlaps.near)
    suspicion = scores - np.append(own_score, 0.0)[overlaps.other]
    wrong_class = sure & (overlaps.other_iou >= TRUE_FROM) & (suspicion > 0)
    wrong_class &= overlaps.own_iou < TRUE_FROM  # else it may be right about another box
    shifted = sure & (overlaps.own_iou >= BACKGROUND_UP_TO) & (overlaps.own_iou < TRUE_FROM)
    shifted &= is_free[overlaps.own] & (overlaps.other_iou < TRUE_FROM)
    nothing = np.maximum(overlaps.own_iou, overlaps.other_iou) <= BACKGROUND_UP_TO
    missing = sure & nothing & (overlaps.crowd_share < IN_CROWD_FROM)
    missing[missing] = _first_of_their_place(matched, np.flatnonzero(missing))

    found: list[tuple[str, float, int, int]] = []  # kind, suspicion, true box, detection
    for kind, which, values, boxes in (
        (WRONG_CLASS, wrong_class, suspicion, overlaps.other),
        (SHIFTED, shifted, scores, overlaps.own),
        (MISSING, missing, scores, np.full(len(scores), -1)),
    ):
        rows = np.flatnonzero(which)
        found += [(kind, float(values[m]), int(boxes[m]), int(m)) for m in rows]
    needless = _needless(matched, overlaps.near, errors, operating_score)
    found += [(NEEDLESS, float(needless[a]), int(a), -1) for a in np.flatnonzero(needless)]

    found = [one for one in found if one[1] >= LEAST_SUSPICION[one[0]]]
    found.sort(key=lambda one: -one[1])
    errors_found, seen = [], set()
    for kind, value, a, m in found:
        if a >= 0 and a in seen:
            continue
        seen.add(a)
        image = (matched.true if a >= 0 else matched.found).images[a if a >= 0 else m]
        image_id = matched.image_ids[image - 1]
        errors_found.append(
            LabelError(kind, value, image_id, a if a >= 0 else None, m if m >= 0 else None)
        )
    return errors_found


def is_too_weak(best_f1: float) -> bool:
    """Return whether a model of this F1 contradicts right labels more often than wrong ones."""
    return best_f1 < LEAST_F1


def _best_own_score(matched: Matched, near: Near) -> np.ndarray:
    """Return the highest score of the own class on each true box at an IoU of 0.5, else 0: A."""
    best = np.zeros(len(matched.crowd))
    on = near.is_own & (near.iou >= TRUE_FROM)
    np.maximum.at(best, near.true[on], matched.scores[near.found[on]])
    return best


def _first_of_their_place(matched: Matched, rows: np.ndarray) -> np.ndarray:
    """Return which detections have the highest score of those that overlap them by 0.5 IoU."""
    order = rows[np.argsort(-matched.scores[rows], kind="stable")]
    is_first = np.ones(len(order), bool)
    for own, _ in of_each_image(matched.found.images[order], matched.found.images[order]):
        boxes = matched.found.boxes[order[own]]
        is_first[own] = ~np.tril(iou(boxes, boxes, [0] * len(own)) >= TRUE_FROM, -1).any(1)
    return np.isin(rows, order[is_first])


def _needless(
    matched: Matched, near: Near, errors: DetectionErrors, operating_score: float
) -> np.ndarray:
    """Return the suspicion of each true box that only low scores touch; 0 for others: A."""
    surest = np.zeros(len(matched.crowd))
    np.maximum.at(surest, near.true, matched.scores[near.found])
    by = errors.found_by
    is_found = (by >= 0) & (np.append(matched.scores, 0.0)[by] >= operating_score)
    classes, real = matched.true.categories - 1, ~matched.crowd
    num_classes = len(matched.category_ids)
    found = np.bincount(classes[real & is_found], minlength=num_classes)
    total = np.bincount(classes[real], minlength=num_classes)
    recall = (found / np.maximum(1, total))[classes]
    return real * recall * np.maximum(0.0, 1 - surest / max(operating_score, 1e-9))
