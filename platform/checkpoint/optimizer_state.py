"""An optimizer's state under the names of the parameters, so that it survives another order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """`optimizer/<kind>/<parameter>` to tensor."""
    return {
        f"optimizer/{kind}/{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, kind, name = key.split("/", 2)
            parameter = parameters[name]
            # AdamW counts steps on the host; its moments live with the parameter.
            place = "cpu" if kind == "step" else parameter.device
            optimizer.state[parameter][kind] = tensor.to(place)
