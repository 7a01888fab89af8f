"""Gradients of a step, summed so that the sum does not depend on how the batch was cut.

Floating-point sums depend on their order, and the order on the number of workers. One last bit is
enough for another proposal to be taken, and then two runs part: after 30 steps losses differed by
2 % between 4 workers and 3. Summed in float64 and rounded once, the result is the same for any
number of workers, but where a sum lies within 1e-16 of the middle between two float32 values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GradientSum:
    """Of these parameters, over the micro-batches of all workers."""

    def __init__(self, parameters: Iterable[nn.Parameter], num_workers: int) -> None:
        """
        Args:
            num_workers: that meet in `share`; 1 needs no process group.
        """
        self.parameters = list(parameters)
        self.num_workers = num_workers
        device = self.parameters[0].device
        sizes = [parameter.numel() for parameter in self.parameters]
        # One block, so that it is one exchange; at its end, how many have had each gradient at all.
        self._block = torch.zeros(sum(sizes) + len(sizes), dtype=torch.float64, device=device)
        *parts, self._given = self._block.split([*sizes, len(sizes)])
        self._sums = [
            part.view_as(parameter) for part, parameter in zip(parts, self.parameters, strict=True)
        ]

    def add(self) -> None:
        """Take the gradients of a backward pass off the parameters, and add them."""
        is_given = [parameter.grad is not None for parameter in self.parameters]
        for parameter, total in zip(self.parameters, self._sums, strict=True):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None
        self._given += torch.tensor(is_given, dtype=torch.float64).to(self._block.device)

    def all_reduce(self) -> None:
        """Give the parameters the sum over all workers, and begin anew.

        A parameter that no micro-batch of any worker has used gets none, as without workers.
        """
        if self.num_workers > 1:
            dist.all_reduce(self._block)
        for parameter, total, given in zip(
            self.parameters, self._sums, self._given.tolist(), strict=True
        ):
            parameter.grad = total.to(parameter.dtype) if given else None
        self._block.zero_()


def broadcast_statistics(statistics: Sequence[Tensor], num_workers: int) -> None:
    """Give all workers those of the first one; each has seen its own images alone."""
    if num_workers > 1:
        for statistic in statistics:
            dist.broadcast(statistic, 0)


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """What a BatchNorm that trains remembers of its batches."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in module.buffers()
    ]
