"""Chooses schedule and learning rates for fine-tuning on the user's own data set.

These values are not published; they are our own defaults. Each is a configuration key that the user
may set instead. The reasons:

- The length of the run is given in samples. A small data set is seen many times, a large one a few
  times, so the run neither ends before new class heads have learned nor takes days.
- Pretrained weights need a lower learning rate than new ones, and an ImageNet backbone a much lower
  one. A warm-up protects the weights while the new class heads adapt.
- The necessary length is not known in advance. So evaluations are frequent, the best checkpoint is
  kept, and a run whose AP no longer grows stops early.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from deta.model.architectures import DetectorConfig, without_download
from deta.platform.learning.schedule import ScheduleConfig
from deta.platform.run.config import RunConfig, override

SAMPLES_PER_IMAGE = 60
LEAST_SAMPLES = 6_000
MOST_SAMPLES = 60_000  # or MOST_EPOCHS epochs, where those are more
MOST_EPOCHS = 6
LARGEST_BATCH = 8  # images per update: in a short run the number of updates matters more
LR_SHARE = 0.5  # of the recipe's learning rate
# Upper limit for a backbone from ImageNet. A backbone that was trained from scratch on one data set
# has to adapt as much as the rest: on 112 images `small` reached 21 AP with a tenth of the rate,
# and 30 AP with the full rate.
BACKBONE_LR_FACTOR = 0.1
WARMUP_SHARE = 0.05  # of the run
NUM_EVALUATIONS = 20
OTHER_SIZE = 2.0  # times the size of the images: from there on a warning
PATIENCE_SHARE = 0.3  # of the evaluations
MIN_DELTA = 0.1  # AP, in points

# Before the plan is made, this schedule accepts keys for any length.
OPEN_SCHEDULE = ScheduleConfig(
    epochs=1_000_000, lr_drop_epochs=(), warmup_epochs=0.0, shape="cosine"
)


class FinetunePlan(NamedTuple):
    """Values for configuration keys, and the reasons for them."""

    changes: dict[str, Any]
    reasons: list[str]


def base_config(recipe: RunConfig, theirs: RunConfig | None) -> RunConfig:
    """Return the configuration of a fine-tuning run, before the size of the data set is known.

    Args:
        recipe: gives everything about the training.
        theirs: configuration of the initial checkpoint, if it has one; gives the model, its
            criterion and postprocessing, and how images are resized and augmented.
    """
    config = replace(recipe, name=f"{recipe.name}-finetune", schedule=OPEN_SCHEDULE)
    if theirs is None:
        return config
    data = replace(
        config.data,
        augmentation=theirs.data.augmentation,
        evaluation_size=theirs.data.evaluation_size,
        exif=theirs.data.exif,
        sixteen_bit=theirs.data.sixteen_bit,  # its range is that of the new images
    )
    model, criterion = theirs.model, theirs.criterion
    return replace(
        config, model=model, criterion=criterion, postprocess=theirs.postprocess, data=data
    )


def variant_of(
    model: DetectorConfig, variants: Mapping[str, Callable[[], RunConfig]]
) -> str | None:
    """Return the first variant with this model, for any number of classes."""

    def shape(model: DetectorConfig) -> DetectorConfig:
        return replace(without_download(model), num_classes=1)

    return next((n for n, make in variants.items() if shape(make().model) == shape(model)), None)


def size_reason(config: RunConfig, short_edges_px: Sequence[int]) -> str:
    """Return a line on the size at which the model sees images, which a checkpoint brings along.

    Args:
        short_edges_px: of the training images, as they are stored.
    """
    seen, stored = config.data.evaluation_size.short_edge, float(median(short_edges_px))
    line = (
        f"images are resized to a short edge of {seen} px for the evaluation and about that in "
        f"training; the training images have {stored:g} px (median)"
    )
    if OTHER_SIZE * seen >= stored and seen <= OTHER_SIZE * stored:
        return line
    return (
        f"! {line}: an object of 32 px is seen with {32 * seen / stored:.0f} px. "
        "data.evaluation_size.short_edge and data.augmentation.short_edges (with max_long_edge) "
        "set another size"
    )


def num_samples(num_images: int) -> int:
    """Return how many samples a run on a data set of this size should see."""
    most = max(MOST_SAMPLES, MOST_EPOCHS * num_images)
    return min(max(SAMPLES_PER_IMAGE * num_images, LEAST_SAMPLES), most)


def schedule_plan(
    config: RunConfig, num_images: int, *, given: Set[str] = frozenset(), samples: int | None = None
) -> FinetunePlan:
    """Choose length, learning rates, evaluations and early stopping for a data set of this size.

    Args:
        config: from `base_config`, with the values that the user gave.
        given: dotted keys that the user gave, which are not changed.
        samples: total number of samples, instead of `num_samples`.

    Raises:
        ValueError: fewer samples than one.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"--samples {samples}: a run sees at least one sample")
    wanted = num_samples(num_images) if samples is None else samples
    batch = min(config.total_batch_size, LARGEST_BATCH)
    early: dict[str, Any] = {
        "schedule.epochs": max(1, round(wanted / num_images)),
        "total_batch_size": max(batch, config.cluster.num_workers),
        "optim.lr": config.optim.lr * LR_SHARE,
        "schedule.min_delta": MIN_DELTA,
    }
    if config.model.backbone.pretrained:
        factor = min(config.optim.backbone_lr_factor, BACKBONE_LR_FACTOR)
        early["optim.backbone_lr_factor"] = factor
    plan = {key: value for key, value in early.items() if key not in given}
    epochs = plan.get("schedule.epochs", config.schedule.epochs)
    batch = plan.get("total_batch_size", config.total_batch_size)
    steps = math.ceil(epochs * num_images / batch)
    every = max(1, round(epochs / NUM_EVALUATIONS))
    if "evaluate_every_epochs" in given:
        every = config.evaluate_every_epochs
    late: dict[str, Any] = {
        "schedule.warmup_epochs": round(WARMUP_SHARE * epochs, 3),
        "evaluate_every_epochs": every,
        "log_every_steps": max(1, min(config.log_every_steps, steps // NUM_EVALUATIONS)),
        "schedule.patience": max(3, math.ceil(PATIENCE_SHARE * epochs / every)),
    }
    plan |= {key: value for key, value in late.items() if key not in given}

    config = override(config, plan)
    schedule, optim = config.schedule, config.optim
    length = (
        f"{epochs * num_images:,} samples: {_epochs(epochs)} of {num_images} images, {steps:,} "
        f"updates of {batch}"
    )
    if samples is None and "schedule.epochs" not in given:
        length += (
            f" (each image {SAMPLES_PER_IMAGE} times, at least {LEAST_SAMPLES:,} samples and at "
            f"most {MOST_SAMPLES:,} or {MOST_EPOCHS} epochs)"
        )
    lr = optim.lr_for(batch)
    half = "" if "optim.lr" in given else ", half the recipe's, for pretrained weights"
    rate = (
        f"learning rate {lr:.3g}{half}; backbone {lr * optim.backbone_lr_factor:.3g}; warm-up over "
        f"{_epochs(schedule.warmup_epochs)} for the new heads, then {schedule.shape} decay"
    )
    stop = f"AP every {_epochs(config.evaluate_every_epochs)}; the best checkpoint is kept; "
    if schedule.patience is None:
        stop += "no early stopping"
    else:
        stop += (
            f"stops early after {schedule.patience} evaluations without {schedule.min_delta:g} AP "
            "more"
        )
    if optim.freeze:
        stop += f"; {', '.join(optim.freeze)} do{'es' * (len(optim.freeze) == 1)} not train"
    return FinetunePlan(plan, [length, rate, stop])


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'s' * (count != 1)}"


def machine_plan(
    config: RunConfig, *, given: Set[str] = frozenset(), num_gpus: int, num_cpus: int
) -> FinetunePlan:
    """Choose the number of workers for this machine, if no cluster is named."""
    cluster = config.cluster
    if os.environ.get("RAY_ADDRESS") or any(key.startswith("cluster.") for key in given):
        return FinetunePlan({}, [])
    gpu = cluster.gpu and num_gpus > 0
    workers = max(1, min(cluster.num_workers, num_gpus if gpu else num_cpus))
    cpus = min(cluster.cpus_per_worker, num_cpus / workers)
    if gpu:
        cpus = max(1.0, min(cluster.cpus_per_worker, num_cpus // workers))
    elif cluster.gpu:
        workers, cpus = 1, float(num_cpus)
    changes: dict[str, Any] = {
        "cluster.num_workers": workers,
        "cluster.gpu": gpu,
        "cluster.cpus_per_worker": cpus,
    }
    if not gpu and "precision" not in given:
        changes["precision"] = "fp32"  # most processors are no faster in bfloat16
    if override(config, changes) == config:
        return FinetunePlan({}, [])
    kind = "GPU" if gpu else "CPU"
    note = "" if gpu or not cluster.gpu else ", which has no GPU: this will be slow"
    team = f"{workers} {kind} worker{'s' * (workers > 1)}"
    return FinetunePlan(changes, [f"{team}, what this machine can run{note}"])
