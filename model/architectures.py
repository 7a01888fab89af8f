"""The detectors there are. A configuration's type says which one; nothing else asks.

A third detector is a file beside `anchor_detr.py` and a line in each function here.
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
    """The model, with freshly drawn weights but for the backbone's, if those are pretrained."""
    if isinstance(config, AnchorDETRConfig):
        return AnchorDETR(config)
    return DETA(config)


def make_criterion(config: CriterionConfig, model: DetectorConfig) -> DetectorCriterion:
    """What a model of this configuration learns from.

    Raises:
        ValueError: the assignment needs a first stage, which the model has not.
    """
    if isinstance(model, AnchorDETRConfig):
        return OneToOneCriterion(config)
    return Criterion(config, model.num_queries)


def without_download(config: DetectorConfig) -> DetectorConfig:
    """The model without pretrained backbone weights, for one that is about to be filled anyway."""
    return replace(config, backbone=replace(config.backbone, pretrained=False))
