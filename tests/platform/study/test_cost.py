"""The Pareto front of AP over cost."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from deta.platform.study.cost import CostPoint, pareto

few = settings(max_examples=40, deadline=None)  # the machine may be busy
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
