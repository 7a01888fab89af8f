"""Intervals from half-samples: by hand for few classes, and by theory for means."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deta.platform.evaluation.ap_interval import (
    AP_PRIOR,
    BIAS_FACTOR,
    DIFFERENCE_PRIOR,
    EDGE,
    SHARE_PRIOR,
    SMALLEST_LEVEL,
    ApSpread,
    DifferenceSpread,
    mean_center,
    mean_interval,
    p_values,
)

RNG = np.random.default_rng(7)
HALVES = np.clip(RNG.normal([0.6, 0.3], [0.05, 0.1], (200, 2)), 0, 1)
WHOLE = np.array([0.59, 0.28])
IMAGES = np.array([30, 6])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def expit(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_one_class_has_students_interval_in_the_logit() -> None:
    halves, whole = HALVES[:, :1], WHOLE[:1]
    spread = ApSpread.of(whole, halves, IMAGES[:1], 40)
    center = whole[0] - (halves.mean() - whole[0]) / (math.sqrt(2) - 1)
    half = stats.t.ppf(0.975, 29) * halves.std() / (center * (1 - center))
    wanted = (expit(logit(center) - half), expit(logit(center) + half))

    assert pytest.approx(1 / (math.sqrt(2) - 1)) == BIAS_FACTOR
    assert spread.center[0] == pytest.approx(center)
    assert [end[0] for end in spread.interval(0.95)] == pytest.approx(wanted)
    assert mean_interval(spread, 0.95) == pytest.approx(wanted)  # no other class, no covariance


def moderated(prior: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return centers, variances and degrees of freedom of the two classes."""
    center = WHOLE - BIAS_FACTOR * (HALVES.mean(axis=0) - WHOLE)
    own, freedom = HALVES.var(axis=0), np.array([29, 5])
    expected = center * (1 - center) / IMAGES
    factor = ((own / expected) * freedom).sum() / freedom.sum()
    prior_of = np.array([min(prior, 5), min(prior, 29)])  # the other class has no more
    return (
        center,
        (prior_of * factor * expected + freedom * own) / (prior_of + freedom),
        prior_of + freedom,
    )


def test_a_class_in_few_images_borrows_from_the_other() -> None:
    spread = ApSpread.of(WHOLE, HALVES, IMAGES, 40)
    center, variance, freedom = moderated(AP_PRIOR)

    assert spread.center == pytest.approx(center)
    assert spread.variance == pytest.approx(variance)
    assert spread.freedom == pytest.approx(freedom)


def test_the_mean_adds_lengths_as_squares_and_covariances() -> None:
    spread = ApSpread.of(WHOLE, HALVES, IMAGES, 40)
    low, high = spread.interval(0.9)
    covariance = 2 * np.cov(HALVES.T, bias=True)[0, 1] / 4
    extra = covariance * stats.t.ppf(0.95, 39) ** 2
    middle = spread.center.mean()
    wanted = (
        middle - math.sqrt(((spread.center - low) ** 2).sum() / 4 + extra),
        middle + math.sqrt(((high - spread.center) ** 2).sum() / 4 + extra),
    )
    assert mean_center(spread) == pytest.approx(middle)
    assert mean_interval(spread, 0.9) == pytest.approx(wanted)


def test_a_difference_scales_both_lengths_by_what_the_models_share() -> None:
    others = HALVES * 0.8 + RNG.normal(0, 0.02, HALVES.shape)
    a, b = (
        ApSpread.of(whole, halves, IMAGES, 40, prior=DIFFERENCE_PRIOR)
        for whole, halves in ((WHOLE, HALVES), (0.8 * WHOLE, others))
    )
    spread = DifferenceSpread.of(a, b, HALVES, others)
    _, variance, _ = moderated(DIFFERENCE_PRIOR)
    assert a.variance == pytest.approx(variance)
    share = (others - HALVES).var(axis=0) / (HALVES.var(axis=0) + others.var(axis=0))
    freedom = np.array([29, 5])
    pooled = (share * freedom).sum() / freedom.sum()
    prior = np.array([min(SHARE_PRIOR, 5), min(SHARE_PRIOR, 29)])
    share = (prior * pooled + freedom * share) / (prior + freedom)
    (low_a, high_a), (low_b, high_b) = a.interval(0.95), b.interval(0.95)
    down = np.sqrt(share * ((b.center - low_b) ** 2 + (high_a - a.center) ** 2))
    up = np.sqrt(share * ((high_b - b.center) ** 2 + (a.center - low_a) ** 2))

    low, high = spread.interval(0.95)
    assert spread.center == pytest.approx(b.center - a.center)
    assert low == pytest.approx(b.center - a.center - down)
    assert high == pytest.approx(b.center - a.center + up)


def test_the_variance_of_a_mean_over_images_is_that_of_theory() -> None:
    """Of a mean of n numbers it is s^2 / n, with n - 1 in s^2."""
    numbers = RNG.uniform(0.2, 0.9, 40)
    halves = np.array([numbers[RNG.permutation(40)[:20]].mean() for _ in range(20_000)])
    spread = ApSpread.of(np.array([numbers.mean()]), halves[:, None], np.array([40]), 40)

    assert spread.own[0] == pytest.approx(numbers.var(ddof=1) / 40, rel=0.03)
    assert spread.center[0] == pytest.approx(numbers.mean(), abs=0.002)  # no bias


def test_a_class_without_images_counts_nowhere() -> None:
    halves = np.column_stack([HALVES, np.full(200, np.nan)])
    spread = ApSpread.of(np.append(WHOLE, np.nan), halves, np.append(IMAGES, 0), 40)
    without = ApSpread.of(WHOLE, HALVES, IMAGES, 40)

    assert np.isnan(spread.interval(0.95)).tolist() == [[False, False, True]] * 2
    assert mean_interval(spread, 0.95) == pytest.approx(mean_interval(without, 0.95))
    assert mean_center(spread) == mean_center(without)
    nothing = ApSpread.of(np.array([np.nan]), np.full((4, 1), np.nan), np.array([0]), 40)
    assert math.isnan(mean_center(nothing))
    assert all(math.isnan(end) for end in mean_interval(nothing, 0.95))


def test_a_half_sample_without_the_class_is_left_out_of_its_own_variance() -> None:
    halves = HALVES.copy()
    halves[::4, 1] = np.nan
    spread = ApSpread.of(WHOLE, halves, IMAGES, 40)
    assert spread.own[1] == pytest.approx(np.nanvar(halves[:, 1]))
    shown = np.where(np.isnan(halves), 0, halves - np.nanmean(halves, axis=0))
    shown[:, 1] /= math.sqrt(0.75)
    wanted = shown.mean(axis=1).var() - spread.own.sum() / 4
    assert spread.covariance == pytest.approx(wanted)


@pytest.mark.parametrize(("ap", "side"), [(0.0, 0), (1.0, 1)])
def test_an_interval_at_the_edge_reaches_it(ap: float, side: int) -> None:
    halves = np.column_stack([np.full(200, ap), HALVES[:, 0]])
    spread = ApSpread.of(np.array([ap, 0.59]), halves, np.array([8, 30]), 40)
    ends = [end[0] for end in spread.interval(0.95)]

    assert ends[side] == ap
    assert 0 < abs(ends[1 - side] - ap) < 0.5


def test_a_higher_confidence_is_wider_and_p_is_where_zero_is_reached() -> None:
    spread = ApSpread.of(WHOLE, HALVES, IMAGES, 40)

    def interval(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = spread.interval(confidence)
        return low - 0.45, high - 0.45

    found = p_values(interval, (2,))
    for k, p in enumerate(found):
        low, high = interval(np.array(1 - p))
        assert min(abs(low[k]), abs(high[k])) == pytest.approx(0, abs=1e-6)
    assert found[0] < 0.05
    wide, narrow = spread.interval(0.99), spread.interval(0.9)
    assert (wide[0] < narrow[0]).all()
    assert (wide[1] > narrow[1]).all()


def test_the_mean_of_differences_has_the_covariance_of_the_differences() -> None:
    others = HALVES * 0.8 + RNG.normal(0, 0.02, HALVES.shape)
    a, b = (
        ApSpread.of(whole, halves, IMAGES, 40, prior=DIFFERENCE_PRIOR)
        for whole, halves in ((WHOLE, HALVES), (0.8 * WHOLE, others))
    )
    spread = DifferenceSpread.of(a, b, HALVES, others)
    assert spread.covariance == pytest.approx(2 * np.cov((others - HALVES).T, bias=True)[0, 1] / 4)
    assert spread.total_images == 40
    low, high = spread.interval(0.95)
    extra = spread.covariance * stats.t.ppf(0.975, 39) ** 2
    downwards, upwards = (((end - spread.center) ** 2).sum() / 4 for end in (low, high))
    middle = spread.center.mean()
    assert mean_interval(spread, 0.95) == pytest.approx((
        middle - math.sqrt(max(downwards + extra, downwards / 2)),
        middle + math.sqrt(max(upwards + extra, upwards / 2)),
    ))  # fmt: skip


def test_classes_that_make_up_for_each_other_halve_the_square_at_most() -> None:
    """What one class gains in a half-sample, the other one loses."""
    halves = np.column_stack([HALVES[:, 0], 1.2 - HALVES[:, 0]])
    spread = ApSpread.of(np.array([0.6, 0.6]), halves, np.array([30, 30]), 40)
    low, high = spread.interval(0.95)
    middle = spread.center.mean()
    assert spread.covariance == pytest.approx(-spread.own.sum() / 4)
    own = [((end - spread.center) ** 2).sum() / 4 for end in (low, high)]
    assert mean_interval(spread, 0.95) == pytest.approx(
        (middle - math.sqrt(own[0] / 2), middle + math.sqrt(own[1] / 2))
    )


def test_with_one_image_in_all_the_covariance_has_one_degree_of_freedom() -> None:
    spread = ApSpread.of(WHOLE, HALVES, IMAGES, 1)
    low, _ = spread.interval(0.95)
    extra = spread.covariance * stats.t.ppf(0.975, 1) ** 2
    wanted = spread.center.mean() - math.sqrt(((spread.center - low) ** 2).sum() / 4 + extra)
    assert mean_interval(spread, 0.95)[0] == pytest.approx(wanted)


def test_a_class_of_one_image_has_no_freedom_of_its_own() -> None:
    images = np.array([30, 1])
    spread = ApSpread.of(WHOLE, HALVES, images, 40)
    assert spread.freedom.tolist() == [29 + 0, 0 + min(AP_PRIOR, 29)]
    center = spread.center
    expected = center * (1 - center) / images
    factor = spread.own[0] / expected[0]  # the other class has no weight
    assert spread.variance == pytest.approx([spread.own[0], factor * expected[1]])
    difference = DifferenceSpread.of(spread, spread, HALVES, HALVES[::-1])
    share = (HALVES[::-1] - HALVES).var(axis=0) / (2 * HALVES.var(axis=0))
    assert difference.share == pytest.approx([share[0], share[0]])


def test_a_difference_of_a_class_that_is_not_there_is_not_a_number() -> None:
    halves = np.column_stack([HALVES, np.full(200, np.nan)])
    images = np.append(IMAGES, 0)
    spread = ApSpread.of(np.append(WHOLE, np.nan), halves, images, 40, prior=DIFFERENCE_PRIOR)
    found = DifferenceSpread.of(spread, spread, halves, halves[::-1])
    without = ApSpread.of(WHOLE, HALVES, IMAGES, 40, prior=DIFFERENCE_PRIOR)
    wanted = DifferenceSpread.of(without, without, HALVES, HALVES[::-1])
    assert found.share[:2] == pytest.approx(wanted.share)
    assert found.covariance == pytest.approx(wanted.covariance)
    assert np.isnan(found.interval(0.95)[0]).tolist() == [False, False, True]


def test_models_that_are_always_equal_differ_by_nothing() -> None:
    spread = ApSpread.of(WHOLE, HALVES, IMAGES, 40, prior=DIFFERENCE_PRIOR)
    same = DifferenceSpread.of(spread, spread, HALVES, HALVES)
    assert same.share.tolist() == [0.0, 0.0]
    assert [end.tolist() for end in same.interval(0.95)] == [[0.0, 0.0]] * 2
    assert mean_center(same) == 0.0


@pytest.mark.parametrize("ap", [0.0, 1.0])
def test_classes_that_never_vary_have_the_edge_of_the_scale(ap: float) -> None:
    halves = np.full((50, 1), ap)
    spread = ApSpread.of(np.array([ap]), halves, np.array([9]), 9)
    low, high = spread.interval(0.95)
    wanted = (0.0, EDGE) if ap == 0.0 else (1 - EDGE, 1.0)
    assert (low[0], high[0]) == pytest.approx(wanted, abs=1e-12)


def test_a_center_does_not_leave_the_scale() -> None:
    """The correction of the bias would: half-samples are better than the whole."""
    halves = np.column_stack([np.full(50, 0.1), np.full(50, 0.9)])
    spread = ApSpread.of(np.array([0.01, 0.99]), halves, np.array([9, 9]), 9)
    assert spread.center.tolist() == [0.0, 1.0]


def test_a_p_value_is_exact_from_the_smallest_level_to_one() -> None:
    """For normal intervals around these centers it is that of the normal distribution."""
    centers = np.array([[0.0, 1.0, -2.5], [4.0, np.nan, 60.0]])

    def interval(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert confidence.shape == centers.shape
        half = -stats.norm.ppf((1 - confidence) / 2)
        return centers - half, centers + half

    found = p_values(interval, (2, 3))
    wanted = 2 * stats.norm.sf(np.abs(centers))
    wanted[1, 2] = SMALLEST_LEVEL
    assert found == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def test_an_interval_that_ends_at_zero_does_not_exclude_it() -> None:
    def interval(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([0.0, -1.0, 1e-9]), np.array([1.0, 0.0, 1.0])

    assert p_values(interval, (3,)) == pytest.approx([1.0, 1.0, SMALLEST_LEVEL], rel=1e-6)


def test_a_class_needs_images_and_half_samples() -> None:
    halves = np.column_stack([HALVES, HALVES[:, 1], np.full(200, np.nan)])
    whole = np.append(WHOLE, [0.5, 0.5])
    with np.errstate(all="raise"):
        spread = ApSpread.of(whole, halves, np.append(IMAGES, [0, 5]), 40)
    assert np.isnan(spread.center).tolist() == [False, False, True, True]
    assert np.isnan(spread.variance).tolist() == [False, False, True, True]
    assert spread.freedom[:2].tolist() == [29 + min(AP_PRIOR, 5), 5 + min(AP_PRIOR, 29)]


def test_one_image_alone_has_no_interval() -> None:
    with np.errstate(all="raise"):
        spread = ApSpread.of(np.zeros(1), np.zeros((10, 1)), np.array([1]), 40)
    assert spread.center.tolist() == [0.0]
    assert math.isnan(spread.variance[0])
    assert [math.isnan(end[0]) for end in spread.interval(0.95)] == [True, True]
    other = ApSpread.of(np.ones(1), np.ones((10, 1)), np.array([1]), 40)
    assert [math.isnan(end[0]) for end in other.interval(0.95)] == [True, True]


def test_two_images_count_with_one_degree_of_freedom() -> None:
    images = np.array([2, 2])
    spread = ApSpread.of(WHOLE, HALVES, images, 2)
    expected = spread.center * (1 - spread.center) / images
    factor = (spread.own / expected).mean()
    assert spread.freedom.tolist() == [2.0, 2.0]
    assert spread.variance == pytest.approx((factor * expected + spread.own) / 2)


@pytest.mark.parametrize("ap", [EDGE, 1 - EDGE])
def test_the_edge_belongs_to_the_end_of_the_scale(ap: float) -> None:
    spread = ApSpread.of(np.array([ap]), np.full((4, 1), ap), np.array([9]), 9)
    low, high = spread.interval(0.95)
    assert (low[0], high[0]) == ((0.0, pytest.approx(EDGE)) if ap == EDGE else (
        pytest.approx(1 - EDGE), 1.0))  # fmt: skip


def test_no_class_has_no_covariance() -> None:
    nothing = ApSpread.of(np.array([np.nan]), np.full((4, 1), np.nan), np.array([0]), 40)
    assert nothing.covariance == 0.0


@pytest.mark.filterwarnings("error")
def test_the_mean_of_no_class_is_no_number_without_a_warning() -> None:
    nothing = ApSpread.of(np.array([np.nan]), np.full((4, 1), np.nan), np.array([0]), 40)
    assert math.isnan(mean_center(nothing))
