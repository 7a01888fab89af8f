"""DETA: the complete model in one forward pass.

Source: NMS Strikes Back, Ouyang-Zhang et al. 2022, https://arxiv.org/abs/2212.06137. With
`proposal_selection="highest"` the same network is the improved Deformable DETR of that paper.
"""

# B images   H W height and width   L levels   S pixels of all levels, flattened   D channels
# Q queries   C classes   K decoder layers

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deta.model.backbone import Backbone, GroupNorm
from deta.model.config import ModelConfig
from deta.model.position import encode_boxes, encode_pixels
from deta.model.proposals import make_anchors, select_highest, select_spread
from deta.model.transformer import (
    BoxHead,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Levels,
)

PRIOR_PROBABILITY = 0.01  # of every class, initially (focal loss, Lin et al. 2017, section 4.1)


@dataclass(frozen=True)
class Predictions:
    """The predictions that every detector returns, in float32."""

    logits: Tensor  # K B Q C, of each decoder layer
    boxes: Tensor  # K B Q 4, cxcywh, relative to the unpadded image


@dataclass(frozen=True)
class Outputs(Predictions):
    """The predictions of DETA, and what its losses need in addition, in float32."""

    proposals: Tensor  # B Q 4, where the decoder started; detached
    encoder_logits: Tensor  # B S C
    encoder_boxes: Tensor  # B S 4
    anchors: Tensor  # B S 4; (1, 1, 1, 1) where there is none


class InputProjection(nn.Sequential):
    """A projection of a backbone map, or of the level before, to D channels."""

    def __init__(self, in_channels: int, dim: int, kernel_size: int, stride: int) -> None:
        convolution = nn.Conv2d(
            in_channels, dim, kernel_size, stride=stride, padding=kernel_size // 2
        )
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        super().__init__(convolution, GroupNorm(math.gcd(32, dim), dim))

    def forward(self, x: Tensor) -> Tensor:
        # On maps one pixel wide, oneDNN's gradient for the weights of a bfloat16 convolution with a
        # stride has values from memory that nothing was written to (PyTorch 2.15).
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.shape[3] == 1:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)


class FeaturePyramid(nn.Module):
    """Images -> L maps of D channels: strides 8, 16, 32, and extra ones made from the last."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone)
        channels = self.backbone.channels
        num_extra = config.num_levels - len(channels)
        extra_inputs = [channels[-1]] + [config.dim] * (num_extra - 1)
        self.projections = nn.ModuleList(
            [InputProjection(c, config.dim, kernel_size=1, stride=1) for c in channels]
            + [
                InputProjection(c, config.dim, kernel_size=3, stride=2)
                for c in extra_inputs[:num_extra]
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.project(self.backbone(images))

    def project(self, features: list[Tensor]) -> list[Tensor]:
        num_maps = len(features)
        levels = [
            projection(feature)
            for projection, feature in zip(self.projections[:num_maps], features, strict=True)
        ]
        coarsest = features[-1]  # the first extra level is made from this, not from its projection
        for projection in self.projections[num_maps:]:
            coarsest = projection(coarsest)
            levels.append(coarsest)
        return levels


class RecomputedEncoderLayer(EncoderLayer):
    """An encoder layer that stores only its input and recomputes the rest for the backward pass."""

    def forward(self, memory: Tensor, position: Tensor, centres: Tensor, levels: Levels) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(memory, position, centres, levels)
        return checkpoint(super().forward, memory, position, centres, levels, use_reentrant=False)


class FirstStage(nn.Module):
    """The layers that make features to score every pixel, and queries from the selected pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.memory_projection = nn.Linear(dim, dim)
        self.memory_norm = nn.LayerNorm(dim)
        self.box_projection = nn.Linear(2 * dim, 2 * dim)
        self.box_norm = nn.LayerNorm(2 * dim)
        self.content_projection = nn.Linear(dim, dim)
        self.content_norm = nn.LayerNorm(dim)

    def describe(self, memory: Tensor, used: Tensor) -> Tensor:
        """Return the input of the first-stage heads, B S D; the same for all unused pixels."""
        return self.memory_norm(self.memory_projection(memory.masked_fill(~used[..., None], 0)))

    def make_queries(self, proposals: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Make queries and their positions, B Q D, from proposals (B Q 4) and features (B Q D)."""
        encoded = encode_boxes(proposals, features.shape[-1] // 2)  # B Q 2·D
        position, content = self.box_norm(self.box_projection(encoded)).chunk(2, -1)
        return content + self.content_norm(self.content_projection(features)), position


class DETA(nn.Module):
    """The complete DETA model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        layer = (
            config.dim,
            config.num_heads,
            config.num_levels,
            config.num_points,
            config.ffn_dim,
            config.dropout,
        )
        self.pyramid = FeaturePyramid(config)
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, config.dim))
        encoder_layer = RecomputedEncoderLayer if config.checkpoint_encoder else EncoderLayer
        self.encoder = Encoder([encoder_layer(*layer) for _ in range(config.encoder_layers)])
        self.first_stage = FirstStage(config.dim)
        self.decoder = Decoder(
            [DecoderLayer(*layer) for _ in range(config.decoder_layers)], config.logit_eps
        )
        # One head for each decoder layer and, last, one for the first stage.
        num_heads = config.decoder_layers + 1
        self.class_heads = nn.ModuleList(
            nn.Linear(config.dim, config.num_classes) for _ in range(num_heads)
        )
        self.box_heads = nn.ModuleList(BoxHead(config.dim) for _ in range(num_heads))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialise as the official code does. Backbone and projections initialise themselves."""
        for part in (self.encoder, self.first_stage, self.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
            for module in part.modules():
                if hasattr(module, "sampling_offsets"):
                    module.reset_parameters()  # type: ignore[operator]
        prior_logit = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        for class_head, box_head in zip(self.class_heads, self.box_heads, strict=True):
            # All heads start as copies of one another.
            class_head.load_state_dict(self.class_heads[0].state_dict())
            box_head.load_state_dict(self.box_heads[0].state_dict())
            nn.init.constant_(class_head.bias, prior_logit)  # type: ignore[arg-type]

    def forward(self, images: Tensor, padding: Tensor) -> Outputs:
        """Detect objects.

        Args:
            images: B 3 H W, normalised, zero where padded.
            padding: B H W, true where there is no image.
        """
        return self.detect(self.pyramid(images), padding)

    def detect(self, features: list[Tensor], padding: Tensor) -> Outputs:
        """Detect objects, from the L levels of the pyramid (B D h w) and the padding (B H W)."""
        levels = Levels.of(
            [
                F.interpolate(padding[None].float(), size=level.shape[-2:])[0].bool()
                for level in features
            ]
        )
        memory = self.encoder(
            torch.cat([level.flatten(2).transpose(1, 2) for level in features], 1),
            self._positions(levels),
            levels,
        )

        anchor_logits, used = make_anchors(levels)
        pixel_features = self.first_stage.describe(memory, used)
        encoder_logits = self.class_heads[-1](pixel_features).float()
        encoder_box_logits = self.box_heads[-1](pixel_features, anchor_logits)
        encoder_boxes = encoder_box_logits.sigmoid()

        # Column 0 alone ranks the proposals: the first stage learns it as "any object".
        scores = encoder_logits.detach()[..., 0]
        if self.config.proposal_selection == "spread":
            chosen = select_spread(
                scores, encoder_boxes.detach(), levels.shapes, self.config.num_queries
            )
        else:
            chosen = select_highest(scores, self.config.num_queries)
        proposals = _gather(encoder_boxes.detach(), chosen)
        queries, query_position = self.first_stage.make_queries(
            proposals, _gather(pixel_features.detach(), chosen)
        )
        all_queries, all_boxes = self.decoder(
            queries, query_position, proposals, memory, levels, self.box_heads
        )
        all_logits = [
            head(queries) for head, queries in zip(self.class_heads[:-1], all_queries, strict=True)
        ]
        return Outputs(
            logits=torch.stack(all_logits).float(),
            boxes=torch.stack(all_boxes),
            proposals=proposals,
            encoder_logits=encoder_logits,
            encoder_boxes=encoder_boxes,
            anchors=anchor_logits.sigmoid(),
        )

    def _positions(self, levels: Levels) -> Tensor:
        """Return the embedding of each pixel's position and level, B S D."""
        paddings = levels.padding.split([h * w for h, w in levels.shapes], 1)
        return torch.cat(
            [
                encode_pixels(padding.unflatten(1, shape), self.config.dim).flatten(1, 2)
                + embedding
                for padding, shape, embedding in zip(
                    paddings, levels.shapes, self.level_embedding, strict=True
                )
            ],
            1,
        )


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Select rows B S D at the indices B Q -> B Q D."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))
