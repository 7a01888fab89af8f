"""The paired bootstrap over images: is model B better than model A, and by how much?

The images of an evaluation are a sample. Resampling them with replacement, with the same resample
for both models, shows how much the difference in AP would vary with other images of the same kind.
The AP of a resample is exactly the COCO AP of a data set with each image as often as it was drawn,
copies adjacent. It is computed from one match table, without matching again. The interval does not
cover other training seeds; a study with several seeds does (platform/study).
"""

# M models   K categories   T IoU thresholds   I images   B resamples

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control

from deta.platform.evaluation.coco_metrics import AP50_INDEX, AP75_INDEX
from deta.platform.evaluation.match_table import AREA_RANGES, MatchTable, match_table
from deta.platform.evaluation.weighted_ap import ApTable, weighted_ap


@dataclass(frozen=True)
class CategoryDifference:
    """B minus A in the AP of one category, 0..1. NaN if no image has the category."""

    ap_a: float
    ap_b: float
    difference: float
    low: float
    high: float
    p_value: float  # of this category alone
    p_adjusted: float  # Benjamini-Hochberg over all categories
    num_images: int  # with the category; an interval from a few images is unreliable
    num_boxes: int


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
    """B minus A in AP, 0..1, with a percentile interval."""

    ap_a: float
    ap_b: float
    difference: float
    low: float
    high: float
    p_value: float  # two-sided
    per_category: dict[Any, CategoryDifference]  # by category id
    resamples: int
    seconds: float
    confidence: float = 0.95
    seed: int = 0
    num_images: int = 0
    others: tuple[tuple[str, MetricDifference], ...] = ()  # AP50 and AP75


def multiplicities(num_images: int, seed: int, index: int) -> np.ndarray:
    """Return how often each image is in a resample: I integers with the sum I.

    They depend only on the seed and the index of the resample, not on the process that draws it.
    """
    draw = np.random.default_rng([seed, index]).integers(num_images, size=num_images)
    return np.bincount(draw, minlength=num_images)


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

    A category without a box in a resample is left out of that resample's mean, for both models. The
    interval lies between two quantiles of the differences. The p-value is the smallest error level
    at which such an interval excludes 0.

    Args:
        ground_truth: a COCO dict of the evaluated images.
        results_a, results_b: COCO results lists of the two models.

    Raises:
        ValueError: as for `match_table`; there are no images; a number is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"resamples={resamples} must be at least 1, and confidence={confidence} in 0..1"
        )
    began_s = time.perf_counter()
    tables = [match_table(ground_truth, one, AREA_RANGES[:1]) for one in (results_a, results_b)]
    whole, drawn = _resample(tables, seed, resamples)
    num_images, num_categories = len(tables[0].image_ids), len(tables[0].category_ids)
    metrics = [
        MetricDifference(a, b, b - a, *_interval(_differences(drawn[..., place]), confidence))
        for place, (a, b) in enumerate(_means(whole).T.tolist(), start=num_categories)
    ]
    main = metrics[0]
    return PairedDifference(
        ap_a=main.value_a,
        ap_b=main.value_b,
        difference=main.difference,
        low=main.low,
        high=main.high,
        p_value=_p_value(_differences(drawn[..., num_categories]), main.difference, num_images),
        per_category=_categories(
            tables[0], whole.mean(axis=2), drawn[..., :num_categories], confidence
        ),
        resamples=resamples,
        seconds=time.perf_counter() - began_s,
        confidence=confidence,
        seed=seed,
        num_images=num_images,
        others=tuple(zip(("AP50", "AP75"), metrics[1:], strict=True)),
    )


def ap_interval(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Return the bootstrap interval of one model's AP over images, 0..1.

    NaN if there is no box to find. Resamples are drawn as for `paired_difference`.

    Raises:
        ValueError: as for `match_table`, or there are no images.
    """
    table = match_table(ground_truth, results, AREA_RANGES[:1])
    _, drawn = _resample([table], seed, resamples)
    ap = drawn[:, 0, len(table.category_ids)]
    return _interval(ap[~np.isnan(ap)], confidence)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that, of those below q, an expected share of at most q is false.

    Use it for "which of 80 classes changed?", where a few false positives among many are tolerable.
    Holm's correction, which avoids every false positive, would hide most changes. NaN stays NaN
    and does not count.

    Source: Benjamini and Hochberg 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x
    """
    adjusted = np.array(p_values, np.float64)
    given = ~np.isnan(adjusted)
    if given.any():
        adjusted[given] = false_discovery_control(adjusted[given])
    return adjusted.tolist()


def _resample(
    tables: Sequence[MatchTable], seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return AP of all images (M K T), and of each resample by category, then AP, AP50 and AP75.

    Returns:
        M K T and B M K+3, for M models. NaN where there is no box to find.
    """
    num_images = len(tables[0].image_ids)
    if num_images == 0:
        raise ValueError("the ground truth lists no images, so there is nothing to compare")
    draws = [multiplicities(num_images, seed, index) for index in range(resamples)]
    prepared = [ApTable.build(table, max(int(draw.max()) for draw in draws)) for table in tables]
    once = np.ones(num_images, np.int64)
    whole, *drawn = (
        np.stack([weighted_ap(table, weights) for table in prepared]) for weights in (once, *draws)
    )
    rows = [np.concatenate([ap.mean(axis=2), _means(ap)], axis=1) for ap in drawn]
    return whole, np.stack(rows)


def _means(ap: np.ndarray) -> np.ndarray:
    """Return AP, AP50 and AP75 over the categories that have boxes: M K T to M 3, NaN if none."""
    there = ap[:, ~np.isnan(ap[0, :, 0])]
    if not there.shape[1]:
        return np.full((len(ap), 3), np.nan)
    by_threshold = there.mean(axis=1)  # M T
    return np.column_stack([by_threshold.mean(axis=1), by_threshold[:, [AP50_INDEX, AP75_INDEX]]])


def _differences(drawn: np.ndarray) -> np.ndarray:
    """Return B minus A for each resample, without those that have no box to find: B 2 to B."""
    difference = drawn[:, 1] - drawn[:, 0]
    return difference[~np.isnan(difference)]


def _interval(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    if not len(drawn):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _categories(
    table: MatchTable, whole: np.ndarray, drawn: np.ndarray, confidence: float
) -> dict[Any, CategoryDifference]:
    """Return each category's difference. `whole` is 2 K, `drawn` is B 2 K."""
    counts = table.truth_counts[0]
    category, image = table.truth_category[counts], table.truth_image[counts]
    num_categories = len(table.category_ids)
    num_boxes = np.bincount(category, minlength=num_categories)
    shown = np.unique(category * len(table.image_ids) + image) // max(1, len(table.image_ids))
    num_images = np.bincount(shown, minlength=num_categories)
    gain = whole[1] - whole[0]
    differences = [_differences(drawn[..., k]) for k in range(num_categories)]
    p_values = [
        _p_value(values, float(gain[k]), int(num_images[k])) for k, values in enumerate(differences)
    ]
    adjusted = benjamini_hochberg(p_values)
    return {
        category_id: CategoryDifference(
            float(whole[0, k]),
            float(whole[1, k]),
            float(gain[k]),
            *_interval(differences[k], confidence),
            p_values[k],
            adjusted[k],
            int(num_images[k]),
            int(num_boxes[k]),
        )
        for k, category_id in enumerate(table.category_ids)
    }


def _p_value(differences: np.ndarray, difference: float, num_images: int) -> float:
    """Return the two-sided p-value; NaN if there is no box to find.

    It is counted among the resamples if at least ten lie on either side of 0. Otherwise it is from
    the normal distribution with their standard deviation, since many categories need finer steps
    than 1,000 resamples have. It is never less than a sign-flip test on the images could give: two
    images prove nothing, however much the models differ on them.
    """
    if not len(differences) or math.isnan(difference):
        return math.nan
    beyond = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p = 2 * (int(beyond) + 1) / (len(differences) + 1)
    if beyond < 10:
        spread = float(differences.std())
        p = min(p, math.erfc(abs(difference) / spread / math.sqrt(2)) if spread > 0 else 0.0)
    return min(1.0, max(p, 2.0 ** (1 - num_images)))
