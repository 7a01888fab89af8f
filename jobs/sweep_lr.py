#!/usr/bin/env python
"""Search for learning rate, batch size and weight decay, and stop bad trials early.

  python jobs/sweep_lr.py                              # 12 random trials, ASHA; drawn shapes
  python jobs/sweep_lr.py --search optuna --objectives AP,cpu_hours
  python jobs/sweep_lr.py --to-the-end                 # without ASHA, for comparison
  python jobs/sweep_lr.py --variant small --train-images images --train-annotations train.json \\
      --val-images images --val-annotations val.json

An example to copy: a space over dotted configuration keys and a search through it. The
same command continues a sweep that was stopped or killed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from optuna.distributions import CategoricalDistribution, FloatDistribution

from deta.jobs.command_line import drawn_data, read_command_line
from deta.jobs.deta_r50 import demo, small
from deta.jobs.sweep_command import SweepOptions, run_sweep_and_exit
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.run.config import RunConfig, override
from deta.platform.sweep.search_space import Asha, Domain, Grid, Optuna, Random, Search, Sweep

SPACE: dict[str, Domain] = {
    "optim.lr": FloatDistribution(3e-4, 6e-3, log=True),
    "optim.weight_decay": FloatDistribution(1e-5, 1e-1, log=True),
    "total_batch_size": CategoricalDistribution((4, 8, 16)),
}
GRID: dict[str, Domain] = {
    "optim.lr": CategoricalDistribution((7.5e-4, 1.5e-3, 3e-3)),
    "total_batch_size": CategoricalDistribution((4, 8)),
}
BASES = {"demo": demo, "small": small}
# For the demo: one core and a few minutes per trial.
DEMO_SIZE = {
    "cluster.num_workers": 1,
    "data.train_first": 400,
    "schedule.epochs": 6,
    "evaluate_every_epochs": 1,
    "log_every_steps": 10,
    "num_pictures": 0,
}


@dataclass(frozen=True, kw_only=True)
class SearchOptions(SweepOptions):
    variant: Literal["demo", "small"] = "demo"
    search: Literal["random", "grid", "optuna"] = "random"
    trials: int = 12  # number of trials of a random search or Optuna
    search_seed: int = 0  # another seed gives other trials
    objectives: str = "AP"  # for Optuna: AP, or AP and a cost: AP,gpu_hours
    to_the_end: bool = False  # stop no trial early


def main() -> None:
    options, given = read_command_line(SearchOptions, __doc__, demo())

    def make() -> Sweep:
        base = replace(BASES[options.variant](), name=f"sweep-{options.search}")
        changes: dict[str, Any] = given | options.changes()
        if options.variant == "demo":
            changes = {**DEMO_SIZE, **changes}
            if not options.report_only:
                changes |= drawn_data(override(base, changes), write_shapes)
        return sweep(override(base, changes), options)

    run_sweep_and_exit(options, make)


def sweep(base: RunConfig, options: SearchOptions) -> Sweep:
    objectives = tuple(options.objectives.split(","))
    searches: dict[str, Search] = {
        "random": Random(options.trials, options.search_seed),
        "grid": Grid(),
        "optuna": Optuna(options.trials, objectives, options.search_seed),
    }
    # ASHA first decides at the demo's second evaluation, then at three times as many samples.
    asha = Asha(grace_samples=base.data.train_first or 1000, reduction=3)
    has_several = options.search == "optuna" and len(objectives) > 1
    return Sweep(
        base=base,
        space=GRID if options.search == "grid" else SPACE,
        search=searches[options.search],
        stopping=None if options.to_the_end or has_several else asha,
        title="Learning rate, batch and weight decay",
    )


if __name__ == "__main__":
    main()
