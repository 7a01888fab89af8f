#!/usr/bin/env python
"""Batch 8 or 16, and at which learning rate? A study instead of two single runs.

detrex publishes 50.0 AP with total batch 8 and 49.4 with 16 for DETA R50, 12 epochs. These two runs
differ in more than the batch, and each was run once. Here the batch is crossed with the rate, over
several seeds and equal samples seen; the published pair is added as named cells.

  python jobs/study_batch_lr.py --plan                 # cells, seeds and power; trains nothing
  python jobs/study_batch_lr.py --plan --sd 0.15 --hours-per-trial 16.3
  python jobs/study_batch_lr.py --variant demo         # drawn shapes, two CPU cores
  python jobs/study_batch_lr.py --estimate --train-images train2017 … # measures the cost
  python jobs/study_batch_lr.py --train-images train2017 \\
      --train-annotations annotations/instances_train2017.json --val-images val2017 \\
      --val-annotations annotations/instances_val2017.json

The same command continues a study that was stopped or killed; more --seeds extend it.
The report is in storage/name/report.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from deta.jobs.command_line import drawn_data, read_command_line, run_tool
from deta.jobs.deta_r50 import demo, detrex_bs8, detrex_bs16
from deta.jobs.sweep_command import SweepOptions, run_sweep_and_exit
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.run.config import RunConfig, override
from deta.platform.study.cost import CostEstimate
from deta.platform.study.design import Design, batch_factor, cell_key, numbers_of, rate_factor
from deta.platform.study.study_types import Anchor, Question
from deta.platform.sweep.search_space import Sweep

SEEDS = (1, 2, 3)
TITLE = "Batch 8 or 16, and at which learning rate?"
METHOD = (
    "Total batch crossed with the learning rate. Every cell is trained with the same seeds on "
    "equally many samples, so that differences are taken within seeds."
)
# For the demo: one core per trial, and just enough samples to learn something.
DEMO_SIZE: dict[str, Any] = {
    "cluster.num_workers": 1,
    "cluster.cpus_per_worker": 1,
    "data.train_first": 650,
    "schedule.epochs": 4,
    "evaluate_every_epochs": 1,
    "log_every_steps": 10,
    "num_pictures": 4,
}

_DETREX = "detrex README (IDEA-Research/detrex, projects/deta), one run without a fixed seed"
# Box AP on COCO val2017, DETA R50 5-scale, 12 epochs.
PUBLISHED = (
    Anchor("official", 50.1, 16, "official README (jozhang97/DETA), configs/deta.sh"),
    Anchor("detrex, batch 8", 50.0, 8, _DETREX, "common trainer, deta_r50_5scale_12ep_bs8.py"),
    Anchor("detrex, batch 16", 49.4, 16, _DETREX, "common trainer, lr 1e-4, 90,000 steps"),
    Anchor("detrex, official's optimizer", 49.9, 16, _DETREX, "modified trainer, no clipping"),
    Anchor(
        "detrex, first stage trains", 50.2, 16, _DETREX, "modified trainer, only the stem frozen"
    ),
)
PUBLISHED_PAIR = (PUBLISHED[1], PUBLISHED[2])  # the 0.6 AP to be explained

BS8, BS16 = "detrex_bs8 as published", "detrex_bs16 as published"


def crossed(batch: int, rate: str) -> str:
    return cell_key({"batch": str(batch), "rate": rate})


QUESTIONS = (
    Question("16 vs 8 at equal rate", crossed(16, "1×"), crossed(8, "1×"), "16", "8"),
    Question("16 vs 8 at equal rate per sample", crossed(16, "2×"), crossed(8, "1×"), "16", "8"),
    Question("rate 2× vs 1× with batch 16", crossed(16, "2×"), crossed(16, "1×"), "2×", "1×"),
)
PUBLISHED_QUESTION = Question("16 vs 8 as published by detrex", BS16, BS8, "16", "8")


def coco_design(seeds: tuple[int, ...] = SEEDS) -> Design:
    """Cross detrex's recipe for batch 8 with batch and rate, and add the published pair.

    The published run with batch 8 is one of the crossed cells, so it is not trained twice.
    """
    base = replace(detrex_bs8(), name="study-batch-lr", micro_batch_size=2)
    return Design(
        base=base,
        factors=(batch_factor((8, 16)), rate_factor(base.optim.lr)),
        seeds=seeds,
        named_cells={BS8: changes_to(base, detrex_bs8()), BS16: changes_to(base, detrex_bs16())},
    )


COCO_PATH = (
    (BS8, ""),
    (crossed(16, "1×"), "batch 8 to 16"),
    (BS16, "weight decay 0.0001 to 0.1, backbone rate ×0.1 to ×1 and a frozen first stage"),
)


def demo_design(seeds: tuple[int, ...] = SEEDS) -> Design:
    """Ask the same question of the demo model on drawn shapes, minutes per trial on two cores."""
    base = replace(demo(), name="study-batch-lr-demo")
    factors = (batch_factor((8, 16)), rate_factor(base.optim.lr))
    return Design(base=base, factors=factors, seeds=seeds)


def changes_to(base: RunConfig, recipe: RunConfig) -> dict[str, Any]:
    """Return the changes that turn the base into a recipe, apart from the micro-batch size."""
    ours, theirs = numbers_of(base), numbers_of(recipe)
    return {
        key: value
        for key, value in theirs.items()
        if ours[key] != value and key not in ("micro_batch_size", "seed")
    }


def coco_study(seeds: tuple[int, ...], changes: Mapping[str, Any]) -> Sweep:
    """the real study, on COCO with GPUs"""
    design = _changed(coco_design(seeds), changes)
    return Sweep(
        base=design.base,
        design=design,
        title=TITLE,
        method=METHOD,
        questions=(*QUESTIONS, PUBLISHED_QUESTION),
        path=COCO_PATH,
        published=PUBLISHED_PAIR,
        anchors=PUBLISHED,
    )


def demo_study(seeds: tuple[int, ...], changes: Mapping[str, Any]) -> Sweep:
    """the same on drawn shapes with the demo model: two CPU cores, about 25 minutes"""
    design = _changed(demo_design(seeds), DEMO_SIZE | dict(changes))
    title = f"{TITLE} On drawn shapes"
    return Sweep(base=design.base, design=design, title=title, method=METHOD, questions=QUESTIONS)


def _changed(design: Design, changes: Mapping[str, Any]) -> Design:
    varied = {key for factor in design.factors for key in factor.keys} & set(changes)
    if varied:
        raise ValueError(f"{', '.join(sorted(varied))} cannot be set: the study varies it")
    return replace(design, base=override(design.base, changes))


VARIANTS = {"coco": coco_study, "demo": demo_study}


@dataclass(frozen=True, kw_only=True)
class StudyOptions(SweepOptions):
    variant: Literal["coco", "demo"] = "coco"  # demo: drawn shapes, two CPU cores, 25 minutes
    plan: bool = False  # print what the study needs, train nothing
    seeds: int = len(SEEDS)  # seeds per cell
    sd: float = 0.2  # expected standard deviation over seeds, in AP
    hours_per_trial: float | None = None  # wall time of one training


def main() -> NoReturn:
    options, given = read_command_line(StudyOptions, __doc__, coco_design().base)
    given |= options.changes()
    seeds = tuple(range(1, options.seeds + 1))

    def make() -> Sweep:
        changes: dict[str, Any] = dict(given)
        draws = options.variant == "demo" and not (options.report_only or options.plan)
        if draws:
            changes |= drawn_data(override(demo(), given), write_shapes)
        return VARIANTS[options.variant](seeds, changes)

    if options.plan:
        run_tool(make, lambda study: _print_plan(study, options))
    if options.estimate:  # the cost is measured below; this prints what it would buy
        _print_plan(VARIANTS[options.variant](seeds, {}), options)
    run_sweep_and_exit(options, make)


def _print_plan(study: Sweep, options: StudyOptions) -> int:
    """Print cells, trials, cost, and the differences that the seeds can detect."""
    assert study.design is not None
    design, trial, hours = study.design, None, options.hours_per_trial
    if hours is not None:
        trial = CostEstimate(hours, hours * design.base.cluster.num_workers)
    num_cells = sum(not cell.same_as for cell in design.cells())
    from deta.platform.study.plan_text import plan_text
    from deta.platform.study.power import StudyPlan  # scipy.stats is slow to import

    print(plan_text(design, StudyPlan(options.sd, num_cells=num_cells), trial))
    return 0


if __name__ == "__main__":
    main()
