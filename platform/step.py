"""One update of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from deta.model.architectures import DetectorCriterion
from deta.model.batch import Batch
from deta.platform.optim import trainable


def train_step(
    model: nn.Module,
    criterion: DetectorCriterion,
    micro_batches: Sequence[Batch],
    optimizer: Optimizer,
    *,
    max_grad_norm: float | None,
    precision: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """Update the weights once, from all micro-batches of all workers.

    The result does not depend on how the global batch is cut among workers and micro-batches,
    but for rounding: every loss is a sum over images, divided by the number of boxes in the whole
    global batch.

    Args:
        model: the detector, as it is or in DistributedDataParallel.
        micro_batches: this worker's share of the global batch, on the host; at least one.
        precision: torch.float32, or torch.bfloat16 for autocast.

    Returns:
        Detached scalars, still on the device: each loss of the whole global batch where there is
        one worker, this worker's part of it times the number of workers otherwise (so their mean
        is the whole), `loss`, their weighted total, and `grad_norm`, before clipping.
    """
    num_boxes = _boxes_for_each_worker(micro_batches, device)
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for index, micro_batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        batch = micro_batch.to(device, non_blocking=True)
        with _without_exchange(model, unless=is_last):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                outputs = model(batch.images, batch.padding)
            losses = criterion(outputs, batch, num_boxes)
            total = criterion.total(losses)
            total.backward()
        for name, loss in (losses | {"loss": total}).items():
            sums[name] = sums.get(name, 0) + loss.detach()

    limit = float("inf") if max_grad_norm is None else max_grad_norm
    sums["grad_norm"] = clip_grad_norm_(trainable(model.parameters()), limit)
    optimizer.step()
    return sums


def _boxes_for_each_worker(micro_batches: Sequence[Batch], device: torch.device) -> Tensor:
    """Boxes in the global batch over the number of workers; a scalar on the device."""
    count = torch.tensor(
        float(sum(batch.num_boxes for batch in micro_batches)), dtype=torch.float32
    ).to(device, non_blocking=True)
    num_workers = 1
    if dist.is_initialized():
        dist.all_reduce(count)
        num_workers = dist.get_world_size()
    # At least one box in the whole batch, not on each worker as in released code: otherwise a
    # batch with hardly any boxes would weigh less on more workers.
    return count.clamp(min=1) / num_workers


def _without_exchange(model: nn.Module, unless: bool) -> contextlib.AbstractContextManager:
    """Gradients of all but the last micro-batch stay local; the last one sends their sum."""
    if unless or not isinstance(model, DistributedDataParallel):
        return contextlib.nullcontext()
    return model.no_sync()
