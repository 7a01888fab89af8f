"""What each Ray Train worker does."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from deta.platform.config import RunConfig, from_json
from deta.platform.detect import Worker
from deta.platform.training import Run, train


def train_worker(settings: dict[str, Any]) -> None:
    """Train as one of the workers of a Ray Train group, from the run's last checkpoint on."""
    logging.basicConfig(level=logging.WARNING)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32; bf16 is asked for by name
    data = ray.get(settings["data"])
    run = Run(
        config=from_json(RunConfig, settings["config"]),
        folder=Path(settings["folder"]),
        train_set=data["train_set"],
        val_set=data["val_set"],
        code_commit=settings["code_commit"],
    )
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    train(run, worker, on_evaluation=_report)


def _report(metrics: dict[str, float]) -> None:
    # Ray ranks by these and keeps them as JSON: a value that is not finite breaks its restart.
    ray.train.report({name: value for name, value in metrics.items() if math.isfinite(value)})
