"""The options of the optimizer, the learning-rate schedule and early stopping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LrRule = Literal["none", "sqrt", "linear"]
# Exponent of the ratio of the total batch to lr_base_batch.
LR_RULES: Mapping[LrRule, float] = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Options of AdamW. Defaults: as the official code sets it up."""

    lr: float = 2e-4
    # How the rate scales with the total batch: "linear" with its ratio to `lr_base_batch`, "sqrt"
    # with the root of that ratio, "none" not at all. The rate is computed when the optimizer is
    # made; `lr` itself does not change, so that a resumed run cannot scale it twice.
    lr_rule: LrRule = "none"
    lr_base_batch: int | None = None  # images per update that `lr` is meant for
    backbone_lr_factor: float = 0.1
    # For the layers that predict the sampling offsets of deformable attention.
    sampling_lr_factor: float = 0.1
    weight_decay: float = 1e-4
    decay_norms: bool = True  # official decays norms and biases alike; detrex leaves norms out
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 0.1  # L2 over all weights; detrex does not clip
    # Sum gradients in float64 over micro-batches and workers, so that any number of workers gives
    # the same bits. Takes 8 bytes per weight, and the all_reduce follows the backward pass. Without
    # it, DistributedDataParallel overlaps its all_reduce with the backward pass.
    exact_sum: bool = True
    # Frozen parts, besides `model.backbone.frozen_parts`: names as in the model's parameters, such
    # as backbone, encoder, decoder.layers.0; or all-but-heads.
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} must be positive")
        if self.lr_rule not in LR_RULES:
            raise ValueError(f"optim.lr_rule={self.lr_rule!r} is not one of {', '.join(LR_RULES)}")
        if self.lr_base_batch is not None and self.lr_base_batch < 1:
            raise ValueError(f"optim.lr_base_batch={self.lr_base_batch} must be at least 1")
        if self.lr_rule != "none" and self.lr_base_batch is None:
            raise ValueError(
                f"optim.lr_rule={self.lr_rule} needs optim.lr_base_batch, the total batch that "
                "optim.lr is meant for"
            )
        if self.weight_decay < 0 or self.backbone_lr_factor < 0 or self.sampling_lr_factor < 0:
            raise ValueError("optim: weight_decay and the learning-rate factors cannot be negative")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"optim.max_grad_norm={self.max_grad_norm} must be positive, or none")

    def lr_for(self, total_batch_size: int) -> float:
        """Return the learning rate for a total batch size, before the schedule."""
        if self.lr_base_batch is None:
            return self.lr
        return self.lr * (total_batch_size / self.lr_base_batch) ** LR_RULES[self.lr_rule]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of training and learning-rate schedule, in epochs of the training set."""

    epochs: int = 12
    lr_drop_epochs: tuple[float, ...] = (10.0,)  # the rate drops tenfold at the end of each
    lr_drop_factor: float = 0.1
    warmup_epochs: float = 0.0  # linear from zero; official has none
    # "step": drops at lr_drop_epochs. "cosine": falls to zero at the end.
    shape: str = "step"
    # Early stopping: after this many evaluations in a row without a better AP; none: never.
    patience: int | None = None
    min_delta: float = 0.0  # better means by more than this, in points of AP (0..100)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs={self.epochs} must be at least 1")
        if self.shape not in ("step", "cosine"):
            raise ValueError(f"schedule.shape={self.shape!r} is neither step nor cosine")
        if late := [drop for drop in self.lr_drop_epochs if not 0 < drop <= self.epochs]:
            raise ValueError(
                f"schedule.lr_drop_epochs={self.lr_drop_epochs}: {late} lie outside the "
                f"{self.epochs} epochs; change both together"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.warmup_epochs} is outside the {self.epochs} epochs"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"schedule.patience={self.patience} must be at least 1, or none")
        if self.min_delta < 0:
            raise ValueError(f"schedule.min_delta={self.min_delta} cannot be negative")

    def is_exhausted(self, aps: Sequence[float]) -> bool:
        """Return whether early stopping ends a run whose evaluations, in order, had these APs."""
        return self.patience is not None and num_without_gain(aps, self.min_delta) >= self.patience

    def lr_factor(self, epoch: float) -> float:
        """Return the factor of the learning rate after `epoch` epochs, which may be a fraction."""
        factor = 1.0
        if self.warmup_epochs > 0:
            factor = min(1.0, epoch / self.warmup_epochs)
        if self.shape == "cosine":
            progress = max(0.0, epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return factor * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        drops = sum(epoch >= drop for drop in self.lr_drop_epochs)
        return factor * self.lr_drop_factor**drops


def num_without_gain(aps: Sequence[float], min_delta: float) -> int:
    """Count the last APs that did not exceed the best before them by more than min_delta."""
    best, count = -math.inf, 0
    for ap in aps:
        best, count = (ap, 0) if ap > best + min_delta else (best, count + 1)
    return count
