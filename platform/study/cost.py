"""The cost of trainings in hours and GPU-hours, and the Pareto front of AP over cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from deta.platform.pages.number_format import duration


class CostEstimate(NamedTuple):
    """The expected cost of trainings."""

    hours: float  # of wall time
    gpu_hours: float  # hours times workers; without a GPU these are worker-hours
    unit: str = "GPU-hours"  # of gpu_hours, for people

    def __str__(self) -> str:
        decimals = 1 if self.gpu_hours < 100 else 0
        return f"{duration(3600 * self.hours)}, {self.gpu_hours:,.{decimals}f} {self.unit}"


class CostPoint(NamedTuple):
    """One training in the plot of AP over cost."""

    label: str
    ap: float
    cost: float  # GPU-hours as a rule; any unit that all points share


def pareto(points: Iterable[CostPoint]) -> list[CostPoint]:
    """Return the points that no other point beats: as cheap and better, or as good and cheaper.

    The cheapest comes first. Points that are equal in both are all kept; one without a finite AP or
    cost is left out.
    """
    finite = [p for p in points if math.isfinite(p.ap) and math.isfinite(p.cost)]
    front: list[CostPoint] = []
    for point in sorted(finite, key=lambda p: (p.cost, -p.ap, p.label)):
        if not front or point.ap > front[-1].ap or point[1:] == front[-1][1:]:
            front.append(point)
    return front
