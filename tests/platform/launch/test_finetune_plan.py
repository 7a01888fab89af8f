"""The plan gives the stated schedule, and keeps the values that the user gave."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from deta.jobs.deta_r50 import VARIANTS, official_12ep, small
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.launch.finetune_plan import (
    base_config,
    machine_plan,
    num_samples,
    schedule_plan,
    size_reason,
    variant_of,
)
from deta.platform.run.config import RunConfig, flatten, override


@pytest.mark.parametrize(
    ("num_images", "expected"),
    [
        (1, 6_000),  # the floor
        (100, 6_000),
        (500, 30_000),  # 60 an image
        (1_000, 60_000),
        (5_000, 60_000),  # the ceiling
        (100_000, 600_000),  # 6 epochs
    ],
)
def test_samples_grow_with_the_set_between_floor_and_ceiling(num_images: int, expected: int):
    assert num_samples(num_images) == expected


@pytest.mark.parametrize("num_images", [1, 7, 112, 205, 5_000, 118_287])
@pytest.mark.parametrize("recipe", [official_12ep, small])
def test_a_plan_fits_every_size_of_set(num_images: int, recipe):
    base = base_config(recipe(), None)
    plan = schedule_plan(base, num_images)
    config = override(base, plan.changes)
    schedule = config.schedule
    samples = schedule.epochs * num_images
    assert math.isclose(samples, num_samples(num_images), abs_tol=num_images)
    assert config.total_batch_size <= 8
    assert config.optim.lr == recipe().optim.lr / 2
    from_imagenet = config.model.backbone.pretrained
    assert config.optim.backbone_lr_factor == (0.1 if from_imagenet else 1.0)
    evaluations = schedule.epochs / config.evaluate_every_epochs
    assert evaluations <= 21
    assert schedule.patience is not None
    assert schedule.patience >= 3
    assert schedule.lr_factor(schedule.warmup_epochs) == pytest.approx(1)
    assert schedule.lr_factor(schedule.epochs) == pytest.approx(0)
    text = "\n".join(plan.reasons)
    assert len(plan.reasons) == 3
    assert f"{samples:,} samples" in text
    assert f"rate {config.optim.lr:.3g}" in text
    assert f"{schedule.patience} evaluations" in text


def test_given_values_stay_and_the_rest_follows_from_them():
    changes = {
        "schedule.epochs": "10",
        "schedule.shape": "step",
        "schedule.lr_drop_epochs": "8",
        "schedule.patience": "none",
        "optim.lr": "3e-4",
        "total_batch_size": "16",
    }
    base = override(base_config(official_12ep(), None), changes)
    plan = schedule_plan(base, 100, given=frozenset(changes))
    config = override(base, plan.changes)
    assert config.schedule.epochs == 10
    assert config.schedule.shape == "step"
    assert config.schedule.lr_drop_epochs == (8.0,)
    assert config.schedule.patience is None
    assert config.schedule.warmup_epochs == 0.5
    assert config.optim.lr == 3e-4
    assert config.total_batch_size == 16
    assert config.evaluate_every_epochs == 1
    assert "no early stopping" in plan.reasons[-1]
    assert "half" not in "".join(plan.reasons)


def test_the_requested_number_of_samples_is_planned():
    base = base_config(small(), None)
    config = override(base, schedule_plan(base, 112, samples=2_700).changes)
    assert config.schedule.epochs == 24
    with pytest.raises(ValueError, match="at least one sample"):
        schedule_plan(base, 112, samples=0)


def test_the_printed_rate_includes_the_rule():
    base = override(
        base_config(official_12ep(), None), {"optim.lr_rule": "linear", "optim.lr_base_batch": 16}
    )
    assert "rate 5e-05" in schedule_plan(base, 100).reasons[1]  # half, and half again at batch 8


def test_model_and_image_sizes_are_the_checkpoints_and_training_is_the_recipes():
    theirs = override(
        small(),
        {
            "model.dim": 64,
            "optim.lr": 5.0,
            "data.evaluation_size.short_edge": 99,
            "data.train_images": "/somewhere",
            "name": "theirs",
        },
    )
    config = base_config(official_12ep(), theirs)
    assert config.model == theirs.model
    assert config.data.evaluation_size == EvaluationSize(short_edge=99, max_long_edge=320)
    assert config.data.augmentation == theirs.data.augmentation
    assert config.data.train_images == ""
    assert config.optim == official_12ep().optim
    assert config.name == "deta-r50-12ep-finetune"


@pytest.mark.parametrize(
    ("edges", "warns", "seen"),
    [([504], True, 7), ([30, 50], True, 90), ([100, 150, 200], False, 0)],
)
def test_the_size_that_a_checkpoint_brings_along_is_told(edges: list[int], warns: bool, seen: int):
    config = override(small(), {"data.evaluation_size.short_edge": 112})

    said = size_reason(config, edges)

    assert "a short edge of 112 px" in said
    assert f"the training images have {np.median(edges):g} px" in said
    assert said.startswith("! ") == warns
    assert not warns or f"32 px is seen with {seen} px" in said
    for key in ("data.evaluation_size.short_edge", "data.augmentation.short_edges"):
        assert not warns or key in said
        assert key in flatten(config)


def test_the_variant_with_the_same_model_is_found_for_any_classes():
    assert variant_of(replace(small().model, num_classes=3), VARIANTS) == "small"
    assert variant_of(official_12ep().model, VARIANTS) == "official_12ep"
    assert variant_of(replace(small().model, dim=32), VARIANTS) is None


@pytest.mark.parametrize(
    ("recipe", "num_gpus", "num_cpus", "expected"),
    [
        (official_12ep, 8, 96, None),  # as the recipe has it
        (official_12ep, 1, 16, (1, True, 4)),
        (official_12ep, 2, 4, (2, True, 2)),
        (official_12ep, 0, 4, (1, False, 4)),
        (small, 0, 8, None),
        (small, 4, 1, (1, False, 1)),
    ],
)
def test_workers_are_what_the_machine_can_run(monkeypatch, recipe, num_gpus, num_cpus, expected):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config: RunConfig = recipe()
    plan = machine_plan(config, num_gpus=num_gpus, num_cpus=num_cpus)
    cluster = override(config, plan.changes).cluster
    found = (cluster.num_workers, cluster.gpu, cluster.cpus_per_worker)
    was = config.cluster
    assert found == (expected or (was.num_workers, was.gpu, was.cpus_per_worker))
    assert bool(plan.reasons) == (expected is not None)


def test_a_named_cluster_and_given_values_stay(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://somewhere")
    assert not machine_plan(official_12ep(), num_gpus=0, num_cpus=2).changes
    monkeypatch.delenv("RAY_ADDRESS")
    given = frozenset({"cluster.num_workers"})
    assert not machine_plan(official_12ep(), given=given, num_gpus=0, num_cpus=2).changes
