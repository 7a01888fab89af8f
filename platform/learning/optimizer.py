"""The optimizer, the learning-rate schedule, early stopping and frozen parts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping

import deta.model.without_dynamo  # noqa: F401

# isort: split
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from deta.platform.learning.schedule import OptimConfig

HEAD = re.compile(r"_heads?(\.|$)")  # in the name of a parameter of a class or box head


class EagerAdamW(AdamW):
    """AdamW for steps that are not compiled.

    torch's `step` imports `torch._dynamo`, which takes two seconds, to end a graph that is being
    compiled where there is one. The function within it computes the same.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        return inspect.unwrap(AdamW.step)(self, closure)


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
    return EagerAdamW(
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
            optimizer.state[parameter][kind] = tensor.to(parameter.device)


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that are not frozen."""
    return [parameter for parameter in parameters if parameter.requires_grad]
