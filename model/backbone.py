"""Backbone: any timm network that has feature maps at strides 8, 16 and 32."""

# B images   H W height and width   C channels of a feature map

from __future__ import annotations

import math
from itertools import pairwise

import deta.model.without_dynamo  # noqa: F401

# isort: split
import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from deta.model.config import STRIDES, BackboneConfig
from deta.model.shapes_only import shapes_only

RESNET_CHANNELS, RESNET_STEM_WIDTH = (64, 128, 256, 512), 32  # timm's values, before the expansion


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, but a group with a single value gives the bias instead of an error.

    Such groups occur on the coarsest level of a tiny image that is alone in its batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Backbone(nn.Module):
    """The backbone network: B 3 H W -> one map B C h w for each stride, finest first."""

    def __init__(self, config: BackboneConfig, strides: tuple[int, ...] = STRIDES) -> None:
        super().__init__()
        self.body: nn.Module = _timm_network(config, strides)
        self.channels: list[int] = _features(self.body).channels()
        self.norms = nn.ModuleList(
            nn.LayerNorm(channels) if config.output_norm else nn.Identity()
            for channels in self.channels
        )
        if config.norm == "frozen":
            self.body = freeze_batch_norm_2d(self.body)
            if config.name.startswith("resnet"):
                _fold_frozen_norms(self.body)
        elif config.norm == "group":
            _replace_batch_norm(self.body)
        for name, parameter in self.body.named_parameters():
            if any(name == part or name.startswith(f"{part}.") for part in config.frozen_parts):
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = []
        device = images.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Faster in bfloat16, but not in float32 (measured on a CPU).
            images = images.contiguous(memory_format=torch.channels_last)
        for feature, channels, norm in zip(
            self.body(images), self.channels, self.norms, strict=True
        ):
            if feature.shape[1] != channels and feature.shape[-1] == channels:  # Swin
                feature = norm(feature).permute(0, 3, 1, 2)
            elif not isinstance(norm, nn.Identity):
                feature = norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            features.append(feature)
        return features


def _timm_network(config: BackboneConfig, wanted: tuple[int, ...]) -> nn.Module:
    is_swin = config.name.startswith("swin_")
    options: dict = {"drop_path_rate": config.drop_path} if config.drop_path or is_swin else {}
    if is_swin:
        # Published code pads to whole windows whatever the image size and never shrinks a window.
        options |= {"dynamic_img_size": True, "always_partition": True}
        if config.window is not None:
            options["window_size"] = config.window
    if config.dilated:
        if not config.name.startswith("resnet"):
            raise ValueError(f"backbone.dilated is for ResNets, not for {config.name}")
        options["output_stride"] = 16
    with shapes_only():  # built only to read its strides
        probe = timm.create_model(config.name, pretrained=False, features_only=True)
    strides = _features(probe).reduction()
    if not set(wanted) <= set(strides):
        raise ValueError(
            f"backbone {config.name} has features at strides {strides}; the detector needs {wanted}"
        )
    if config.width != 1:
        options |= _narrowed(config, channels=_features(probe).channels())
    try:
        network = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            features_only=True,
            out_indices=tuple(strides.index(stride) for stride in wanted),
            **options,
        )
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise RuntimeError(
            f"the pretrained weights of backbone {config.name} could not be loaded ({error}). "
            "Without network access, copy them into the Hugging Face cache of this machine, give "
            "a file of them with `init_backbone=FILE` or a complete detector with "
            "`init_checkpoint=FILE`, or train from scratch with `model.backbone.pretrained=false "
            "model.backbone.norm=group model.backbone.frozen_parts=[]`."
        ) from error
    if is_swin:
        network.get_submodule("patch_embed").dynamic_img_pad = True  # type: ignore[assignment]
        for module in network.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = _PaddedSwinBlock
    if config.checkpoint_activations and is_swin:  # block by block, as published
        for module in network.modules():
            if isinstance(module, SwinTransformerStage):
                module.grad_checkpointing = True
    elif config.checkpoint_activations:  # stage by stage, as timm divides any network
        network.set_grad_checkpointing(True)  # type: ignore[operator]
    return network


def _narrowed(config: BackboneConfig, channels: list[int]) -> dict:
    """Return timm's options that set the channels of every stage, scaled by `width`."""
    if config.name.startswith("resnet"):
        return {
            "channels": tuple(int(c * config.width) for c in RESNET_CHANNELS),
            "stem_width": int(RESNET_STEM_WIDTH * config.width),
        }
    if config.name.startswith("swin_"):
        return {"embed_dim": int(channels[0] * config.width)}
    raise ValueError(f"backbone.width is for ResNets and Swins, not for {config.name}")


def _features(network: nn.Module) -> FeatureInfo:
    info = network.feature_info
    assert isinstance(info, FeatureInfo)
    return info


class _PaddedSwinBlock(SwinTransformerBlock):
    """timm's Swin block, but padded to whole windows before the shift instead of after it.

    The order decides which pixels share a window at the right and bottom edges; the published
    weights were trained with this one.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        return super()._attn(padded)[:, :height, :width]


class _FoldedConv2d(nn.Conv2d):
    """A convolution that applies the frozen BatchNorm behind it through its weights.

    It writes one feature map where the two of them write three, and under autocast the map has the
    running precision. Parameters, buffers and gradients are those of the two modules.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm: FrozenBatchNorm2d = self.__dict__["norm"]  # not a child: it keeps its own name
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self._conv_forward(
            x, self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        )


class _FoldedNorm(FrozenBatchNorm2d):
    """A frozen BatchNorm that the convolution before it applies."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _fold_frozen_norms(network: nn.Module) -> None:
    """Let each convolution of a ResNet apply the frozen BatchNorm that follows it."""
    for module in network.modules():
        children = list(module.children())
        for convolution, norm in pairwise(children):
            if type(convolution) is nn.Conv2d and type(norm) is FrozenBatchNorm2d:
                convolution.__class__, norm.__class__ = _FoldedConv2d, _FoldedNorm
                convolution.__dict__["norm"] = norm


def _replace_batch_norm(network: nn.Module) -> None:
    """Replace every BatchNorm by a GroupNorm with about 16 channels per group.

    With few channels per group it would act as an instance norm, which discards the magnitude of a
    feature.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                groups = math.gcd(max(1, child.num_features // 16), child.num_features)
                setattr(module, name, GroupNorm(groups, child.num_features))
            elif isinstance(child, nn.BatchNorm2d):
                raise ValueError(
                    f"backbone.norm=group cannot replace a {type(child).__name__}; "
                    "choose a network with plain BatchNorm, such as resnet10t, or norm=batch"
                )
