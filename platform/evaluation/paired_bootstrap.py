"""The paired half-sample bootstrap: is model B better than model A, and by how much?

The images of an evaluation are a sample. Half-samples of them, the same for both models, show how
much the difference in AP would vary with other images of the same kind, and by how much AP of few
images is too high. ap_interval.py makes an interval of them. The AP of a half-sample is exactly the
COCO AP of a data set with these images. It is computed from one match table, without matching
again. The interval does not cover other training seeds; a study with several seeds does
(platform/study).
"""

# M models   K categories   T IoU thresholds   I images   B half-samples   Q metrics: AP AP50 AP75

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deta.platform.evaluation.ap_interval import (
    DIFFERENCE_PRIOR,
    ApSpread,
    DifferenceSpread,
    Spread,
    mean_center,
    mean_interval,
    p_values,
)
from deta.platform.evaluation.coco_metrics import AP50_INDEX, AP75_INDEX
from deta.platform.evaluation.match_table import AREA_RANGES, MatchTable, match_table
from deta.platform.evaluation.weighted_ap import ApTable, weighted_ap

METRICS = ("AP", "AP50", "AP75")
# Below these an interval would say nothing: docs/EVALUATION.md has what was measured.
FEWEST_IMAGES = 20
FEWEST_CLASS_IMAGES = 5  # with the category


@dataclass(frozen=True)
class CategoryDifference:
    """B minus A in the AP of one category, 0..1. NaN if no image has the category."""

    ap_a: float
    ap_b: float
    difference: float
    low: float  # NaN if too few images have the category
    high: float
    p_value: float  # of this category alone
    p_adjusted: float  # Benjamini-Hochberg over all categories
    num_images: int  # with the category
    num_boxes: int
    corrected: float = math.nan  # difference, without the bias of few images


@dataclass(frozen=True)
class MetricDifference:
    """B minus A in one metric of the evaluation, 0..1."""

    value_a: float
    value_b: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """B minus A in AP, 0..1, with an interval."""

    ap_a: float
    ap_b: float
    difference: float
    low: float  # NaN if there are too few images
    high: float
    p_value: float  # two-sided
    per_category: dict[Any, CategoryDifference]  # by category id
    resamples: int  # half-samples
    seconds: float
    confidence: float = 0.95
    seed: int = 0
    num_images: int = 0
    others: tuple[tuple[str, MetricDifference], ...] = ()  # AP50 and AP75
    corrected: float = math.nan  # difference, without the bias of few images

    @property
    def no_interval(self) -> str:
        """Return why there is no interval; empty if there is one, or no box to find."""
        if math.isnan(self.difference) or not math.isnan(self.low):
            return ""
        return _too_few(self.num_images)


@dataclass(frozen=True)
class ApInterval:
    """AP of one model, 0..1, with its interval over images."""

    ap: float  # NaN if there is no box to find
    corrected: float  # without the bias of few images
    low: float  # NaN if there are too few images
    high: float
    num_images: int
    per_category: dict[Any, tuple[float, float, float]]  # corrected, low, high, by category id
    confidence: float = 0.95

    def text(self) -> str:
        """Return the interval in points of AP for people: "95 % interval over images 73 to 77"."""
        if math.isnan(self.ap):
            return "no box to find"
        if math.isnan(self.low):
            return _too_few(self.num_images)
        text = (
            f"{100 * self.confidence:g} % interval over images {100 * self.low:.1f} to "
            f"{100 * self.high:.1f}"
        )
        if f"{100 * self.corrected:.1f}" == f"{100 * self.ap:.1f}":
            return text
        return f"{text}; corrected for few images {100 * self.corrected:.1f}"


def half_sample(num_images: int, seed: int, index: int) -> np.ndarray:
    """Return which images are in a half-sample: I zeros and ones. Each odd one completes the last.

    They depend only on the seed and the index of the half-sample, not on the process that draws it.
    """
    order = np.random.default_rng([seed, index // 2]).permutation(num_images)
    chosen = np.zeros(num_images, np.int64)
    chosen[order[: num_images // 2]] = 1
    return 1 - chosen if index % 2 else chosen


def paired_difference(
    ground_truth: Mapping[str, Any],
    results_a: Sequence[Mapping[str, Any]],
    results_b: Sequence[Mapping[str, Any]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Return the difference in AP of two models on the same images, with its interval.

    The p-value is the smallest error level at which the interval excludes 0.

    Args:
        ground_truth: a COCO dict of the evaluated images.
        results_a, results_b: COCO results lists of the two models.
        resamples: number of half-samples.

    Raises:
        ValueError: as for `match_table`; there are no images; a number is out of range.
    """
    began_s = time.perf_counter()
    tables = [match_table(ground_truth, one, AREA_RANGES[:1]) for one in (results_a, results_b)]
    found = difference_of_tables(*tables, resamples=resamples, seed=seed, confidence=confidence)
    return replace(found, seconds=time.perf_counter() - began_s)


def difference_of_tables(
    a: MatchTable,
    b: MatchTable,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> PairedDifference:
    """Return the difference of two models from their match tables; see `paired_difference`."""
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples={resamples} must be at least 2, and confidence={confidence} in 0..1"
        )
    began_s = time.perf_counter()
    tables = (a, b)
    whole, halves = _half_samples(tables, seed, resamples)  # M Q K and B M Q K
    num_images = len(tables[0].image_ids)
    shown, num_boxes = _counts(tables[0])
    metrics = []
    for q in range(len(METRICS)):
        spread = _difference_spread(whole[:, q], halves[:, :, q], shown, num_images)
        value_a, value_b = (_mean(one) for one in whole[:, q])
        ends = _interval(spread, confidence)
        metrics.append((spread, MetricDifference(value_a, value_b, value_b - value_a, *ends)))
    spread, main = metrics[0]
    return PairedDifference(
        ap_a=main.value_a,
        ap_b=main.value_b,
        difference=main.difference,
        low=main.low,
        high=main.high,
        p_value=_p_value(spread, num_images),
        per_category=_categories(tables[0], whole[:, 0], spread, num_boxes, confidence),
        resamples=resamples,
        seconds=time.perf_counter() - began_s,
        confidence=confidence,
        seed=seed,
        num_images=num_images,
        others=tuple((name, one) for name, (_, one) in zip(METRICS[1:], metrics[1:], strict=True)),
        corrected=mean_center(spread),
    )


def ap_interval(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> ApInterval:
    """Return the interval of one model's AP over images, and that of each category.

    Half-samples are drawn as for `paired_difference`.

    Raises:
        ValueError: as for `match_table`, or there are no images.
    """
    table = match_table(ground_truth, results, AREA_RANGES[:1])
    return interval_of_table(table, resamples=resamples, seed=seed, confidence=confidence)


def interval_of_table(
    table: MatchTable, *, resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> ApInterval:
    """Return the interval of one model from its match table; see `ap_interval`."""
    whole, halves = _half_samples([table], seed, resamples)
    shown, _ = _counts(table)
    num_images = len(table.image_ids)
    spread = ApSpread.of(whole[0, 0], halves[:, 0, 0], shown, num_images)
    low, high = _category_ends(spread, shown, confidence)
    return ApInterval(
        _mean(whole[0, 0]),
        mean_center(spread),
        *_interval(spread, confidence),
        num_images,
        {
            key: (float(spread.center[k]), float(low[k]), float(high[k]))
            for k, key in enumerate(table.category_ids)
        },
        confidence,
    )


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that, of those below q, an expected share of at most q is false.

    Use it for "which of 80 classes changed?", where a few false positives among many are tolerable.
    Holm's correction, which avoids every false positive, would hide most changes. NaN stays NaN
    and does not count.

    Source: Benjamini and Hochberg 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x
    """
    from scipy.stats import false_discovery_control  # here, since it takes a second to import

    adjusted = np.array(p_values, np.float64)
    given = ~np.isnan(adjusted)
    if given.any():
        adjusted[given] = false_discovery_control(adjusted[given])
    return adjusted.tolist()


def _half_samples(
    tables: Sequence[MatchTable], seed: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the metrics by category of all images (M Q K) and of half-samples (B M Q K).

    NaN where there is no box to find.
    """
    num_images = len(tables[0].image_ids)
    if num_images == 0:
        raise ValueError("the ground truth lists no images, so there is nothing to compare")
    prepared = [ApTable.build(table, 1) for table in tables]

    def metrics(weights: np.ndarray) -> np.ndarray:
        ap = np.stack([weighted_ap(table, weights) for table in prepared])  # M K T
        return np.stack([ap.mean(axis=2), ap[..., AP50_INDEX], ap[..., AP75_INDEX]], axis=1)

    halves = [metrics(half_sample(num_images, seed, index)) for index in range(number)]
    return metrics(np.ones(num_images, np.int64)), np.stack(halves)


def _difference_spread(
    whole: np.ndarray, halves: np.ndarray, shown: np.ndarray, num_images: int
) -> DifferenceSpread:
    a, b = (
        ApSpread.of(whole[m], halves[:, m], shown, num_images, prior=DIFFERENCE_PRIOR)
        for m in (0, 1)
    )
    return DifferenceSpread.of(a, b, halves[:, 0], halves[:, 1])


def _counts(table: MatchTable) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of images with each category and of its boxes: K each."""
    counts = table.truth_counts[0]
    category, image = table.truth_category[counts], table.truth_image[counts]
    num_categories = len(table.category_ids)
    shown = np.unique(category * len(table.image_ids) + image) // max(1, len(table.image_ids))
    return (
        np.bincount(shown, minlength=num_categories),
        np.bincount(category, minlength=num_categories),
    )


def _too_few(num_images: int) -> str:
    return f"{num_images} images are too few for an interval; it needs {FEWEST_IMAGES}"


def _mean(ap: np.ndarray) -> float:
    there = ap[~np.isnan(ap)]
    return float(there.mean()) if len(there) else math.nan


def _interval(spread: Spread, confidence: float) -> tuple[float, float]:
    if spread.total_images < FEWEST_IMAGES:
        return math.nan, math.nan
    return mean_interval(spread, confidence)


def _category_ends(
    spread: Spread, shown: np.ndarray, confidence: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    low, high = spread.interval(confidence)
    enough = shown >= FEWEST_CLASS_IMAGES
    return np.where(enough, low, np.nan), np.where(enough, high, np.nan)


def _categories(
    table: MatchTable,
    whole: np.ndarray,  # 2 K
    spread: DifferenceSpread,
    num_boxes: np.ndarray,
    confidence: float,
) -> dict[Any, CategoryDifference]:
    shown = spread.a.num_images
    low, high = _category_ends(spread, shown, confidence)
    found = p_values(lambda level: _category_ends(spread, shown, level), low.shape)
    found = np.maximum(found, 2.0 ** (1 - np.maximum(shown, 1)))
    adjusted = benjamini_hochberg(found.tolist())
    return {
        category_id: CategoryDifference(
            float(whole[0, k]),
            float(whole[1, k]),
            float(whole[1, k] - whole[0, k]),
            float(low[k]),
            float(high[k]),
            float(found[k]),
            adjusted[k],
            int(shown[k]),
            int(num_boxes[k]),
            float(spread.center[k]),
        )
        for k, category_id in enumerate(table.category_ids)
    }


def _p_value(spread: Spread, num_images: int) -> float:
    """Return the two-sided p-value; NaN if there is no box to find, or too few images.

    It is never less than a sign-flip test on the images could give: few images prove little,
    however much the models differ on them.
    """

    def interval(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = _interval(spread, float(confidence))
        return np.array(low), np.array(high)

    return max(float(p_values(interval, ())), 2.0 ** (1 - num_images))
