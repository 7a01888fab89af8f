"""Compute how many seeds a question needs, before a study and after a pilot, and their cost.

Cells are compared within seeds: the difference of two cells has the standard deviation
sd * sqrt(2 * (1 - correlation)) over seeds. With the noise pooled over C cells and n seeds the test
has (C - 1) * (n - 1) degrees of freedom, which for two cells is the paired t test.
"""

# C cells   n seeds of each cell

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha} is not in (0, 1)")

    @property
    def sd_of_difference(self) -> float:
        """Return the standard deviation of the difference of two cells with the same seed."""
        return self.sd * math.sqrt(2 * (1 - self.correlation))

    def power(self, delta: float, seeds: int) -> float:
        """Return the probability to detect a true difference `delta` with `seeds` seeds per cell.

        0 with one seed. The noncentral t test, two-sided, as an F test of one degree of freedom.
        """
        if seeds < 2:
            return 0.0
        df = (self.num_cells - 1) * (seeds - 1)
        shift = abs(delta) * math.sqrt(seeds) / self.sd_of_difference
        if shift == 0:
            return self.alpha
        critical = float(stdtrit(df, 1 - self.alpha / 2))
        if shift > 100:  # only the estimate of the noise is still left to chance
            return float(chdtr(df, df * (shift / critical) ** 2))
        return min(1.0, max(0.0, float(ncf.sf(critical**2, 1, df, shift**2))))

    def seeds_for(self, delta: float, power: float = POWER) -> int | None:
        """Return the smallest number of seeds per cell with this power; None if 10,000 are too few.

        Raises:
            ValueError: `delta` is zero, or `power` is not between `alpha` and 1.
        """
        if delta == 0:
            raise ValueError("delta=0: no number of seeds can detect a difference of zero")
        self._check_power(power)
        if self.power(delta, MAX_SEEDS) < power:
            return None
        low, high = 1, 2  # too few; perhaps enough
        while self.power(delta, high) < power:
            low, high = high, min(2 * high, MAX_SEEDS)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.power(delta, middle) < power else (low, middle)
        return high

    def smallest_difference(self, seeds: int, power: float = POWER) -> float | None:
        """Return the difference that `seeds` seeds detect with this power; None with one seed."""
        self._check_power(power)
        if seeds < 2:
            return None
        low, high = 0.0, self.sd_of_difference
        while self.power(high, seeds) < power:
            low, high = high, 2 * high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.power(middle, seeds) < power else (low, middle)
        return high

    def _check_power(self, power: float) -> None:
        if not self.alpha < power < 1:
            raise ValueError(f"power={power} is not between alpha={self.alpha} and 1")


@dataclass(frozen=True)
class PowerRow:
    """One row of the power table: what it takes to detect a difference."""

    delta: float
    seeds: int | None  # of each cell; none: more than anyone would run
    power: float | None  # with so many seeds
    num_trials: int | None
    gpu_hours: float | None
    price: float | None


def power_table(
    plan: StudyPlan,
    deltas: Sequence[float],
    *,
    num_cells: int,
    power: float = POWER,
    gpu_hours_per_trial: float | None = None,
    price_per_trial: float | None = None,
) -> list[PowerRow]:
    """Compute what it takes to detect each difference.

    Args:
        num_cells: cells that are trained; `plan.num_cells` are pooled for the noise.
        gpu_hours_per_trial: `cost.Estimate.gpu_hours` of one training; its `price` is the other.
    """
    rows = []
    for delta in deltas:
        seeds = plan.seeds_for(delta, power)
        trials = None if seeds is None else seeds * num_cells
        rows.append(
            PowerRow(
                delta,
                seeds,
                None if seeds is None else plan.power(delta, seeds),
                trials,
                _times(trials, gpu_hours_per_trial),
                _times(trials, price_per_trial),
            )
        )
    return rows


def _times(count: int | None, each: float | None) -> float | None:
    return None if count is None or each is None else count * each


@dataclass(frozen=True)
class PilotPlan:
    """The noise that a pilot measured, and the largest noise that it allows."""

    estimate: StudyPlan
    cautious: StudyPlan  # at the upper end of the standard deviation's interval


def from_pilot(noise: Noise, num_cells: int, alpha: float = ALPHA) -> PilotPlan:
    """Plan a study from the noise of a pilot with the same kind of trainings.

    The residual variation about cell + seed is the noise of differences, so the correlation is 0.

    Raises:
        ValueError: the pilot gives no noise: one seed, or all its seeds alike.
    """
    if not noise.residual_sd or noise.interval is None:
        raise ValueError(f"the pilot has no estimate of the noise: {noise.note}")
    return PilotPlan(
        StudyPlan(noise.residual_sd, 0.0, num_cells, alpha),
        StudyPlan(noise.interval.high, 0.0, num_cells, alpha),
    )
