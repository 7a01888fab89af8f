"""The optimizer and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW as the official code sets it up."""

    lr: float = 2e-4
    backbone_lr_factor: float = 0.1
    # Of the layers that predict where deformable attention looks.
    sampling_lr_factor: float = 0.1
    weight_decay: float = 1e-4
    decay_norms: bool = True  # official decays norms and biases alike; detrex leaves norms out
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float | None = 0.1  # L2 over all weights; detrex does not clip

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr={self.lr} must be positive")
        if self.weight_decay < 0 or self.backbone_lr_factor < 0 or self.sampling_lr_factor < 0:
            raise ValueError("optim: weight_decay and the learning-rate factors cannot be negative")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"optim.max_grad_norm={self.max_grad_norm} must be positive, or none")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long to train, and the learning rate on the way, in epochs of the training set."""

    epochs: int = 12
    lr_drop_epochs: tuple[float, ...] = (10.0,)  # the rate falls tenfold at the end of each
    lr_drop_factor: float = 0.1
    warmup_epochs: float = 0.0  # linear from nothing; official has none
    # "step": drops at lr_drop_epochs. "cosine": falls to nothing at the end.
    shape: str = "step"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"schedule.epochs={self.epochs} must be at least 1")
        if self.shape not in ("step", "cosine"):
            raise ValueError(f"schedule.shape={self.shape!r} is neither step nor cosine")
        late = [drop for drop in self.lr_drop_epochs if not 0 < drop <= self.epochs]
        if late:
            raise ValueError(
                f"schedule.lr_drop_epochs={self.lr_drop_epochs}: {late} lie outside the "
                f"{self.epochs} epochs; change both together"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.warmup_epochs} is outside the {self.epochs} epochs"
            )

    def lr_factor(self, epoch: float) -> float:
        """What the rate is multiplied by after `epoch` epochs, a fraction as a rule."""
        factor = 1.0
        if self.warmup_epochs > 0:
            factor = min(1.0, epoch / self.warmup_epochs)
        if self.shape == "cosine":
            progress = max(0.0, epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
            return factor * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        drops = sum(epoch >= drop for drop in self.lr_drop_epochs)
        return factor * self.lr_drop_factor**drops


def make_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW with the published groups: backbone, sampling offsets, all else.

    Each group keeps the learning rate it starts from as `base_lr`; `set_lr` multiplies it.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d))
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        if ".backbone." in name:
            factor = config.backbone_lr_factor
        elif "sampling_offsets" in name:
            factor = config.sampling_lr_factor
        spared = id(parameter) in norms and not config.decay_norms
        decay = 0.0 if spared else config.weight_decay
        groups.setdefault((config.lr * factor, decay), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        betas=config.betas,
        fused=True,  # without it, a fifth of a small model's step on a CPU
    )


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Give every group its base rate times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
