"""What the workers of a group settle among themselves, so that all do the same at the same step.

One sum a step carries all of it: each worker says what it knows, and all read what is true of any.
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
class StepVote:
    """What one worker has to say at a step, or what is true of the group."""

    num_boxes: int = 0  # in the micro-batches of the step
    stop: bool = False  # somebody was asked to leave
    save: bool = False
    ask_cluster: bool = False  # whether it is about to take a node away
    num_replaced: int = 0  # images that were broken


class DriftError(RuntimeError):
    """Workers whose weights must be equal have different ones: a fault of memory or a link."""


def sum_votes(word: StepVote, worker: Worker) -> StepVote:
    """The sums and the ors over all workers. Waits for all of them."""
    if worker.world_size == 1:
        return word
    own = [word.num_boxes, word.stop, word.save, word.ask_cluster, word.num_replaced]
    total = torch.tensor(own, dtype=torch.int64, device=worker.device)
    dist.all_reduce(total)
    num_boxes, stop, save, ask_cluster, num_replaced = total.tolist()
    return StepVote(num_boxes, stop > 0, save > 0, ask_cluster > 0, num_replaced)


def broadcast_from_leader(value: T, worker: Worker) -> T:
    """Rank 0's value, on every worker."""
    if worker.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_from_all(value: T, worker: Worker) -> list[T]:
    """Every worker's value, by rank, on every worker."""
    if worker.world_size == 1:
        return [value]
    values: list[T] = [value] * worker.world_size
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def first_different_tensor(model: nn.Module, worker: Worker) -> str | None:
    """The first parameter or buffer of which not all workers hold the same bits; none: all equal.

    Compares one 64-bit sum a tensor, over its bits taken as integers: any single flipped bit
    changes it. Costs one pass over the weights and two small exchanges.
    """
    if worker.world_size == 1:
        return None
    tensors = dict(model.state_dict())
    sums = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()]).to(worker.device)
    least, most = sums.clone(), sums
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    different = (least != most).tolist()
    return next((name for name, other in zip(tensors, different, strict=True) if other), None)


def _sum_of_bits(tensor: Tensor) -> Tensor:
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().contiguous().view(-1).view(widths[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


@dataclass(frozen=True)
class Worker:
    """Which of how many processes this is, and what it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = CPU

    @property
    def is_leader(self) -> bool:
        """Rank 0 speaks for all."""
        return self.rank == 0
