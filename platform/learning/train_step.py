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


@dataclass(frozen=True)
class StepResult:
    """The result of a step on this worker."""

    # Detached, on the device: each loss, `loss` (their weighted total) and `grad_norm` (before
    # clipping). With one worker, losses are those of the global batch. With more, each is this
    # worker's part times the number of workers, so that their mean is that of the global batch.
    scalars: dict[str, Tensor]
    is_finite: Tensor  # bool, on the device; equal on all workers

    @property
    def updated(self) -> bool:
        """Return False if any worker had a value that is not finite. Waits for the device."""
        return bool(self.is_finite)


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
    carries that to all workers, without another collective, and none updates its weights: the
    optimizer's kernel reads the flag on the device. So the host launches the step without waiting
    for the device, except where the model does, for its suppression.

    Args:
        model: the detector, bare or wrapped in DistributedDataParallel.
        micro_batches: this worker's share of the global batch, on the host or the device; at least
            one.
        optimizer: a fused one, whose kernel can skip the update.
        num_boxes: in the global batch, over all workers.
        seeds: one for each micro-batch, for all random numbers of the model; below 2**64.
        precision: torch.float32, or torch.bfloat16 for autocast.
        gradients: sums them over micro-batches and workers; None: DistributedDataParallel does.
    """
    parallel = model if isinstance(model, DistributedDataParallel) else None
    num_averaged = dist.get_world_size() if parallel else 1  # DistributedDataParallel averages
    # At least one box in the global batch, not on each worker as in released code: otherwise a
    # batch with hardly any boxes would weigh less on more workers.
    divisor = torch.full((), max(num_boxes, 1) / num_averaged, device=device)
    exact = gradients if gradients is not None and gradients.is_needed else None
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
        if exact is not None:
            exact.add()
        for name, loss in (losses | {"loss": total}).items():
            sums[name] = sums[name] + loss.detach() if name in sums else loss.detach()

    if exact is not None:
        exact.all_reduce()
    if exact is not None and exact.num_workers > 1:
        sums = {name: part * exact.num_workers for name, part in sums.items()}
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    sums["grad_norm"] = clip_grad_norm_(trainable(model.parameters()), limit)
    is_finite = sums["grad_norm"].isfinite()
    optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()  # type: ignore[attr-defined]
    optimizer.step()
    return StepResult(sums, is_finite)
