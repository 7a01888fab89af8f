"""Confidence intervals of AP over images, from the AP of half-samples.

A half-sample is half of the images, drawn without replacement; its complement is another one. It
has three advantages over a bootstrap resample, which repeats images:

- AP of few images is too high, since precision is the highest one from each recall on. AP of half
  of them is higher still, which shows the bias. It is subtracted. (A resample shows less than half
  of the bias, since it repeats the images with their luck.)
- The variance of AP among half-samples is that of AP itself, with n - 1 degrees of freedom.
- No image comes twice, so no copies of detections tie.

What a class with few images lacks is borrowed from the others: its variance is a weighted mean of
its own and of what the other classes have for their AP (1 - AP) and number of images, as limma
moderates the variances of genes (Smyth 2004, https://doi.org/10.2202/1544-6115.1027). The interval
is Student's, in the logit of AP, so it stays in 0..1 and is longer towards 0.5. Intervals of sums
and differences have the lengths of their parts' intervals, added as squares on each side (MOVER:
Zou and Donner 2008, https://doi.org/10.1002/sim.3095), with the covariances that half-samples show.

benchmarks/interval_coverage.py measures how often such an interval covers the truth.
"""

# K categories   B half-samples

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import expit, logit, stdtrit  # scipy.stats takes a second to import

# The bias falls with the root of the number of images, so that of all images is this often the
# difference between half of them and all.
BIAS_FACTOR = 1 / (2**0.5 - 1)
# For how many images the variance of the other classes counts. That of a difference varies more
# from class to class, and its share in that of the two models less.
AP_PRIOR, DIFFERENCE_PRIOR, SHARE_PRIOR = 5, 3, 5
EDGE = 0.02  # an AP nearer to 0 or 1 is moved here for its logit
SMALLEST_LEVEL = 1e-12  # of a p-value


class Spread(Protocol):
    """Estimates by category, and their joint variation."""

    @property
    def center(self) -> np.ndarray:
        """K, corrected for the bias of few images; NaN without a box."""

    @property
    def covariance(self) -> float:
        """Return the part of the variance of the categories' mean that is not their variances."""

    @property
    def total_images(self) -> int:
        """Return the number of images, with or without boxes."""

    def interval(self, confidence: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the intervals, K each; NaN without a box."""


@dataclass(frozen=True)
class ApSpread:
    """AP by category, and its variation over images."""

    center: np.ndarray  # K, in 0..1
    own: np.ndarray  # K, variance from the category's half-samples alone
    variance: np.ndarray  # K, moderated by the other categories
    freedom: np.ndarray  # K, degrees of freedom of `variance`
    num_images: np.ndarray  # K, with a box of the category
    covariance: float
    total_images: int

    @staticmethod
    def of(
        whole: np.ndarray,
        halves: np.ndarray,
        num_images: np.ndarray,
        total_images: int,
        *,
        prior: int = AP_PRIOR,
    ) -> ApSpread:
        """Estimate it from the AP of all images (K) and of half-samples (B K), NaN without a box.

        Args:
            num_images: K, with a box of the category.
            total_images: with or without a box.
            prior: `DIFFERENCE_PRIOR` if it becomes a part of a difference.
        """
        there = (num_images > 0) & ~np.isnan(halves).all(axis=0)
        center, own = _center(whole, halves, there), _variance(halves)
        freedom = np.where(there, np.maximum(num_images - 1.0, 0), 0)
        inside = np.clip(center, EDGE, 1 - EDGE)
        expected = inside * (1 - inside) / np.maximum(num_images, 1)  # but for one factor
        factor = _weighted_mean(own / expected, freedom)
        others = _prior(prior, freedom)
        variance = _ratio(others * factor * expected + freedom * own, others + freedom)
        return ApSpread(
            center, own, np.where(there, variance, np.nan), others + freedom, num_images,
            _covariance(halves, own, there), total_images,
        )  # fmt: skip

    def interval(self, confidence: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = np.clip(self.center, EDGE, 1 - EDGE)
        middle = logit(inside)
        half = _student(confidence, self.freedom) * np.sqrt(self.variance) / inside / (1 - inside)
        low, high = expit(middle - half), expit(middle + half)
        low = np.where(self.center <= EDGE, 0.0, low)
        high = np.where(self.center >= 1 - EDGE, 1.0, high)
        gone = np.isnan(self.variance)
        return np.where(gone, np.nan, low), np.where(gone, np.nan, high)


@dataclass(frozen=True)
class DifferenceSpread:
    """B minus A in AP by category, of the same images."""

    a: ApSpread
    b: ApSpread
    share: np.ndarray  # K, variance of the difference in that of two independent models
    covariance: float

    @staticmethod
    def of(
        a: ApSpread, b: ApSpread, halves_a: np.ndarray, halves_b: np.ndarray
    ) -> DifferenceSpread:
        halves = halves_b - halves_a
        there, own = ~np.isnan(a.variance), _variance(halves)
        freedom = np.where(there, np.maximum(a.num_images - 1.0, 0), 0)
        both = a.own + b.own
        share = np.nan_to_num(_ratio(own, both))
        prior = _prior(SHARE_PRIOR, freedom)
        share = _ratio(prior * _weighted_mean(share, freedom) + freedom * share, prior + freedom)
        return DifferenceSpread(a, b, share, _covariance(halves, own, there))

    @property
    def center(self) -> np.ndarray:
        return self.b.center - self.a.center

    @property
    def total_images(self) -> int:
        return self.a.total_images

    def interval(self, confidence: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (low_a, high_a), (low_b, high_b) = self.a.interval(confidence), self.b.interval(confidence)
        down = np.hypot(self.b.center - low_b, high_a - self.a.center)
        up = np.hypot(high_b - self.b.center, self.a.center - low_a)
        scale = np.sqrt(self.share)
        return self.center - scale * down, self.center + scale * up


def mean_center(spread: Spread) -> float:
    """Return the mean over the categories that have boxes; NaN if none has."""
    there = spread.center[~np.isnan(spread.center)]
    return float(there.mean()) if len(there) else float("nan")


def mean_interval(spread: Spread, confidence: float) -> tuple[float, float]:
    """Return the interval of the mean over the categories that have boxes; NaN if none has."""
    low, high = spread.interval(confidence)
    there = ~np.isnan(low)
    if not there.any():
        return float("nan"), float("nan")
    center = spread.center[there]
    extra = spread.covariance * _student(confidence, max(1, spread.total_images - 1)) ** 2
    ends = []
    for sign, end in ((-1, low[there]), (1, high[there])):
        own = float(((end - center) ** 2).sum()) / len(center) ** 2
        ends.append(float(center.mean()) + sign * np.sqrt(max(own + float(extra), own / 2)))
    return float(ends[0]), float(ends[1])


def p_values(
    interval: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], shape: tuple[int, ...]
) -> np.ndarray:
    """Return the smallest level 1 - confidence at which each interval excludes 0; NaN if undefined.

    Args:
        interval: from confidences of this shape to the ends.
    """
    below, above = np.full(shape, np.log(SMALLEST_LEVEL)), np.zeros(shape)  # logs of levels
    for _ in range(40):
        middle = (below + above) / 2
        low, high = interval(1 - np.exp(middle))
        excludes = (low > 0) | (high < 0)
        above, below = np.where(excludes, middle, above), np.where(excludes, below, middle)
    return np.where(np.isnan(low), np.nan, np.exp(above))


def _student(confidence: float | np.ndarray, freedom: float | np.ndarray) -> np.ndarray:
    return np.asarray(-stdtrit(freedom, (1 - np.asarray(confidence)) / 2))


def _center(whole: np.ndarray, halves: np.ndarray, there: np.ndarray) -> np.ndarray:
    bias = BIAS_FACTOR * (_mean(halves) - whole)
    return np.where(there, np.clip(whole - bias, 0, 1), np.nan)


def _mean(halves: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a category without a box
        return np.nanmean(halves, axis=0)


def _variance(halves: np.ndarray) -> np.ndarray:
    """Return the variance of the half-samples that show the category, else 0: K."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nan_to_num(np.nanvar(halves, axis=0))


def _covariance(halves: np.ndarray, own: np.ndarray, there: np.ndarray) -> float:
    """Return the variance of the mean of the categories less that if they were independent.

    A half-sample without a category counts as that category's mean, and the others for more.
    """
    if not there.any():
        return 0.0
    values = halves[:, there]
    shown = ~np.isnan(values)
    apart = np.where(shown, values - _mean(values), 0.0) / np.sqrt(shown.mean(axis=0))
    return float(apart.mean(axis=1).var() - own[there].sum() / int(there.sum()) ** 2)


def _prior(most: float, freedom: np.ndarray) -> np.ndarray:
    """Return for how many images the other categories count: not more than they have."""
    return np.minimum(most, freedom.sum() - freedom)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0)


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = float(weights.sum())
    chosen = weights > 0
    return float((values[chosen] * weights[chosen]).sum()) / total if total else 0.0
