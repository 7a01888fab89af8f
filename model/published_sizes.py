"""Inference of the configuration of a DETA from its tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from deta.model.backbone import Backbone
from deta.model.config import BackboneConfig, ModelConfig
from deta.model.published_names import BIAS_TABLE, STEPS
from deta.model.shapes_only import shapes_only

BACKBONE = "pyramid.backbone."  # prefix of the names of its tensors
BODY = f"{BACKBONE}body."  # the same, without the output norms that DETA adds

# The key: blocks per stage, and whether a block has three convolutions.
_RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18.tv_in1k",
    ((3, 4, 6, 3), False): "resnet34.tv_in1k",
    ((3, 4, 6, 3), True): "resnet50.tv_in1k",
    ((3, 4, 23, 3), True): "resnet101.tv_in1k",
    ((3, 8, 36, 3), True): "resnet152.tv_in1k",
}
# The key: channels of the first stage, and blocks per stage.
_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
_SWIN_IMAGE_PX = {7: 224, 12: 384}  # by window size, as in timm's names


def with_sizes_of(state: Mapping[str, Tensor], config: ModelConfig) -> ModelConfig:
    """Return the configuration with the sizes that the tensors, under our names, determine.

    The tensors show only the product of heads and points, so both stay as configured: a wrong
    guess could fit, and give wrong boxes. They show neither the number of queries nor how these
    are selected. A missing tensor is reported later, when the weights are loaded.

    Raises:
        ValueError: there are no class heads.
    """
    sizes: dict[str, int] = {}
    if (heads := state.get("class_heads.0.bias")) is None:
        raise ValueError("has no class heads, so it is not a complete DETA")
    sizes["num_classes"] = len(heads)
    if (levels := state.get("level_embedding")) is not None:
        sizes["num_levels"], sizes["dim"] = levels.shape
    if (linear := state.get("encoder.layers.0.ffn.linear1.bias")) is not None:
        sizes["ffn_dim"] = len(linear)
    for part in ("encoder", "decoder"):
        layers = {name.split(".")[2] for name in state if name.startswith(f"{part}.layers.")}
        sizes[f"{part}_layers"] = len(layers)
    return replace(config, backbone=backbone_of(state, config.backbone), **sizes)  # type: ignore[arg-type]


def backbone_of(state: Mapping[str, Tensor], config: BackboneConfig) -> BackboneConfig:
    """Return the configuration if the tensors fit it, else that of their own ResNet or Swin.

    Tensors of any other network leave the configuration unchanged; the mismatch is reported later,
    when the weights are loaded.
    """
    found = {
        name.removeprefix(BACKBONE): tensor.shape
        for name, tensor in state.items()
        if name.startswith(BACKBONE) and not name.endswith(STEPS)
    }
    if not found or found == backbone_shapes(replace(config, pretrained=False)):
        return config
    has_norms = any(name.startswith("norms.") for name in found)
    if name := _resnet_name(found):
        return BackboneConfig(name=name, pretrained=False, output_norm=has_norms)
    if name := _swin_name(found):
        return BackboneConfig(
            name=name,
            pretrained=False,
            norm="own",
            frozen_parts=(),
            output_norm=has_norms,
            drop_path=config.drop_path,
        )
    return config


@lru_cache(maxsize=8)  # a Swin takes a second
def backbone_shapes(config: BackboneConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a backbone but its counters, without allocating memory.

    Raises:
        RuntimeError, ValueError: timm has no such network, or it has other strides.
    """
    with shapes_only():
        tensors = Backbone(config).state_dict()
    return {name: tensor.shape for name, tensor in tensors.items() if not name.endswith(STEPS)}


def _resnet_name(shapes: Mapping[str, torch.Size]) -> str | None:
    if "body.layer1.0.conv1.weight" not in shapes:
        return None
    stages = _blocks(shapes, r"body\.layer(\d+)\.(\d+)\.")
    return _RESNETS.get((stages, "body.layer1.0.conv3.weight" in shapes))


def _swin_name(shapes: Mapping[str, torch.Size]) -> str | None:
    table = shapes.get(f"body.layers_0.blocks.0.attn.{BIAS_TABLE}")
    patches = shapes.get("body.patch_embed.proj.weight")
    if table is None or patches is None:
        return None
    stages = _blocks(shapes, r"body\.layers_(\d+)\.blocks\.(\d+)\.")
    window = (math.isqrt(table[0]) + 1) // 2
    if (size := _SWINS.get((patches[0], stages))) is None or window not in _SWIN_IMAGE_PX:
        return None
    return f"swin_{size}_patch4_window{window}_{_SWIN_IMAGE_PX[window]}"


def _blocks(shapes: Mapping[str, torch.Size], pattern: str) -> tuple[int, ...]:
    """Count the blocks of each stage. The pattern captures the numbers of stage and block."""
    blocks = {
        (int(found[1]), int(found[2])) for name in shapes if (found := re.match(pattern, name))
    }
    stages = sorted({stage for stage, _ in blocks})
    return tuple(sum(stage == one for one, _ in blocks) for stage in stages)
