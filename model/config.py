"""The configurations of models, losses and postprocessing.

Without torch, so that a command line that only reads or prints them answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

STRIDES = (8, 16, 32)  # DETA builds its extra levels from the last of these


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Configuration of the backbone. The defaults are those of DETA R50."""

    name: str = "resnet50.tv_in1k"  # any timm network with features at strides 8, 16 and 32
    pretrained: bool = True  # start from timm's weights of that name; downloads them once
    # "frozen": BatchNorm with fixed statistics and weights, as in all published DETA R50.
    # "batch": trainable BatchNorm; its result depends on how a batch is split among workers.
    # "group": GroupNorm instead, for training from scratch; independent of the split.
    # "own": the norms of the network, unchanged.
    norm: Literal["frozen", "batch", "group", "own"] = "frozen"
    frozen_parts: tuple[str, ...] = ("conv1", "bn1", "layer1")  # not trained; names as in timm
    output_norm: bool = False  # a LayerNorm after each output, as in DETA with Swin
    drop_path: float = 0.0  # stochastic depth rate of the last block; lower in earlier ones
    window: int | None = None  # window size of a Swin, if not the one in its name
    width: float = 1.0  # of a ResNet or Swin from scratch: 0.5 halves the channels everywhere
    dilated: bool = False  # the last stage of a ResNet at stride 16 instead of 32 ("DC5")
    # Store only the input of each block and recompute the rest in the backward pass: less memory,
    # more time, the same gradients. Official DETA does so in Swin.
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        if self.norm not in ("frozen", "batch", "group", "own"):
            raise ValueError(f"backbone.norm={self.norm!r} is not frozen, batch, group or own")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"backbone.drop_path={self.drop_path} is not in 0..1")
        if self.width <= 0 or (self.width != 1 and self.pretrained):
            raise ValueError(
                f"backbone.width={self.width} must be positive, and 1 where pretrained weights are "
                "loaded"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of DETA. The defaults are DETA R50 5-scale as published."""

    architecture: Literal["deta"] = "deta"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 80
    num_levels: int = 5
    dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 2048
    dropout: float = 0.0
    num_queries: int = 900
    # "spread": per-level candidates, NMS and a quota for each level (DETA).
    # "highest": the highest scores of all levels (improved Deformable DETR).
    proposal_selection: Literal["spread", "highest"] = "spread"
    logit_eps: float = 1e-5  # official and Hugging Face; detrex trained its weights with 1e-3
    # Store only the input of each encoder layer and recompute the rest in the backward pass.
    checkpoint_encoder: bool = False

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.num_queries < 1:
            raise ValueError(
                f"num_classes={self.num_classes} and num_queries={self.num_queries} must be at "
                "least 1"
            )
        if self.num_levels < len(STRIDES):
            raise ValueError(
                f"num_levels={self.num_levels} must be at least {len(STRIDES)}, the number of maps "
                "that the backbone gives"
            )
        if self.dim % 4 or self.dim % self.num_heads:
            raise ValueError(
                f"dim={self.dim} must be a multiple of 4 and of {self.num_heads} heads"
            )
        if self.proposal_selection not in ("spread", "highest"):
            raise ValueError(
                f"proposal_selection={self.proposal_selection!r} is neither spread nor highest"
            )


@dataclass(frozen=True, kw_only=True)
class AnchorDETRConfig:
    """Configuration of Anchor DETR. The defaults are Anchor DETR R50 C5 as published."""

    architecture: Literal["anchor_detr"] = "anchor_detr"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_classes: int = 80
    dim: int = 256
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    ffn_dim: int = 1024
    dropout: float = 0.0
    num_points: int = 300
    num_patterns: int = 3  # one point may have several objects around it
    # "learned": training moves them. "grid": fixed and evenly spaced, the nearest square number.
    points: Literal["learned", "grid"] = "learned"
    # Keys are averages over a column or row of the feature map. Released code includes padding, so
    # a prediction depends on the other images of the batch; false excludes it.
    average_padding: bool = True
    logit_eps: float = 1e-5  # official; detrex trained its weights with 1e-3

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.num_points < 1 or self.num_patterns < 1:
            raise ValueError(
                f"num_classes={self.num_classes}, num_points={self.num_points} and "
                f"num_patterns={self.num_patterns} must be at least 1"
            )
        if self.dim % 4 or self.dim % self.num_heads:
            raise ValueError(
                f"dim={self.dim} must be a multiple of 4 and of {self.num_heads} heads"
            )
        if self.encoder_layers < 0 or self.decoder_layers < 1:
            raise ValueError(
                f"encoder_layers={self.encoder_layers} must be at least 0 and "
                f"decoder_layers={self.decoder_layers} at least 1"
            )
        if self.points not in ("learned", "grid"):
            raise ValueError(f"points={self.points!r} is neither learned nor grid")

    @property
    def num_queries(self) -> int:
        side = round(math.sqrt(self.num_points))
        return self.num_patterns * (self.num_points if self.points == "learned" else side**2)


@dataclass(frozen=True, kw_only=True)
class IouAssignerConfig:
    """Configuration of the IoU assigner. The defaults are those of all published results."""

    positive_iou: float
    max_positives: int  # per image; more are subsampled at random
    max_per_object: int = 4  # DETA, released code; the paper's table 6 varies it
    # A prediction assigned to two objects keeps only the one that it overlaps more. Released code
    # uses the class of one of them and counts both boxes (issue 8 of jozhang97/DETA).
    exclusive: bool = False
    # An object that no prediction overlaps stays unmatched. Released code makes every prediction
    # without overlap positive for it.
    require_overlap: bool = False
    # Subsample at random above max_positives, as released code does. Off: keep all.
    subsample: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.positive_iou <= 1:
            raise ValueError(f"positive_iou={self.positive_iou} is not in (0, 1]")
        if self.max_positives < 0 or self.max_per_object < 1:
            raise ValueError(
                f"max_positives={self.max_positives} must be at least 0 and "
                f"max_per_object={self.max_per_object} at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class MatchingCost:
    """Cost weights of the one-to-one matching, as in the released code of Deformable DETR."""

    class_: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    """Configuration of the losses and of the assignment of predictions to objects."""

    # "iou": several predictions per object, by overlap (DETA).
    # "one_to_one": the cheapest matching of each layer (improved Deformable DETR).
    assignment: Literal["iou", "one_to_one"] = "iou"
    class_weight: float = 1.0  # as in all DETA configurations; Deformable DETR uses 2
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    first_stage_iou: float = 0.7  # DETA, released code
    second_stage_iou: float = 0.6  # DETA, released code
    max_per_object: int = 4
    exclusive: bool = False  # these three: see IouAssignerConfig
    require_overlap: bool = False
    subsample: bool = True
    matching_cost: MatchingCost = field(default_factory=MatchingCost)

    def __post_init__(self) -> None:
        if self.assignment not in ("iou", "one_to_one"):
            raise ValueError(f"assignment={self.assignment!r} is neither iou nor one_to_one")
        self.assigner(self.first_stage_iou, 1)
        self.assigner(self.second_stage_iou, 1)

    def assigner(self, positive_iou: float, max_positives: int) -> IouAssignerConfig:
        """Return the configuration of the IoU assigner for one stage."""
        return IouAssignerConfig(
            positive_iou=positive_iou,
            max_positives=max_positives,
            max_per_object=self.max_per_object,
            exclusive=self.exclusive,
            require_overlap=self.require_overlap,
            subsample=self.subsample,
        )


@dataclass(frozen=True, kw_only=True)
class PostprocessConfig:
    """Configuration of the postprocessing. The defaults are DETA's."""

    nms_iou: float | None = 0.7  # within a class; None for the one-to-one baseline
    max_candidates: int = 10_000  # (query, class) pairs that enter NMS
    max_detections: int = 100  # per image; COCO counts no more

    def __post_init__(self) -> None:
        if self.nms_iou is not None and not 0 < self.nms_iou <= 1:
            raise ValueError(f"nms_iou={self.nms_iou} is not in (0, 1]")
        if self.max_candidates < 1 or self.max_detections < 1:
            raise ValueError(
                f"max_candidates={self.max_candidates} and max_detections={self.max_detections} "
                "must be at least 1"
            )
