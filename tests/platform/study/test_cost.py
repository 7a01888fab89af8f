"""Hours, money and the front of what is worth it."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deta.platform.study.cost import PRICES, CostPoint, Price, estimate, pareto, price_of

few = settings(max_examples=40, deadline=None)  # the machine may be busy


def test_an_estimate_is_samples_over_speed():
    # 12 epochs of COCO at 24.2 images/s on 8 GPUs: the published 16.3 hours.
    cost = estimate(24.2, 12 * 118_287, 8, "Quadro RTX 6000", {"RTX 6000": Price(0.5)})

    assert cost.hours == pytest.approx(16.29, abs=0.01)
    assert cost.gpu_hours == pytest.approx(8 * cost.hours)
    assert cost.price == pytest.approx(cost.gpu_hours / 2)
    now = datetime(2026, 11, 21, 8, tzinfo=UTC)
    assert cost.eta(now).isoformat(timespec="minutes") == "2026-11-22T00:17+00:00"


def test_start_and_evaluations_count():
    cost = estimate(10, 36_000, 2, "CPU", overhead_s=1800)

    assert (cost.hours, cost.gpu_hours, cost.price) == (1.5, 3.0, None)


def test_no_price_is_made_up():
    assert all(price.per_gpu_hour is None for price in PRICES.values())
    assert "price not set" in str(estimate(10, 1000, 1, "NVIDIA H200"))
    assert "price not set" in str(estimate(10, 1000, 1, "a GPU nobody knows"))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Quadro RTX 6000", "RTX 6000"),
        ("Tesla T4", None),
    ],
)
def test_a_price_is_found_by_the_drivers_name(device: str, name: str | None):
    assert price_of(device) is (None if name is None else PRICES[name])


def test_the_longest_name_wins():
    own = {"A100": Price(1.0), "A100 80GB": Price(2.0)}

    found = price_of("NVIDIA A100 80GB PCIe", own)

    assert found == own["A100 80GB"]


def test_several_trials_at_a_time():
    one = estimate(1, 3600, 2, "X", {"X": Price(3.0)})

    all_of_them = one.times(7, at_once=2)

    assert (all_of_them.hours, all_of_them.gpu_hours, all_of_them.price) == (4, 14, 42)


@pytest.mark.parametrize("speed", [0, -1, math.nan, math.inf])
def test_a_speed_that_is_none_is_refused(speed: float):
    with pytest.raises(ValueError, match="measure it with a probe"):
        estimate(speed, 100, 1, "CPU")


def test_a_price_is_a_number():
    with pytest.raises(ValueError, match="per_gpu_hour"):
        Price(-1)


numbers = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 1))
points_of = st.lists(st.builds(CostPoint, st.text(max_size=3), numbers, numbers), max_size=30)


@few
@given(points_of)
def test_the_front_is_what_no_point_beats(points: list[CostPoint]):
    front = pareto(points)

    def is_beaten(p: CostPoint) -> bool:
        return any(
            (q.ap >= p.ap and q.cost < p.cost) or (q.ap > p.ap and q.cost <= p.cost) for q in points
        )

    assert sorted(front, key=repr) == sorted((p for p in points if not is_beaten(p)), key=repr)
    assert [p.cost for p in front] == sorted(p.cost for p in front)


def test_a_point_without_a_number_is_left_out():
    good = CostPoint("a", 50.0, 1.0)

    assert pareto([CostPoint("b", math.nan, 1.0), good, CostPoint("c", 60.0, math.inf)]) == [good]
