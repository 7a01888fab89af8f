"""Power, against statsmodels and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from deta.jobs.study_batch_lr import demo_design
from deta.platform.pages.number_format import Interval
from deta.platform.study.cost import CostEstimate
from deta.platform.study.plan_text import plan_text
from deta.platform.study.power import StudyPlan, from_pilot, power_table
from deta.platform.study.study_types import Noise

few = settings(max_examples=40, deadline=None)  # the machine may be busy

NUM_SIMULATED = 20_000  # three points are more than eight standard errors


@pytest.mark.parametrize("seeds", [2, 3, 5, 9, 30])
@pytest.mark.parametrize("delta", [0.05, 0.3, 0.6, 2.0])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_power_is_that_of_statsmodels(seeds: int, delta: float, alpha: float):
    power = pytest.importorskip("statsmodels.stats.power").TTestPower()
    plan = StudyPlan(0.25, correlation=0.3, alpha=alpha)
    effect = delta / (0.25 * math.sqrt(1.4))

    wanted = power.power(effect, seeds, alpha, alternative="two-sided")
    if math.isnan(wanted):  # its noncentral t does not reach so far
        wanted = integrated_power(effect * math.sqrt(seeds), seeds - 1, alpha)

    assert plan.power(delta, seeds) == pytest.approx(wanted, abs=1e-6)


def integrated_power(shift: float, df: int, alpha: float) -> float:
    """The chance that |z + shift| exceeds the critical t times chi / sqrt(df)."""
    critical = special.stdtrit(df, 1 - alpha / 2)

    def inside(s: float) -> float:
        limit = critical * s / math.sqrt(df)
        beyond = special.ndtr(shift - limit) + special.ndtr(-shift - limit)
        return float(stats.chi.pdf(s, df) * beyond)

    high = float(stats.chi.ppf(1 - 1e-14, df))
    corner = min(0.99 * high, shift * math.sqrt(df) / critical)
    return integrate.quad(inside, 0, high, limit=400, points=[corner], epsabs=1e-11)[0]


@pytest.mark.parametrize("df", [1, 2, 6, 40])
@pytest.mark.parametrize("shift", [0.1, 3.0, 30.0, 99.0, 101.0, 400.0])
def test_power_is_the_integral_also_far_out(df: int, shift: float):
    plan = StudyPlan(math.sqrt(0.5), alpha=0.005)
    wanted = integrated_power(shift, df, 0.005)

    # Beyond 100 the unit noise of the numerator is left out.
    tolerance = 1e-6 if shift <= 100 else 1e-4
    assert plan.power(shift / math.sqrt(df + 1), df + 1) == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("delta", [0.1, 0.2, 0.3, 0.6])
def test_seeds_are_those_of_statsmodels(delta: float):
    power = pytest.importorskip("statsmodels.stats.power").TTestPower()

    wanted = power.solve_power(delta / (0.2 * math.sqrt(2)), None, 0.05, 0.8)

    assert StudyPlan(0.2).seeds_for(delta) == math.ceil(wanted)


@pytest.mark.parametrize(
    ("delta", "seeds", "correlation", "num_cells"),
    [(0.3, 3, 0.0, 2), (0.3, 9, 0.0, 2), (0.3, 5, 0.6, 2), (0.4, 3, 0.0, 4), (0.3, 4, 0.5, 6),
     (0.5, 2, 0.2, 5), (0.2, 20, 0.0, 4)],
)  # fmt: skip
def test_power_agrees_with_simulation_within_three_points(
    delta: float, seeds: int, correlation: float, num_cells: int
):
    plan = StudyPlan(0.2, correlation, num_cells)
    generator = np.random.default_rng(0)
    block = generator.normal(size=(NUM_SIMULATED, 1, seeds)) * 0.2 * math.sqrt(correlation)
    noise = generator.normal(size=(NUM_SIMULATED, num_cells, seeds)) * 0.2
    values = block + noise * math.sqrt(1 - correlation)  # studies, cells, seeds
    values[:, 0] += delta
    # Two-way analysis of variance without interaction, by its sums.
    residuals = (
        values
        - values.mean(1, keepdims=True)
        - values.mean(2, keepdims=True)
        + values.mean((1, 2), keepdims=True)
    )
    df = (num_cells - 1) * (seeds - 1)
    variance = (residuals**2).sum((1, 2)) / df
    t = (values[:, 0] - values[:, 1]).mean(1) / np.sqrt(2 * variance / seeds)
    found = float((np.abs(t) > stats.t.ppf(0.975, df)).mean())

    assert plan.power(delta, seeds) == pytest.approx(found, abs=0.03)


@few
@given(
    sd=st.floats(0.01, 2), delta=st.floats(0.05, 5), seeds=st.integers(2, 60),
    cells=st.integers(2, 8), correlation=st.floats(-0.9, 0.9),
)  # fmt: skip
def test_more_of_everything_gives_more_power(
    sd: float, delta: float, seeds: int, cells: int, correlation: float
):
    plan = StudyPlan(sd, correlation, cells)
    power = plan.power(delta, seeds)

    assert plan.alpha - 1e-9 <= power <= 1
    assert plan.power(-delta, seeds) == power
    assert plan.power(delta, seeds + 1) >= power - 1e-9
    assert plan.power(delta * 1.5, seeds) >= power - 1e-9
    assert StudyPlan(sd * 1.5, correlation, cells).power(delta, seeds) <= power + 1e-9
    assert StudyPlan(sd, correlation, cells + 1).power(delta, seeds) >= power - 1e-9


@few
@given(sd=st.floats(0.05, 1), delta=st.floats(0.1, 3), cells=st.integers(2, 6))
def test_the_seeds_are_the_fewest_that_do(sd: float, delta: float, cells: int):
    plan = StudyPlan(sd, num_cells=cells)

    seeds = plan.seeds_for(delta)

    assert seeds is not None
    assert plan.power(delta, seeds) >= 0.8 > plan.power(delta, seeds - 1)
    smallest = plan.smallest_difference(seeds)
    assert smallest is not None
    assert smallest <= delta * (1 + 1e-9)
    assert plan.power(smallest, seeds) == pytest.approx(0.8, abs=1e-6)


def test_one_seed_finds_nothing():
    assert StudyPlan(0.2).power(100, 1) == 0
    assert StudyPlan(0.2).smallest_difference(1) is None
    assert StudyPlan(0.2).power(100, 2) == pytest.approx(1, abs=1e-2)


def test_a_difference_far_below_the_noise_has_no_affordable_number():
    assert StudyPlan(1.0).seeds_for(0.001) is None
    assert power_table(StudyPlan(1.0), [0.001], num_cells=4) == [(0.001, None, None)]


def test_the_table_multiplies():
    assert power_table(StudyPlan(0.2), [0.3], num_cells=6) == [(0.3, 10, 60)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: StudyPlan(0.0), lambda: StudyPlan(math.nan), lambda: StudyPlan(0.2, 1.0),
        lambda: StudyPlan(0.2, 0, 1),
        lambda: StudyPlan(0.2, alpha=0), lambda: StudyPlan(0.2).seeds_for(0),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make):
    with pytest.raises(ValueError, match=r"sd=|correlation=|num_cells=|alpha=|delta="):
        make()


def test_a_pilot_plans_with_its_noise_and_with_the_most_it_could_be():
    noise = Noise(0.2, 6, Interval(0.13, 0.44), 0.25, 8, 0.36)

    pilot = from_pilot(noise, num_cells=4)

    few, many = pilot.estimate.seeds_for(0.3), pilot.cautious.seeds_for(0.3)
    assert few is not None
    assert many is not None
    assert (pilot.estimate.sd, pilot.cautious.sd) == (0.2, 0.44)
    assert few < many
    with pytest.raises(ValueError, match="no estimate of the noise: one seed"):
        from_pilot(Noise(None, 0, None, None, 0, None, "one seed"), 4)


def test_the_plan_tells_cells_trials_seeds_and_cost():
    text = plan_text(demo_design(), StudyPlan(0.2), CostEstimate(hours=0.05, gpu_hours=0.1))

    assert "4 cells × 3 seeds = 12 trials" in text
    assert "one trial: 3 min, 0.1 GPU-hours" in text
    assert "all, one after the other: 36 min, 1.2 GPU-hours" in text
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["0.3"])
    assert row == ["0.3", "10", "40", "4"]
