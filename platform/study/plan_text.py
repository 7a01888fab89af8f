"""Describe in words what a study will need, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from deta.platform.pages.number_format import num_of
from deta.platform.study.cost import CostEstimate
from deta.platform.study.design import Design
from deta.platform.study.power import POWER, StudyPlan, from_pilot, power_table
from deta.platform.study.study_types import Noise

DELTAS = (0.1, 0.2, 0.3, 0.6, 1.0)


def plan_text(
    design: Design,
    *,
    num_images: int | None = None,
    plan: StudyPlan | None = None,
    trial: CostEstimate | None = None,
    deltas: Sequence[float] = DELTAS,
) -> str:
    """Describe the cells, the number of trials, and the seeds that each difference needs.

    Args:
        num_images: of the training set; adds the samples seen.
        plan: the noise to expect; without it the text has no power table.
        trial: what one training costs; without it the text has no costs.
    """
    cells, trials = design.cells(), design.trials()
    own = [cell for cell in cells if not cell.same_as]
    lines = [
        f"{num_of(len(own), 'cell')} × {num_of(len(design.seeds), 'seed')} = "
        f"{num_of(len(trials), 'trial')}"
    ]
    for cell in cells:
        changes = ", ".join(f"{key}={value}" for key, value in cell.changes.items()) or "the base"
        line = f"  {cell.key}: {changes}"
        if cell.same_as:
            line += f" (trains exactly as {cell.same_as})"
        elif num_images is not None:
            line += f"; {design.samples_seen(cell, num_images):,} samples"
        lines.append(line)
    if trial is not None:
        whole = trial.times(len(trials))
        lines.append(f"one trial: {trial}")
        lines.append(f"all, one after the other: {whole}")
    if plan is not None:
        lines += ["", *_power_lines(plan, len(own), len(design.seeds), trial, deltas)]
    return "\n".join(lines)


def pilot_text(
    noise: Noise,
    *,
    num_cells: int,
    num_seeds: int,
    trial: CostEstimate | None = None,
    deltas: Sequence[float] = DELTAS,
) -> str:
    """Describe what more seeds would find, by the noise of a finished study.

    The table comes twice: for the measured standard deviation and for the upper end of its
    interval.

    Args:
        num_cells: cells that are trained, so far with `num_seeds` seeds each.
    """
    if not noise.residual_sd:
        return f"The pilot says nothing of the seeds it needs: {noise.note}."
    pilot = from_pilot(noise, num_cells)
    lines = ["By the noise as measured.", ""]
    lines += _power_lines(pilot.estimate, num_cells, num_seeds, trial, deltas)
    lines += ["", "By the largest noise that the measurement allows.", ""]
    lines += _power_lines(pilot.cautious, num_cells, num_seeds, trial, deltas)
    return "\n".join(lines)


def _power_lines(
    plan: StudyPlan,
    num_cells: int,
    num_seeds: int,
    trial: CostEstimate | None,
    deltas: Sequence[float],
) -> list[str]:
    lines = [
        f"With a seed sd of {plan.sd:.2g} (correlation {plan.correlation:g} within a seed), "
        f"two-sided alpha {plan.alpha:g}, power {100 * POWER:.0f} %:"
    ]
    smallest = plan.smallest_difference(num_seeds)
    if smallest is None:
        lines.append("  one seed finds no difference, however large: it has no noise to compare to")
    else:
        lines.append(f"  {num_of(num_seeds, 'seed')} find a difference of {smallest:.2g}")
    lines.append(f"  {'difference':>10} {'seeds':>6} {'trials':>7} {'GPU-hours':>10} {'price':>12}")
    for row in power_table(
        plan,
        deltas,
        num_cells=num_cells,
        gpu_hours_per_trial=None if trial is None else trial.gpu_hours,
        price_per_trial=None if trial is None else trial.price,
    ):
        hours = "–" if row.gpu_hours is None else f"{row.gpu_hours:,.0f}"
        price = "–" if row.price is None or trial is None else f"{row.price:,.0f} {trial.currency}"
        lines.append(
            f"  {row.delta:>10g} {_or_dash(row.seeds):>6} {_or_dash(row.num_trials):>7} "
            f"{hours:>10} {price:>12}"
        )
    return lines


def _or_dash(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"
