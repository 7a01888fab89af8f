"""Collectives of a worker group, so that all workers act alike at the same step.

One all_reduce per step: flags are ORed, counts are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """The rank of this process, the size of its group, and its device."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU
    # For messages between the hosts, so that they never wait for a device; None: the default group,
    # which is on the hosts already. See `control_group`.
    control: dist.ProcessGroup | None = None
    num_cpus: float | None = None  # that the cluster has granted; None: those of this process

    @property
    def is_leader(self) -> bool:
        """Return whether this is rank 0, which logs and writes for all."""
        return self.rank == 0


@dataclass(frozen=True)
class StepVote:
    """The counts and flags of one worker at a step, or their totals over the group."""

    num_boxes: int = 0  # in the micro-batches of the step
    stop: bool = False  # a worker was asked to stop
    save: bool = False
    check_preemption: bool = False  # time to ask the cluster about a preemption
    num_replaced: int = 0  # broken images that were replaced


def control_group(world_size: int, device: torch.device) -> dist.ProcessGroup | None:
    """Make the `control` of a `Worker`. All workers must call it."""
    if world_size == 1 or device.type == "cpu":
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this worker is a member
    return group


class DriftError(RuntimeError):
    """The weights of workers differ although they must be equal: faulty memory or link."""


def sum_votes(vote: StepVote, worker: Worker) -> StepVote:
    """Return the totals over all workers. Blocks until all of them call it."""
    if worker.world_size == 1:
        return vote
    own = [vote.num_boxes, vote.stop, vote.save, vote.check_preemption, vote.num_replaced]
    total = torch.tensor(own, dtype=torch.int64)
    dist.all_reduce(total, group=worker.control)
    num_boxes, stop, save, check_preemption, num_replaced = total.tolist()
    return StepVote(num_boxes, stop > 0, save > 0, check_preemption > 0, num_replaced)


def broadcast_from_leader(value: T, worker: Worker) -> T:
    """Return the value of rank 0 on every worker."""
    if worker.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=worker.control)
    return box[0]


def gather_from_all(value: T, worker: Worker) -> list[T]:
    """Return the values of all workers, by rank, on every worker."""
    if worker.world_size == 1:
        return [value]
    values: list[T] = [value] * worker.world_size
    dist.all_gather_object(values, value, group=worker.control)
    return values


@torch.no_grad()
def first_different_tensor(model: nn.Module, worker: Worker) -> str | None:
    """Return the first parameter or buffer whose bits differ between workers; None if none does.

    Compares one 64-bit checksum per tensor, the sum of its bits read as integers: any single
    flipped bit changes it. Costs one pass over the weights and two small all_reduce calls.
    """
    if worker.world_size == 1:
        return None
    tensors = model.state_dict()
    sums = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()]).cpu()
    least, most = sums.clone(), sums
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=worker.control)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=worker.control)
    different = (least != most).tolist()
    return next((name for name, other in zip(tensors, different, strict=True) if other), None)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(widths[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
