"""The detector architectures. The type of a configuration selects one; only this file checks it.

To add a detector, write a file beside `anchor_detr.py` and add a branch to each function here.
"""

from __future__ import annotations

from dataclasses import replace

from deta.model.anchor_detr import AnchorDETR, AnchorDETRConfig
from deta.model.criterion import Criterion, CriterionConfig, OneToOneCriterion
from deta.model.detector import DETA, ModelConfig

DetectorConfig = ModelConfig | AnchorDETRConfig
Detector = DETA | AnchorDETR  # `detector(images, padding)` gives at least `Predictions`
DetectorCriterion = Criterion | OneToOneCriterion


def make_detector(config: DetectorConfig) -> Detector:
    """Build the detector. Its weights are random, except those of a pretrained backbone."""
    if isinstance(config, AnchorDETRConfig):
        return AnchorDETR(config)
    return DETA(config)


def make_criterion(config: CriterionConfig, model: DetectorConfig) -> DetectorCriterion:
    """Build the training losses for a model of this configuration.

    Raises:
        ValueError: the assignment needs a first stage, which the model does not have.
    """
    if isinstance(model, AnchorDETRConfig):
        return OneToOneCriterion(config)
    return Criterion(config, model.num_queries)


def without_download(config: DetectorConfig) -> DetectorConfig:
    """Turn off pretrained backbone weights, for a model whose weights will be loaded anyway."""
    return replace(config, backbone=replace(config.backbone, pretrained=False))
