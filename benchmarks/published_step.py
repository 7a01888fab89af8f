"""The training step of the published DETA R50, for benchmarks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from measuring import synchronize

from deta.jobs.deta_r50 import official_12ep
from deta.model.architectures import make_criterion, without_download
from deta.model.batch import Batch, Target, pad_batch
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.learning.train_step import train_step
from deta.platform.run.config import RunConfig
from deta.platform.run.run import Run
from deta.platform.training.train_state import TrainState

NUM_OBJECTS = 8  # per image


def synthetic_run(folder: Path, ema_decay: float | None = 0.9997, exact_sum: bool = True) -> Run:
    """Make a run of the published recipe. Its synthetic data set only provides the classes."""
    shapes = write_shapes(folder / "shapes", num_train=4, num_val=2, size_px=64)
    config = official_12ep()
    config = replace(
        config,
        model=replace(without_download(config.model), num_classes=91),
        optim=replace(config.optim, exact_sum=exact_sum),
        ema_decay=ema_decay,
    )
    train_set = CocoDataset.open(shapes.train_images, shapes.train_annotations)
    val_set = CocoDataset.open(shapes.val_images, shapes.val_annotations)
    return Run(config, folder / "run", train_set, val_set)


def one_batch(size: tuple[int, int]) -> Batch:
    """Make a batch of one random image.

    Args:
        size: height and width in pixels.
    """
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, *size, generator=generator)
    boxes = torch.rand(NUM_OBJECTS, 4, generator=generator) * 0.3 + torch.tensor([0.3, 0.3, 0, 0])
    labels = torch.randint(1, 91, (NUM_OBJECTS,), generator=generator)
    return pad_batch([image], [Target(boxes, labels)], [0])


class Step:
    """A training step with these micro-batches, including the EMA update."""

    def __init__(
        self, config: RunConfig, train_state: TrainState, batches: list[Batch], num_workers: int = 1
    ) -> None:
        self.config, self.train_state, self.batches = config, train_state, batches
        self.num_boxes = NUM_OBJECTS * len(batches) * num_workers
        self.device = next(train_state.model.parameters()).device
        self.criterion = make_criterion(config.criterion, config.model)
        self.count = 0
        train_state.model.train()

    def seconds(self) -> float:
        """Take one step and return its duration."""
        synchronize(self.device)
        began_s = time.perf_counter()
        train_step(
            self.train_state.parallel, self.criterion, self.batches, self.train_state.optimizer,
            num_boxes=self.num_boxes, seeds=[self.count] * len(self.batches),
            max_grad_norm=self.config.optim.max_grad_norm, precision=torch.float32,
            device=self.device, gradients=self.train_state.gradients,
        )  # fmt: skip
        if self.train_state.ema is not None:
            self.train_state.ema.update_parameters(self.train_state.model)
        synchronize(self.device)
        self.count += 1
        return time.perf_counter() - began_s
