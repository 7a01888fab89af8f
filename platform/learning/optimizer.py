"""The optimizer, the learning-rate schedule, early stopping and frozen parts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

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


HEAD = re.compile(r"_heads?(\.|$)")  # in the name of a parameter of a class or box head


class FixedStatsBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that always uses its running statistics and never updates them."""

    def train(self, mode: bool = True) -> FixedStatsBatchNorm2d:
        return super().train(False)


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Freeze parts of a model. Call it before the optimizer and DDP are made.

    Args:
        parts: each is one or more dot-separated components of parameter names; or
            `all-but-heads`, which trains only the class and box heads.

    Raises:
        ValueError: the model has no such part, or nothing would be left to train.
    """
    names = dict(model.named_parameters())
    for part in parts:
        chosen = [name for name in names if f".{part}." in f".{name}."]
        if part == "all-but-heads":
            chosen = [name for name in names if not HEAD.search(name)]
        if not chosen:
            known = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(
                f"optim.freeze: the model has no part {part!r}; use one of {known}, a part inside "
                "one of them, or all-but-heads"
            )
        for name in chosen:
            names[name].requires_grad_(False)
    if not trainable(names.values()):
        raise ValueError(f"optim.freeze={','.join(parts)} leaves nothing to train")
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.BatchNorm2d) and own and not trainable(own):
            if type(module) not in (nn.BatchNorm2d, FixedStatsBatchNorm2d):
                raise ValueError(
                    f"optim.freeze: {name} is a {type(module).__name__}, whose statistics cannot "
                    "be frozen; use model.backbone.norm=frozen"
                )
            module.__class__ = FixedStatsBatchNorm2d
            module.eval()


def make_optimizer(model: nn.Module, config: OptimConfig, lr: float | None = None) -> AdamW:
    """Return AdamW with the published parameter groups: backbone, sampling offsets, all others.

    Args:
        lr: replaces `config.lr`, for example by the result of `OptimConfig.lr_for`.

    Each group stores its initial learning rate as `base_lr`; `set_lr` multiplies it.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d))
        for parameter in module.parameters(recurse=False)
    }
    base_lr = config.lr if lr is None else lr
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 1.0
        if "backbone" in name.split("."):
            factor = config.backbone_lr_factor
        elif "sampling_offsets" in name:
            factor = config.sampling_lr_factor
        decay = config.weight_decay if config.decay_norms or id(parameter) not in norms else 0.0
        groups.setdefault((base_lr * factor, decay), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay}
            for (lr, decay), parameters in groups.items()
        ],
        betas=config.betas,
        fused=True,  # unfused, it takes a fifth of a small model's step on a CPU
    )


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of every group to its base rate times the factor of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the state as `optimizer/<kind>/<parameter>` to tensor.

    Names of parameters, not their numbers, so that it survives another order of parameters.
    """
    return {
        f"optimizer/{kind}/{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Load what `optimizer_state` returned; other tensors are ignored."""
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, kind, name = key.split("/", 2)
            parameter = parameters[name]
            # AdamW counts steps on the host; its moments are on the device of the parameter.
            device = "cpu" if kind == "step" else parameter.device
            optimizer.state[parameter][kind] = tensor.to(device)


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in parameters if parameter.requires_grad]
