"""Sum the gradients of a step independently of how the batch is split.

A floating-point sum depends on its order, and the order on the number of workers. One different
last bit is enough to select another proposal, and then two runs diverge: after 30 steps, losses
differed by 2 % between 4 workers and 3. A sum in float64 that is rounded once is the same for any
number of workers, unless it lies within 1e-16 of the midpoint between two float32 values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ALIGNMENT = 32  # elements; kernels read vectors from addresses that are multiples of 16 bytes


class GradientSum:
    """Accumulates gradients in float64 over the micro-batches of all workers.

    Every worker sums one part of the weights for all: it receives that part from the others, adds
    up in float64, and sends the rounded sum back. Without accumulation the gradients travel as they
    are, in float32, so that the exchange is no larger than DistributedDataParallel's.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        num_workers: int,
        *,
        accumulates: bool,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            num_workers: how many call `all_reduce`; 1 needs no process group.
            accumulates: whether any worker may have several micro-batches in a step; the same on
                all workers. It takes 20 bytes per weight then, otherwise 8; a single worker needs
                no more than 12.
            control: for messages on the host, see `Worker`.
        """
        self.parameters = list(parameters)
        self.num_workers, self.accumulates, self._control = num_workers, accumulates, control
        device = self.parameters[0].device
        sizes = [parameter.numel() for parameter in self.parameters]
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        length = sum(padded)
        length += -length % (num_workers * ALIGNMENT)  # so that all workers have equal parts
        # What a backward pass has given, and at the end the rounded sum.
        self._block = torch.zeros(length, device=device)
        self._sum = torch.zeros(length, dtype=torch.float64, device=device) if accumulates else None
        # What the workers send of the own part. Kept, as the pages of new memory cost time.
        self._parts = torch.zeros_like(
            (self._block if self._sum is None else self._sum)[: length * (num_workers > 1)]
        )
        self._gradients = [
            part[:size].view_as(parameter)
            for part, size, parameter in zip(
                self._block[: sum(padded)].split(padded), sizes, self.parameters, strict=True
            )
        ]
        self._counts = torch.zeros(len(sizes), dtype=torch.int32)  # of the gradients, on the host
        self._is_empty = True

    @property
    def is_needed(self) -> bool:
        """Return whether there is anything to sum: one gradient is its own sum."""
        return self.num_workers > 1 or self.accumulates

    @torch.no_grad()
    def add(self) -> None:
        """Move the gradients of a backward pass from the parameters to the sum."""
        assert self._is_empty or self._sum is not None
        own, given = [], []
        for part, parameter in zip(self._gradients, self.parameters, strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                own.append(part)
                given.append(parameter.grad)
        if given:
            torch._foreach_copy_(own, given)
        if self._sum is not None:
            if self._is_empty:
                self._sum.copy_(self._block)
            else:
                self._sum += self._block
        self._is_empty = False
        self._counts += torch.tensor([p.grad is not None for p in self.parameters]).int()
        for parameter in self.parameters:
            parameter.grad = None

    def all_reduce(self) -> None:
        """Set the parameters' gradients to the sum over all workers, and reset the sum.

        A parameter that no micro-batch of any worker used gets no gradient, as with one worker. The
        gradients are views of one block, which the next `add` overwrites.
        """
        source = self._block if self._sum is None else self._sum
        if self.num_workers > 1:
            # Beside the exchange between devices, which it must not wait for.
            counting = dist.all_reduce(self._counts, group=self._control, async_op=True)
            dist.all_to_all_single(self._parts, source)
            first, *others = self._parts.chunk(self.num_workers)
            own = first.double()
            for part in others:
                own += part
            dist.all_gather_into_tensor(self._block, own.float())
            assert counting is not None
            counting.wait()
        elif self._sum is not None:
            self._block.copy_(self._sum)
        for parameter, gradient, count in zip(
            self.parameters, self._gradients, self._counts.tolist(), strict=True
        ):
            parameter.grad = gradient if count else None
        self._counts.zero_()
        self._is_empty = True


def broadcast_statistics(statistics: Sequence[Tensor], num_workers: int) -> None:
    """Copy the statistics of rank 0 to all workers; each has only seen its own images."""
    if num_workers > 1:
        for statistic in statistics:
            dist.broadcast(statistic, 0)


def batch_norm_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers of all BatchNorm layers that track statistics."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in module.buffers()
    ]
