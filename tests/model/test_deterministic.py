"""No operation of a training step lacks a deterministic kernel on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deta.model.architectures import DetectorConfig, make_criterion, make_detector
from deta.model.batch import Target, pad_batch
from deta.model.config import AnchorDETRConfig, BackboneConfig, CriterionConfig, ModelConfig

# Those of the list of `torch.use_deterministic_algorithms` that a detector could come to use.
RAISE_ON_CUDA = {
    "grid_sampler_2d_backward", "upsample_bilinear2d_backward", "upsample_nearest2d_backward",
    "_adaptive_avg_pool2d_backward", "_upsample_bilinear2d_aa_backward", "kthvalue", "median",
    "histc", "put_", "reflection_pad2d_backward", "replication_pad2d_backward",
    "adaptive_max_pool2d_backward", "nll_loss2d_forward", "_embedding_bag",
}  # fmt: skip
BACKBONE = BackboneConfig(name="resnet10t", pretrained=False, norm="group", frozen_parts=())


class Operations(TorchDispatchMode):
    """Records the operations that would raise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.names.add(name)
        is_sum_of_floats = name == "cumsum" and args[0].is_floating_point()
        if name in RAISE_ON_CUDA or is_sum_of_floats:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(
            backbone=BACKBONE, num_classes=3, num_levels=4, dim=16, num_heads=2, num_points=1,
            encoder_layers=1, decoder_layers=2, ffn_dim=16, num_queries=10,
        ),
        AnchorDETRConfig(
            backbone=BACKBONE, num_classes=3, dim=16, num_heads=2, encoder_layers=1,
            decoder_layers=2, ffn_dim=16, num_points=9,
        ),
    ],
    ids=["deta", "anchor_detr"],
)  # fmt: skip
def test_nothing_in_a_step_raises_when_algorithms_are_deterministic(config: DetectorConfig):
    torch.manual_seed(0)
    model = make_detector(config)
    kind = "iou" if isinstance(config, ModelConfig) else "one_to_one"
    criterion = make_criterion(CriterionConfig(assignment=kind), config)
    target = Target(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([1]))
    batch = pad_batch([torch.randn(3, 64, 96), torch.randn(3, 60, 64)], [target] * 2)
    with Operations() as operations:
        losses = criterion(model(batch.images, batch.padding), batch, 2.0)
        criterion.total(losses).backward()
    assert "cumsum" in operations.names
    assert operations.found == set()
