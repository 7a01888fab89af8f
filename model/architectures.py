"""The detector architectures. The type of a configuration selects one.

To add a detector, write files beside `anchor_detr.py` and `pretrained_anchor.py`, and add it here.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

from deta.model import pretrained, pretrained_anchor
from deta.model.anchor_detr import AnchorDETR
from deta.model.config import AnchorDETRConfig, CriterionConfig, ModelConfig
from deta.model.criterion import Criterion, OneToOneCriterion
from deta.model.detector import DETA

DetectorConfig = ModelConfig | AnchorDETRConfig
Detector = DETA | AnchorDETR  # `detector(images, padding)` gives at least `Predictions`
DetectorCriterion = Criterion | OneToOneCriterion

# The modules that name and check the tensors of each architecture. Each has the
# functions `fit`, `select_classes`, `shapes_of`, `trace_published`, `published_config` and
# `to_published`.
LAYOUTS: dict[type[DetectorConfig], ModuleType] = {
    ModelConfig: pretrained,
    AnchorDETRConfig: pretrained_anchor,
}


def layouts_of(config: DetectorConfig) -> ModuleType:
    """Return the module of `LAYOUTS` for a model of this configuration."""
    return LAYOUTS[type(config)]


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
