"""Training state: model, EMA weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from deta.model.architectures import Detector, make_detector, without_download
from deta.platform.checkpoint.format import Checkpoint
from deta.platform.learning.distributed import Worker
from deta.platform.learning.gradient_sum import GradientSum, batch_norm_statistics
from deta.platform.learning.optimizer import (
    freeze,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    trainable,
)
from deta.platform.run.run import Run
from deta.platform.weights.initial_weights import load_backbone, load_initial_weights


@dataclass(frozen=True)
class TrainState:
    """The training state of one worker. The weights are the same on all workers."""

    model: Detector
    parallel: nn.Module  # the model, or DistributedDataParallel around it
    gradients: GradientSum | None  # None: PyTorch sums the gradients
    statistics: list[Tensor]  # running statistics of each BatchNorm that trains
    ema: AveragedModel | None
    optimizer: AdamW

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate: the EMA if there is one."""
        return self.model if self.ema is None else self.ema.module

    def training_state(self) -> dict[str, Tensor]:
        """Return all tensors besides the evaluated weights; `make_train_state` restores them."""
        tensors = optimizer_state(self.optimizer, self.model)
        if self.ema is not None:
            tensors |= {f"weights/{n}": t for n, t in self.model.state_dict().items()}
            tensors["num_averaged"] = self.ema.n_averaged
        return tensors


def make_train_state(run: Run, worker: Worker, resumed: Checkpoint | None) -> TrainState:
    """Make a new state from the configured weights, or restore that of a checkpoint."""
    config, device = run.config, worker.device
    torch.manual_seed(config.seed)  # all workers start from the same weights
    is_filled = bool(resumed or config.init_checkpoint or config.init_backbone)
    model = make_detector(without_download(config.model) if is_filled else config.model)
    if resumed is None and config.init_checkpoint is not None:
        load_initial_weights(
            model, Path(config.init_checkpoint), run.train_set.categories, config.init_classes
        )
    elif resumed is None and config.init_backbone is not None:
        load_backbone(model, Path(config.init_backbone))
    freeze(model, config.optim.freeze)
    model.to(device)
    ema = None
    if config.ema_decay is not None:
        ema = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
        )
    optimizer = make_optimizer(model, config.optim, config.optim.lr_for(config.total_batch_size))
    if resumed is not None:
        _restore(resumed, model, ema, optimizer)
    parallel: nn.Module = model
    gradients = None
    if config.optim.exact_sum:
        split = [
            run.order.micro_batch_positions(0, rank, worker.world_size, config.micro_batch_size)
            for rank in range(worker.world_size)
        ]
        gradients = GradientSum(
            trainable(model.parameters()),
            worker.world_size,
            accumulates=max(map(len, split)) > 1,
            control=worker.control,
        )
    elif worker.world_size > 1:
        parallel = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None
        )
    return TrainState(model, parallel, gradients, batch_norm_statistics(model), ema, optimizer)


def _restore(
    resumed: Checkpoint, model: nn.Module, ema: AveragedModel | None, optimizer: AdamW
) -> None:
    tensors = resumed.training_state()
    evaluated = resumed.model_state()
    own = {n[len("weights/") :]: t for n, t in tensors.items() if n.startswith("weights/")}
    model.load_state_dict(own or evaluated)
    if ema is not None:
        ema.module.load_state_dict(evaluated)
        ema.n_averaged.copy_(tensors["num_averaged"])
    load_optimizer_state(optimizer, model, tensors)
