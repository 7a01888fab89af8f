"""The learning-rate schedule and early stopping."""

from __future__ import annotations

import pytest

from deta.platform.learning.schedule import ScheduleConfig, num_without_gain


def test_the_rate_drops_tenfold_when_its_epoch_begins():
    schedule = ScheduleConfig(epochs=12, lr_drop_epochs=(10.0,))
    factors = [schedule.lr_factor(epoch) for epoch in (0, 9.9999, 10, 11.9)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1])


def test_cosine_falls_from_one_to_nothing_after_its_warm_up():
    schedule = ScheduleConfig(epochs=10, lr_drop_epochs=(), warmup_epochs=2.0, shape="cosine")
    factors = [schedule.lr_factor(epoch) for epoch in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("aps", "min_delta", "expected"),
    [
        ([], 0.0, 0),
        ([0.0], 0.0, 0),
        ([10, 20, 30], 0.0, 0),
        ([10, 10, 10], 0.0, 2),  # equal is not better
        ([10, 30, 20, 29], 0.0, 2),
        ([10, 10.4, 10.8], 0.5, 0),  # small steps add up to a gain over the best that counted
        ([10, 10.4, 10.5], 0.5, 2),
        ([0, 0, 0, 5], 0.0, 0),
    ],
)
def test_evaluations_without_gain_are_counted_from_the_best(aps, min_delta, expected):
    assert num_without_gain(aps, min_delta) == expected


def test_without_patience_nothing_stops():
    assert not ScheduleConfig().is_exhausted([5.0] * 100)
    assert ScheduleConfig(patience=3).is_exhausted([5.0] * 4)
    assert not ScheduleConfig(patience=3).is_exhausted([5.0] * 3)
