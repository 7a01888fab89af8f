"""Analyse one evaluation: where a detector loses AP, cheaply enough for every evaluation.

Collects AP and AR of each class, precision-recall curves, error types and their costs
(tide_errors.py), the confusion matrix, score calibration, the images with most errors, and likely
label errors (label_errors.py). report.py makes a page of it; `scalars` are the metrics that are
logged during a training.

hotcoco matches by the rules of COCO, and computes confusions and calibration. Calibration is that
of Guo et al. 2017 (https://arxiv.org/abs/1706.04599) for detections: ten bins of score with equal
width, and the share of correct detections in each at an IoU of 0.5. The error is the mean
difference between score and share, weighted by the detections of a bin. `calibration_error` counts
all detections. Most of them have low scores, so those from 0.3 on have an error of their own (the
limit of Küppers et al. 2020, https://arxiv.org/abs/2004.13546).

The *operating score* is where F1 of all classes together is highest: the choice of a user who
needs one threshold. Confusions and the images with most errors count detections from it on.
"""

# M detections   A true boxes   K categories   R recall thresholds, 101

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hotcoco import metrics as hotcoco_metrics

from deta.platform.analysis.label_errors import LabelError, find_label_errors, is_too_weak
from deta.platform.analysis.tide_errors import (
    CORRECT,
    KINDS,
    NOT_COUNTED,
    TRUE_FROM,
    DetectionErrors,
    best_overlaps,
    find_errors,
)
from deta.platform.evaluation.coco_engines import Matched, match_detections
from deta.platform.evaluation.coco_metrics import (
    ALL,
    AP50_INDEX,
    AP75_INDEX,
    LARGE,
    MEDIUM,
    SMALL,
    TOP100,
)
from deta.platform.evaluation.paired_bootstrap import ApInterval
from deta.platform.system.atomic_write import write_json

SIZES = {"small": SMALL, "medium": MEDIUM, "large": LARGE}
CURVE_INDICES = {0.5: 0, 0.6: 2, 0.7: 4, 0.8: 6, 0.9: 8}  # of IoU thresholds that are drawn
NUM_BINS = 10
CONFIDENT_FROM = 0.3
EXPLANATION = "explanation.json"


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class, in 0..1; -1 where there is no box to find."""

    category_id: int
    name: str
    num_boxes: int
    num_detections: int
    AP: float
    AP50: float
    AP75: float
    by_size: dict[str, float]  # AP of small, medium and large boxes
    AR: float  # recall of up to 100 detections, mean over IoU 0.5 ... 0.95
    precision: float  # at the operating score and IoU 0.5; -1 without such a detection
    recall: float
    errors: dict[str, int]  # number of each kind, at any score
    precision_at_recall: tuple[float, ...]  # R, IoU 0.5; empty without a box


@dataclass(frozen=True)
class Calibration:
    """The calibration of the scores: the share of correct detections at each score."""

    error: float  # 0..1; 0 is best
    largest: float  # of one bin
    confident_error: float  # of detections with a score of 0.3 or more; -1 without any
    bins: tuple[tuple[float, float, int], ...]  # mean score, share of correct ones, detections


@dataclass(frozen=True)
class WorstImage:
    """An image with its number of errors at the operating score."""

    image_id: Any
    num_false: int  # detections from the operating score on that are wrong
    num_missed: int  # boxes that no such detection finds


@dataclass(frozen=True)
class Explanation:
    """The analysis of one evaluation, without images."""

    matched: Matched
    errors: DetectionErrors
    classes: tuple[ClassMetrics, ...]
    curves: dict[float, tuple[float, ...]]  # by IoU: precision at R recalls, mean over classes
    operating_score: float
    best_f1: float
    confusion: np.ndarray  # K+1 K+1 int64: rows true, columns found, the last for neither
    calibration: Calibration
    worst: tuple[WorstImage, ...]  # all images with an error, most errors first
    label_errors: tuple[LabelError, ...]  # most suspicious first; none of a weak model
    seconds: float  # time of the analysis


def explain(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Explanation:
    """Analyse one evaluation.

    Args:
        ground_truth: a COCO dict, as for `evaluate_detections`.
        results: COCO results, likewise.

    Raises:
        ValueError: as for `evaluate_detections`; or a score is not in 0..1.
    """
    began_s = time.perf_counter()
    matched = match_detections(ground_truth, results)
    overlaps = best_overlaps(matched)
    errors = find_errors(matched, overlaps)
    score, f1 = operating_point(matched, errors)
    names = {category["id"]: str(category["name"]) for category in ground_truth["categories"]}
    # Matched greedily across classes, the highest score first.
    confusion = matched.evaluation.confusion_matrix(iou_thr=TRUE_FROM, min_score=score)["matrix"]
    return Explanation(
        matched,
        errors,
        _classes(matched, errors, [names[i] for i in matched.category_ids], score),
        _curves(matched),
        score,
        f1,
        np.asarray(confusion).astype(np.int64),
        _calibration(matched, errors),
        worst_images(matched, errors, score),
        () if is_too_weak(f1) else tuple(find_label_errors(matched, overlaps, errors, score)),
        time.perf_counter() - began_s,
    )


def scalars(explanation: Explanation) -> dict[str, float]:
    """Return the metrics that are logged during a training, by MLflow's names.

    All are in percent except the score. The evaluation itself logs AP, by size and class too. These
    are the recall of each class, the cost of each error type, and calibration. Undefined metrics
    are left out.
    """
    found: dict[str, float] = {}
    if explanation.errors.ap50 >= 0:
        for kind, cost in explanation.errors.cost.items():
            found[f"val/error_{kind}"] = 100 * cost
        found["val/best_F1"] = 100 * explanation.best_f1
        found["val/operating_score"] = explanation.operating_score
    if len(explanation.matched.scores):
        found["val/calibration_error"] = 100 * explanation.calibration.error
    if explanation.calibration.confident_error >= 0:
        found["val/calibration_error_confident"] = 100 * explanation.calibration.confident_error
    for one in explanation.classes:
        if one.AR >= 0:
            found[f"AR_of_class/{one.name}"] = 100 * one.AR
    return found


def write_explanation(
    path: Path, explanation: Explanation, most: int = 1000, *, interval: ApInterval | None = None
) -> None:
    """Write the numbers as JSON atomically, with the first `most` images and label errors."""
    content = {
        "format": 1,
        "AP50": explanation.errors.ap50,
        "error_costs": explanation.errors.cost,
        "false_positives_cost": explanation.errors.false_positives_cost,
        "false_negatives_cost": explanation.errors.false_negatives_cost,
        "operating_score": explanation.operating_score,
        "best_F1": explanation.best_f1,
        "classes": [vars(one) for one in explanation.classes],
        "precision_at_recall": {str(iou): curve for iou, curve in explanation.curves.items()},
        "confusion": explanation.confusion.tolist(),
        "calibration": vars(explanation.calibration),
        "worst_images": [vars(one) for one in explanation.worst[:most]],
        "suspects": [label_error_row(explanation, one) for one in explanation.label_errors[:most]],
        "seconds": explanation.seconds,
    }
    if interval is not None:
        content["interval"] = {
            "confidence": interval.confidence,
            "AP": _numbers(interval.corrected, interval.low, interval.high),
            "classes": {str(key): _numbers(*one) for key, one in interval.per_category.items()},
        }
    write_json(path, content)


def _numbers(corrected: float, low: float, high: float) -> dict[str, float | None]:
    """Return them by name, None instead of NaN."""
    values = {"corrected": corrected, "low": low, "high": high}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def label_error_row(explanation: Explanation, error: LabelError) -> dict[str, Any]:
    """Return a label error with names of classes and boxes (xywh, pixels)."""
    matched = explanation.matched
    row: dict[str, Any] = {
        "kind": error.kind,
        "suspicion": error.suspicion,
        "image_id": error.image_id,
    }
    for key, columns, place in (
        ("annotated", matched.true, error.true),
        ("found", matched.found, error.found),
    ):
        if place is not None:
            row[key] = explanation.classes[columns.categories[place] - 1].name
            row[f"{key}_box"] = columns.boxes[place].round(2).tolist()
    return row


def operating_point(matched: Matched, errors: DetectionErrors) -> tuple[float, float]:
    """Return the score threshold with the highest F1 of all classes together, and that F1.

    Without a correct detection they are 1 and 0.
    """
    counted = errors.kind != NOT_COUNTED
    scores, correct = matched.scores[counted], errors.kind[counted] == CORRECT
    if not correct.any():
        return 1.0, 0.0
    order = np.argsort(-scores, kind="stable")
    scores, num_correct = scores[order], np.cumsum(correct[order])
    is_last = np.append(scores[1:] < scores[:-1], True)  # equal scores come together
    f1 = 2 * num_correct / (np.arange(1, len(scores) + 1) + (~matched.crowd).sum())
    best = int(np.argmax(np.where(is_last, f1, -1.0)))
    return float(scores[best]), float(f1[best])


def outcomes(
    matched: Matched, errors: DetectionErrors, operating_score: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return which detections from the operating score on are wrong (M), and what is found (A)."""
    sure = matched.scores >= operating_score
    by = errors.found_by
    return (errors.kind >= 0) & sure, (by >= 0) & np.append(sure, False)[by]


def worst_images(
    matched: Matched, errors: DetectionErrors, operating_score: float
) -> tuple[WorstImage, ...]:
    """Return the images with errors at the operating score: most errors first, then by id."""
    wrong, found = outcomes(matched, errors, operating_score)
    length = len(matched.image_ids)
    num_false = np.bincount(matched.found.images[wrong] - 1, minlength=length)
    num_missed = np.bincount(matched.true.images[~matched.crowd & ~found] - 1, minlength=length)
    order = np.argsort(-(num_false + num_missed), kind="stable")
    return tuple(
        WorstImage(matched.image_ids[i], int(num_false[i]), int(num_missed[i]))
        for i in order
        if num_false[i] + num_missed[i] > 0
    )


def _classes(
    matched: Matched, errors: DetectionErrors, names: Sequence[str], operating_score: float
) -> tuple[ClassMetrics, ...]:
    tables = matched.evaluation.eval
    assert tables is not None
    precision, recall = tables["precision"], tables["recall"]  # T R K A D and T K A D
    num_classes = len(names)
    own = matched.found.categories - 1
    counted = errors.kind != NOT_COUNTED
    sure = counted & (matched.scores >= operating_score)
    true = np.bincount(matched.true.categories[~matched.crowd] - 1, minlength=num_classes)
    total = np.bincount(own[counted], minlength=num_classes)
    at = np.bincount(own[sure], minlength=num_classes)
    right = np.bincount(own[sure & (errors.kind == CORRECT)], minlength=num_classes)
    found = []
    for k, (category_id, name) in enumerate(zip(matched.category_ids, names, strict=True)):
        table = precision[:, :, k, :, TOP100]
        has = true[k] > 0
        found.append(
            ClassMetrics(
                category_id,
                name,
                int(true[k]),
                int(total[k]),
                _mean(table[:, :, ALL]),
                _mean(table[AP50_INDEX, :, ALL]),
                _mean(table[AP75_INDEX, :, ALL]),
                {size: _mean(table[:, :, area]) for size, area in SIZES.items()},
                _mean(recall[:, k, ALL, TOP100]),
                float(right[k] / at[k]) if at[k] else -1.0,
                float(right[k] / true[k]) if has else -1.0,
                dict(zip((*KINDS, "missed"), errors.counts[k].tolist(), strict=True)),
                tuple(table[AP50_INDEX, :, ALL].round(4).tolist()) if has else (),
            )
        )
    return tuple(found)


def _curves(matched: Matched) -> dict[float, tuple[float, ...]]:
    tables = matched.evaluation.eval
    assert tables is not None
    precision = tables["precision"][:, :, :, ALL, TOP100]  # T R K
    has = (precision[0] > -1).all(0)
    if not has.any():
        return {}
    return {
        iou: tuple(precision[index][:, has].mean(1).round(4).tolist())
        for iou, index in CURVE_INDICES.items()
    }


def _calibration(matched: Matched, found: DetectionErrors) -> Calibration:
    counted = found.kind != NOT_COUNTED
    scores, correct = matched.scores[counted], found.kind[counted] == CORRECT
    if len(scores) and not 0 <= scores.min() <= scores.max() <= 1:
        raise ValueError(f"scores reach from {scores.min():g} to {scores.max():g}, not in 0..1")
    sure = scores >= CONFIDENT_FROM
    errors_of = partial(hotcoco_metrics.calibration_error, n_bins=NUM_BINS)
    error, largest = errors_of(scores, correct)
    confident = errors_of(scores[sure], correct[sure])[0] if sure.any() else -1.0
    bins = hotcoco_metrics.calibration_curve(scores, correct, n_bins=NUM_BINS)
    rows = tuple((one["avg_confidence"], one["avg_accuracy"], one["count"]) for one in bins)
    return Calibration(error, largest, confident, rows)


def _mean(values: Iterable[float] | np.ndarray) -> float:
    """Return the mean of the defined values, or -1."""
    defined = np.asarray(values)
    defined = defined[defined > -1]
    return float(defined.mean()) if defined.size else -1.0
