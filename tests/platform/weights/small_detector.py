"""A small DETA with random weights, and a data set's categories, for the tests of weights."""

from __future__ import annotations

import torch

from deta.model.config import BackboneConfig, ModelConfig
from deta.model.detector import DETA
from deta.platform.data.coco_dataset import Category

SMALL = ModelConfig(
    # The smallest network that published weights have names for, and narrow.
    backbone=BackboneConfig(name="resnet18.tv_in1k", pretrained=False, width=0.125),
    num_classes=91,
    num_levels=4,
    dim=32,
    num_heads=4,
    num_points=2,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=32,
    num_queries=20,
)
# Ids 1 to 3 are other things in COCO: person, bicycle, car.
DATA = (Category(1, "dog"), Category(2, "resistor"), Category(3, "Person"))


def randomised(config: ModelConfig, seed: int = 0) -> DETA:
    torch.manual_seed(seed)
    model = DETA(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model
