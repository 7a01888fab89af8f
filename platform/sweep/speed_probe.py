"""Measure the speed of a trial before any is trained, and estimate the cost of all."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deta.platform.cluster.trainer import fit_on_cluster
from deta.platform.run.config import RunConfig, override
from deta.platform.run.journal import read_events
from deta.platform.run.run import Run
from deta.platform.study.cost import CostEstimate
from deta.platform.sweep.trial_folder import last_failure

STEPS, LOG_EVERY_STEPS = 20, 4
VAL_IMAGES = 32


@dataclass(frozen=True)
class TrialSpeed:
    """The measured speed, with the image sizes and the workers of the sweep."""

    images_per_s: float  # training, over all workers
    val_images_per_s: float
    start_s: float  # from the call to the first step
    seconds: float  # that the probe itself took

    def hours(self, run: Run, config: RunConfig) -> float:
        """Return the wall time of a complete trial in hours."""
        trial = replace(run, config=config)
        samples = trial.num_steps * config.total_batch_size
        evaluated = len(trial.evaluation_steps()) * len(run.val_set)
        seconds = samples / self.images_per_s + evaluated / self.val_images_per_s
        return (self.start_s + seconds) / 3600


def measure_speed(
    base: Run, config: RunConfig, folder: Path, print_line: Callable[[str], None]
) -> TrialSpeed:
    """Train a few steps on the cluster, and evaluate a few images.

    Args:
        config: of the trial that represents all.
        folder: for the probe's own run; removed afterwards.

    Raises:
        RuntimeError: the training fails, as the trials would.
    """
    print_line(f"measuring the speed of {STEPS} steps …")
    changes = {
        "schedule.epochs": 1,
        "schedule.lr_drop_epochs": (),
        "schedule.warmup_epochs": 0.0,
        "evaluate_every_epochs": 1,
        "log_every_steps": LOG_EVERY_STEPS,
        "num_pictures": 0,
        "checkpoint.every_minutes": None,
        "checkpoint.store": None,
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_images = min(len(base.train_set), STEPS * config.total_batch_size)
    run = replace(
        base,
        config=override(config, changes),
        folder=folder,
        train_set=base.train_set.first(num_images),
        val_set=base.val_set.first(min(len(base.val_set), VAL_IMAGES)),
    )
    began_s = time.time()
    try:
        try:
            fit_on_cluster(run, max_failures=0)
        except Exception as error:
            why = last_failure(folder) or str(error)
            raise RuntimeError(f"the probe failed, as the trials would: {why}") from error
        return _read(run, began_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def whole_estimate(
    speed: TrialSpeed, run: Run, configs: Sequence[RunConfig], at_once: int
) -> tuple[CostEstimate, CostEstimate]:
    """Estimate the cost of an average trial and of all trials."""
    hours = [speed.hours(run, config) for config in configs]
    gpu_hours = sum(h * one.cluster.num_workers for h, one in zip(hours, configs, strict=True))
    rounds = -(-len(hours) // at_once)  # the last round may be partly empty
    mean = sum(hours) / len(hours)
    unit = "GPU-hours" if run.config.cluster.gpu else "worker-hours"
    each = CostEstimate(mean, gpu_hours / len(hours), unit)
    return each, CostEstimate(mean * rounds, gpu_hours, unit)


def _read(run: Run, began_s: float) -> TrialSpeed:
    speeds: list[float] = []
    val_images_per_s, start_s = 0.0, 0.0
    for event, _ in read_events(run.folder):
        if event["kind"] == "begin":
            start_s = event["time_s"] - began_s
        elif event["kind"] == "progress":
            speeds.append(event["metrics"]["train/images_per_s"])
        elif event["kind"] == "evaluation":
            val_images_per_s = len(run.val_set) / max(1e-3, event["metrics"]["val/seconds"])
    if not speeds or not val_images_per_s:
        raise RuntimeError("the probe did not finish: its journal has no speed")
    steady = speeds[1:] or speeds  # the first steps allocate memory and fill caches
    return TrialSpeed(statistics.median(steady), val_images_per_s, start_s, time.time() - began_s)
