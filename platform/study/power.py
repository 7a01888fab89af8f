"""Compute how many seeds a question needs, before a study and after a pilot, and their cost.

Cells are compared within seeds: the difference of two cells has the standard deviation
sd * sqrt(2 * (1 - correlation)) over seeds. With the noise pooled over C cells and n seeds the test
has (C - 1) * (n - 1) degrees of freedom, which for two cells is the paired t test.
"""

# C cells   n seeds of each cell

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from scipy.optimize import brentq
from scipy.special import chdtr, stdtrit
from scipy.stats import ncf

from deta.platform.study.study_types import Noise

MAX_SEEDS = 10_000
POWER = 0.8
ALPHA = 0.05


@dataclass(frozen=True)
class StudyPlan:
    """The noise that is known or assumed before a study runs."""

    sd: float  # of one training over seeds, in points of the metric
    correlation: float = 0.0  # between two cells of one seed; 0 is the cautious choice
    num_cells: int = 2  # in the model whose noise is pooled; 2: a paired t test by itself
    alpha: float = ALPHA  # two-sided; divide it by the number of comparisons if there are many

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sd) and self.sd > 0):
            raise ValueError(f"sd={self.sd} must be positive: without noise one seed is enough")
        if not -1 <= self.correlation < 1:
            raise ValueError(f"correlation={self.correlation} is not in [-1, 1)")
        if self.num_cells < 2:
            raise ValueError(f"num_cells={self.num_cells} leaves nothing to compare; 2 at least")
        if not 0 < self.alpha < POWER:
            raise ValueError(f"alpha={self.alpha} is not in (0, {POWER})")

    def power(self, delta: float, seeds: int) -> float:
        """Return the probability to detect a true difference `delta` with `seeds` seeds per cell.

        0 with one seed. The noncentral t test, two-sided, as an F test of one degree of freedom.
        """
        if seeds < 2:
            return 0.0
        df = (self.num_cells - 1) * (seeds - 1)
        shift = abs(delta) / self.sd * math.sqrt(seeds / (2 * (1 - self.correlation)))
        if shift == 0:
            return self.alpha
        critical = float(stdtrit(df, 1 - self.alpha / 2))
        if shift > 100:  # only the estimate of the noise is still left to chance
            return float(chdtr(df, df * (shift / critical) ** 2))
        return min(1.0, max(0.0, float(ncf.sf(critical**2, 1, df, shift**2))))

    def seeds_for(self, delta: float) -> int | None:
        """Return the fewest seeds per cell with 80 % power; None if 10,000 are too few.

        Raises:
            ValueError: `delta` is zero.
        """
        if delta == 0:
            raise ValueError("delta=0: no number of seeds can detect a difference of zero")
        seeds = range(MAX_SEEDS + 1)
        fewest = bisect_left(seeds, POWER, key=lambda n: self.power(delta, n))
        return fewest if fewest in seeds else None

    def smallest_difference(self, seeds: int) -> float | None:
        """Return the difference that `seeds` seeds detect with 80 % power; None with one seed."""
        if seeds < 2:
            return None
        return float(brentq(lambda delta: self.power(delta, seeds) - POWER, 0, 1e9 * self.sd))


class PowerRow(NamedTuple):
    """One row of the power table: what it takes to detect a difference."""

    delta: float
    seeds: int | None  # of each cell; none: more than anyone would run
    num_trials: int | None


def power_table(plan: StudyPlan, deltas: Sequence[float], *, num_cells: int) -> list[PowerRow]:
    """Compute what it takes to detect each difference.

    Args:
        num_cells: cells that are trained; `plan.num_cells` are pooled for the noise.
    """
    needed = [(delta, plan.seeds_for(delta)) for delta in deltas]
    return [PowerRow(delta, n, None if n is None else n * num_cells) for delta, n in needed]


class PilotPlan(NamedTuple):
    """The noise that a pilot measured, and the largest noise that it allows."""

    estimate: StudyPlan
    cautious: StudyPlan  # at the upper end of the standard deviation's interval


def from_pilot(noise: Noise, num_cells: int) -> PilotPlan:
    """Plan a study from the noise of a pilot with the same kind of trainings.

    The residual variation about cell + seed is the noise of differences, so the correlation is 0.

    Raises:
        ValueError: the pilot gives no noise: one seed, or all its seeds alike.
    """
    if not noise.residual_sd or noise.interval is None:
        raise ValueError(f"the pilot has no estimate of the noise: {noise.note}")
    return PilotPlan(
        StudyPlan(noise.residual_sd, num_cells=num_cells),
        StudyPlan(noise.interval.high, num_cells=num_cells),
    )
