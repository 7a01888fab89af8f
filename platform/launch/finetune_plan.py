"""Fine-tuning on a data set of one's own: what to start from, for how long, and how fast.

Nothing here is published; the numbers are ours, and all of them are keys of the configuration that
a person may set instead. What they are for:

- A small set is seen many times, a large one a few: the run is stated in samples seen, so that it
  neither ends before new class heads have learned nor takes days.
- Weights that are near where they should be want a lower rate than fresh ones, those of a
  backbone from ImageNet a much lower one, and a warm-up while the new class heads find their place.
- How long is enough is not known before, so evaluations are frequent and the best checkpoint stays;
  a run whose AP has ceased to grow stops.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from deta.model.architectures import DetectorConfig, without_download
from deta.platform.learning.optimizer import ScheduleConfig
from deta.platform.run.config import RunConfig, override

SAMPLES_PER_IMAGE = 60
LEAST_SAMPLES = 6_000
MOST_SAMPLES = 60_000  # or MOST_EPOCHS epochs, where those are more
MOST_EPOCHS = 6
LARGEST_BATCH = 8  # images an update: a short run needs many updates more than precise ones
LR_SHARE = 0.5  # of the recipe's rate
# At most, of a backbone that came from ImageNet. One that learned from scratch, on one data set,
# has as much to learn as the rest: `small` reached 21 AP on 112 pictures at a tenth, 30 at the full
# rate.
BACKBONE_LR_FACTOR = 0.1
WARMUP_SHARE = 0.05  # of the run
NUM_EVALUATIONS = 20
PATIENCE_SHARE = 0.3  # of the evaluations
MIN_DELTA = 0.1  # AP, in points

# Until the plan is made a schedule of any length can be given key by key.
OPEN_SCHEDULE = ScheduleConfig(
    epochs=1_000_000, lr_drop_epochs=(), warmup_epochs=0.0, shape="cosine"
)


@dataclass(frozen=True)
class Plan:
    """Values for keys of the configuration, and why."""

    changes: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def base_config(recipe: RunConfig, theirs: RunConfig | None) -> RunConfig:
    """What a fine-tuning run starts from, before it is known how large the data set is.

    What the model is and how it looks at pictures is theirs, the configuration of the checkpoint
    that is started from, where it has one; how it is trained is the recipe's.
    """
    config = replace(recipe, name=f"{recipe.name}-finetune", schedule=OPEN_SCHEDULE)
    if theirs is None:
        return config
    return replace(
        config,
        model=theirs.model,
        criterion=theirs.criterion,
        postprocess=theirs.postprocess,
        data=replace(
            config.data,
            augmentation=theirs.data.augmentation,
            evaluation_size=theirs.data.evaluation_size,
        ),
    )


def variant_of(
    model: DetectorConfig, variants: Mapping[str, Callable[[], RunConfig]]
) -> str | None:
    """The first variant with this model, whatever its number of classes."""
    for name, make in variants.items():
        if _shape(make().model) == _shape(model):
            return name
    return None


def _shape(model: DetectorConfig) -> DetectorConfig:
    return replace(without_download(model), num_classes=1)


def num_samples(num_images: int) -> int:
    """How many samples a run over so many images should see."""
    most = max(MOST_SAMPLES, MOST_EPOCHS * num_images)
    return min(max(SAMPLES_PER_IMAGE * num_images, LEAST_SAMPLES), most)


def schedule_plan(
    config: RunConfig, num_images: int, *, given: Set[str] = frozenset(), samples: int | None = None
) -> Plan:
    """Length, rates, evaluations and early stopping for a data set of this size.

    Args:
        config: of `base_config`, with what a person gave.
        given: dotted keys that a person gave, which stay as they are.
        samples: to see in all, instead of `num_samples`.

    Raises:
        ValueError: fewer samples than one.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"--samples {samples}: a run sees at least one sample")
    wanted = num_samples(num_images) if samples is None else samples
    plan: dict[str, Any] = {
        "schedule.epochs": max(1, round(wanted / num_images)),
        "total_batch_size": max(
            min(config.total_batch_size, LARGEST_BATCH), config.cluster.num_workers
        ),
        "optim.lr": config.optim.lr * LR_SHARE,
        "schedule.min_delta": MIN_DELTA,
    }
    if config.model.backbone.pretrained:
        factor = min(config.optim.backbone_lr_factor, BACKBONE_LR_FACTOR)
        plan["optim.backbone_lr_factor"] = factor
    plan = {key: value for key, value in plan.items() if key not in given}
    epochs = plan.get("schedule.epochs", config.schedule.epochs)
    batch = plan.get("total_batch_size", config.total_batch_size)
    steps = math.ceil(epochs * num_images / batch)
    every = max(1, round(epochs / NUM_EVALUATIONS))
    late: dict[str, Any] = {
        "schedule.warmup_epochs": round(WARMUP_SHARE * epochs, 3),
        "evaluate_every_epochs": every,
        "log_every_steps": max(1, min(config.log_every_steps, steps // NUM_EVALUATIONS)),
    }
    if "evaluate_every_epochs" in given:
        every = config.evaluate_every_epochs
    late["schedule.patience"] = max(3, math.ceil(PATIENCE_SHARE * epochs / every))
    plan |= {key: value for key, value in late.items() if key not in given}
    final = override(config, plan)
    return Plan(plan, _schedule_reasons(final, num_images, steps, given, samples))


def _schedule_reasons(
    config: RunConfig, num_images: int, steps: int, given: Set[str], samples: int | None
) -> list[str]:
    """Two or three lines: what will happen, and why."""
    schedule, optim = config.schedule, config.optim
    length = (
        f"{schedule.epochs * num_images:,} samples: {_epochs(schedule.epochs)} of {num_images} "
        f"images, {steps:,} updates of {config.total_batch_size}"
    )
    if samples is None and "schedule.epochs" not in given:
        length += (
            f" ({SAMPLES_PER_IMAGE} times each image, at least {LEAST_SAMPLES:,} samples and at "
            f"most {MOST_SAMPLES:,} or {MOST_EPOCHS} epochs)"
        )
    shape = {"cosine": "then down a cosine", "step": "then in steps"}[schedule.shape]
    lr = optim.lr_for(config.total_batch_size)
    rate = (
        f"rate {lr:.3g}"
        + ("" if "optim.lr" in given else ", half the recipe's, as the weights are nearly right")
        + f"; backbone {lr * optim.backbone_lr_factor:.3g}; warm-up over "
        f"{_epochs(schedule.warmup_epochs)} for the new heads, {shape}"
    )
    stop = f"AP every {_epochs(config.evaluate_every_epochs)}; the best checkpoint stays; "
    if schedule.patience is None:
        stop += "no early stopping"
    else:
        stop += (
            f"stops early after {schedule.patience} evaluations without {schedule.min_delta:g} AP "
            "more"
        )
    if optim.freeze:
        stop += (
            f"; {', '.join(optim.freeze)} {'does' if len(optim.freeze) == 1 else 'do'} not train"
        )
    return [length, rate, stop]


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'s' * (count != 1)}"


def machine_plan(
    config: RunConfig, *, given: Set[str] = frozenset(), num_gpus: int, num_cpus: int
) -> Plan:
    """The workers that this machine can hold, where no cluster is named."""
    cluster = config.cluster
    if os.environ.get("RAY_ADDRESS") or any(key.startswith("cluster.") for key in given):
        return Plan()
    if cluster.gpu and num_gpus:
        workers, gpu = min(cluster.num_workers, num_gpus), True
        cpus = max(1.0, min(cluster.cpus_per_worker, num_cpus // workers))
    elif cluster.gpu:
        workers, gpu, cpus = 1, False, float(num_cpus)
    else:
        workers, gpu = max(1, min(cluster.num_workers, num_cpus)), False
        cpus = min(cluster.cpus_per_worker, num_cpus / workers)
    found = replace(cluster, num_workers=workers, gpu=gpu, cpus_per_worker=cpus)
    if found == cluster:
        return Plan()
    kind = "GPU" if gpu else "CPU"
    why = "" if gpu or not cluster.gpu else ", which has no GPU: this will be slow"
    return Plan(
        {
            "cluster.num_workers": workers,
            "cluster.gpu": gpu,
            "cluster.cpus_per_worker": cpus,
        },
        [f"{workers} {kind} worker{'s' * (workers > 1)}, what this machine holds{why}"],
    )
