"""Postprocessing of model outputs into detections in pixels."""

# B images   Q queries   C classes   N detections in one image

from __future__ import annotations

from dataclasses import dataclass

import deta.model.without_dynamo  # noqa: F401

# isort: split
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from deta.model.boxes import cxcywh_to_xyxy
from deta.model.config import PostprocessConfig
from deta.model.detector import Predictions
from deta.model.suppression import best_surviving


@dataclass(frozen=True)
class Detections:
    """The detections in one image, best first."""

    scores: Tensor  # N, in 0..1
    labels: Tensor  # N, int64, class index
    boxes_px: Tensor  # N 4, xyxy, in pixels of the original image; may reach beyond its border

    def cpu(self) -> Detections:
        return Detections(self.scores.cpu(), self.labels.cpu(), self.boxes_px.cpu())


@torch.no_grad()
def detect_objects(
    outputs: Predictions, sizes_px: Tensor, config: PostprocessConfig
) -> list[Detections]:
    """Apply NMS to the last decoder layer's predictions and scale them to each image.

    Every (query, class) pair is a candidate, so one query may give several detections.

    Args:
        sizes_px: B 2, (height, width) of the original images.

    Source: DETA, released code; without `nms_iou`, Deformable DETR's.
    """
    scores, labels, boxes_px = _candidates(outputs, sizes_px, config)
    detections = []
    for image in range(len(scores)):
        kept = torch.arange(scores.shape[1], device=scores.device)
        if config.nms_iou is not None:
            # float64, because batched_nms separates classes by shifting their boxes
            kept = batched_nms(
                boxes_px[image].double(), scores[image].double(), labels[image], config.nms_iou
            )
        kept = kept[: config.max_detections]
        detections.append(
            Detections(scores[image, kept], labels[image, kept], boxes_px[image, kept])
        )
    return detections


@torch.no_grad()
def detect_fixed_number(
    outputs: Predictions, sizes_px: Tensor, config: PostprocessConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the detections of `detect_objects` as tensors of fixed shape, for export.

    Returns:
        Scores (B N), labels (B N) and boxes (B N 4, xyxy, in pixels), best first. N is
        `max_detections`, or the number of candidates if that is less. After the last detection of
        an image, scores and boxes are 0 and labels -1.
    """
    scores, labels, boxes_px = _candidates(outputs, sizes_px, config)
    if config.nms_iou is None:
        return scores, labels, boxes_px
    num_best = min(config.max_detections, scores.shape[1])
    chosen = best_surviving(boxes_px.double(), labels, config.nms_iou, num_best)  # B N
    is_empty = chosen < 0
    chosen = chosen.clamp(min=0)
    return (
        scores.gather(1, chosen).masked_fill(is_empty, 0),
        labels.gather(1, chosen).masked_fill(is_empty, -1),
        _gather(boxes_px, chosen).masked_fill(is_empty[..., None], 0),
    )


def _candidates(
    outputs: Predictions, sizes_px: Tensor, config: PostprocessConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores (B N), labels (B N) and boxes (B N 4) of the best pairs, best first."""
    scores = outputs.logits[-1].sigmoid()  # B Q C
    sizes_px = sizes_px.to(scores.device)
    scale = sizes_px.flip(1).repeat(1, 2).to(scores.dtype)  # B 4, width height width height
    boxes_px = cxcywh_to_xyxy(outputs.boxes[-1]) * scale[:, None]  # B Q 4
    num_queries, num_classes = scores.shape[1:]
    limit = config.max_detections if config.nms_iou is None else config.max_candidates
    scores, pairs = scores.flatten(1).topk(min(limit, num_queries * num_classes), 1)
    return scores, pairs % num_classes, _gather(boxes_px, pairs // num_classes)


def _gather(boxes: Tensor, index: Tensor) -> Tensor:
    """Select boxes B Q 4 at the indices B N -> B N 4."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))
