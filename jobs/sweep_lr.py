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

import argparse
from dataclasses import replace

from optuna.distributions import CategoricalDistribution, FloatDistribution

from deta.jobs.command_line import described_parser
from deta.jobs.deta_r50 import demo, small
from deta.jobs.sweep_command import (
    add_sweep_options,
    changes_of,
    run_sweep_and_exit,
    with_drawn_data,
)
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


def main() -> None:
    parser = described_parser(__doc__)
    parser.add_argument("--variant", choices=BASES, default="demo", metavar="NAME")
    parser.add_argument("--search", choices=("random", "grid", "optuna"), default="random")
    parser.add_argument(
        "--trials", type=int, default=12, help="number of trials of a random search or Optuna"
    )
    parser.add_argument(
        "--search-seed", type=int, default=0, help="another seed gives other trials"
    )
    parser.add_argument(
        "--objectives", default="AP", help="for Optuna: AP, or AP and a cost: AP,gpu_hours"
    )
    parser.add_argument("--to-the-end", action="store_true", help="stop no trial early")
    add_sweep_options(parser)
    arguments = parser.parse_intermixed_args()

    def make() -> Sweep:
        base = replace(BASES[arguments.variant](), name=f"sweep-{arguments.search}")
        changes = changes_of(arguments)
        if arguments.variant == "demo":
            changes = {**DEMO_SIZE, **changes}
            if not arguments.report_only:
                changes = with_drawn_data(base, changes, write_shapes)
        return sweep(override(base, changes), arguments)

    run_sweep_and_exit(arguments, make)


def sweep(base: RunConfig, arguments: argparse.Namespace) -> Sweep:
    search: Search = Random(arguments.trials, arguments.search_seed)
    if arguments.search == "grid":
        search = Grid()
    elif arguments.search == "optuna":
        objectives = tuple(arguments.objectives.split(","))
        search = Optuna(arguments.trials, objectives, arguments.search_seed)
    # ASHA first decides at the demo's second evaluation, then at three times as many samples.
    images = base.data.train_first or 1000
    several = isinstance(search, Optuna) and len(search.objectives) > 1
    stops = not arguments.to_the_end and not several
    return Sweep(
        base=base,
        space=GRID if isinstance(search, Grid) else SPACE,
        search=search,
        stopping=Asha(grace_samples=images, reduction=3) if stops else None,
        title="Learning rate, batch and weight decay",
    )


if __name__ == "__main__":
    main()
