"""One update of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from deta.model.architectures import DetectorCriterion
from deta.model.batch import Batch
from deta.platform.learning.gradient_sum import GradientSum
from deta.platform.learning.optimizer import trainable

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StepResult:
    """The result of a step on this worker."""

    # Detached, on the device: each loss, `loss` (their weighted total) and `grad_norm` (before
    # clipping). With one worker, losses are those of the global batch. With more, each is this
    # worker's part times the number of workers, so that their mean is that of the global batch.
    scalars: dict[str, Tensor]
    updated: bool  # equal on all workers; False if any of them had a value that is not finite


def train_step(
    model: nn.Module,
    criterion: DetectorCriterion,
    micro_batches: Sequence[Batch],
    optimizer: Optimizer,
    *,
    num_boxes: int,
    seeds: Sequence[int],
    max_grad_norm: float | None,
    precision: torch.dtype,
    device: torch.device,
    gradients: GradientSum | None = None,
) -> StepResult:
    """Update the weights once, from all micro-batches of all workers.

    Apart from rounding, the result does not depend on how the global batch is split among workers
    and micro-batches: every loss is a sum over images, divided by the number of boxes in the
    global batch.

    A loss that is not finite turns this worker's gradients into NaN. The all_reduce of gradients
    carries that to all workers, without another collective, and none updates its weights.

    Args:
        model: the detector, bare or wrapped in DistributedDataParallel.
        micro_batches: this worker's share of the global batch, on the host; at least one.
        num_boxes: in the global batch, over all workers.
        seeds: one for each micro-batch, for all random numbers of the model; below 2**64.
        precision: torch.float32, or torch.bfloat16 for autocast.
        gradients: sums them over micro-batches and workers; None: DistributedDataParallel does.
    """
    parallel = model if isinstance(model, DistributedDataParallel) else None
    num_averaged = dist.get_world_size() if parallel else 1  # DistributedDataParallel averages
    # At least one box in the global batch, not on each worker as in released code: otherwise a
    # batch with hardly any boxes would weigh less on more workers.
    divisor = torch.tensor(max(num_boxes, 1) / num_averaged, dtype=torch.float32).to(device)
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for index, (micro_batch, seed) in enumerate(zip(micro_batches, seeds, strict=True)):
        is_last = index == len(micro_batches) - 1
        batch = micro_batch.to(device, non_blocking=True)
        torch.manual_seed(seed >> 1)
        # DistributedDataParallel exchanges gradients after the last micro-batch only.
        with parallel.no_sync() if parallel and not is_last else contextlib.nullcontext():
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                outputs = model(batch.images, batch.padding)
            losses = criterion(outputs, batch, divisor)
            total = criterion.total(losses)
            total.mul(torch.where(total.isfinite(), 1.0, torch.nan)).backward()
        if gradients is not None:
            gradients.add()
        for name, loss in (losses | {"loss": total}).items():
            sums[name] = sums.get(name, 0) + loss.detach()

    if gradients is not None:
        gradients.all_reduce()
        sums = {name: part * gradients.num_workers for name, part in sums.items()}
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    sums["grad_norm"] = clip_grad_norm_(trainable(model.parameters()), limit)
    updated = bool(sums["grad_norm"].isfinite())  # blocks on the device, as the matching does
    if updated:
        optimizer.step()
    return StepResult(sums, updated)
