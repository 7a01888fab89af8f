"""Describe in words what a study will need, before anything runs."""

from __future__ import annotations

from deta.platform.pages.number_format import num_of
from deta.platform.study.cost import CostEstimate
from deta.platform.study.design import Design
from deta.platform.study.power import POWER, StudyPlan, power_table

DELTAS = (0.1, 0.2, 0.3, 0.6, 1.0)


def plan_text(design: Design, plan: StudyPlan, trial: CostEstimate | None = None) -> str:
    """Describe the cells, the number of trials, and the seeds that each difference needs.

    Args:
        plan: the noise to expect.
        trial: what one training costs; without it the text has no costs.
    """
    cells, num_trials = design.cells(), len(design.trials())
    num_cells = sum(not cell.same_as for cell in cells)
    seeds = num_of(len(design.seeds), "seed")
    lines = [f"{num_of(num_cells, 'cell')} × {seeds} = {num_of(num_trials, 'trial')}"]
    for cell in cells:
        changes = ", ".join(f"{key}={value}" for key, value in cell.changes.items()) or "the base"
        alike = f" (trains exactly as {cell.same_as})" if cell.same_as else ""
        lines.append(f"  {cell.key}: {changes}{alike}")
    if trial is not None:
        whole = trial._replace(
            hours=trial.hours * num_trials, gpu_hours=trial.gpu_hours * num_trials
        )
        lines += [f"one trial: {trial}", f"all, one after the other: {whole}"]
    lines += [
        "",
        f"With a seed sd of {plan.sd:.2g} (correlation {plan.correlation:g} within a seed), "
        f"two-sided alpha {plan.alpha:g}, power {100 * POWER:.0f} %:",
    ]
    smallest = plan.smallest_difference(len(design.seeds))
    if smallest is None:
        lines.append("  one seed finds no difference, however large: it has no noise to compare to")
    else:
        lines.append(f"  {seeds} find a difference of {smallest:.2g}")
    lines.append(f"  {'difference':>10} {'seeds':>6} {'trials':>7} {'GPU-hours':>10}")
    for delta, needed, in_all in power_table(plan, DELTAS, num_cells=num_cells):
        hours = None if trial is None or in_all is None else round(trial.gpu_hours * in_all)
        numbers = ["–" if number is None else f"{number:,}" for number in (needed, in_all, hours)]
        lines.append(f"  {delta:>10g} {numbers[0]:>6} {numbers[1]:>7} {numbers[2]:>10}")
    return "\n".join(lines)
