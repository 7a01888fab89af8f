"""Box formats, IoU and generalized IoU.

Three formats occur, and names say which: `cxcywh` (centre and size), `xyxy` (two corners), and
"logits", the inverse sigmoid of relative cxcywh.
"""

# N boxes   M other boxes   … any leading dimensions, the same for both arguments

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert boxes from centre and size to corners, … 4 -> … 4."""
    centre, half_size = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat([centre - half_size, centre + half_size], -1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert boxes from corners to centre and size, … 4 -> … 4."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def area(boxes: Tensor) -> Tensor:
    """Return the area of each box, … 4 xyxy -> …"""
    size = boxes[..., 2:] - boxes[..., :2]
    return size[..., 0] * size[..., 1]


def _intersection_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Return intersection and union of boxes that broadcast against each other."""
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    size = (high - low).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    return intersection, area(boxes1) + area(boxes2) - intersection


def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the intersection over union of every pair of boxes.

    Args:
        boxes1: … N 4, xyxy, in any unit.
        boxes2: … M 4, xyxy, in the same unit.

    Returns:
        … N M, in 0..1. No epsilon, as in the official code: detrex adds 1e-6 to the union, which
        changes the assignment of small boxes. A pair without area gives 0 instead of NaN.
    """
    intersection, union = _intersection_union(boxes1[..., :, None, :], boxes2[..., None, :, :])
    return torch.where(union > 0, intersection / union, 0)


def generalized_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the generalized IoU of boxes that broadcast against each other.

    Args:
        boxes1: … 4, xyxy, in any unit.
        boxes2: … 4, xyxy, in the same unit.

    Returns:
        …, in (-1, 1]; 1 for equal boxes, below 0 for boxes far apart. The IoU of two boxes
        without area counts as 0, so neither the value nor the gradient is NaN.

    Source: Rezatofighi et al. 2019, algorithm 1, https://arxiv.org/abs/1902.09630
    """
    intersection, union = _intersection_union(boxes1, boxes2)
    low = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    high = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = area(torch.cat([low, high], -1))
    iou = intersection / torch.where(union > 0, union, 1)
    outside = (hull - union) / torch.where(hull > 0, hull, 1)
    return iou - outside


def pairwise_generalized_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the generalized IoU of every pair, … N 4 and … M 4 xyxy -> … N M."""
    return generalized_iou(boxes1[..., :, None, :], boxes2[..., None, :, :])


def box_logits(boxes: Tensor, eps: float) -> Tensor:
    """Return the inverse sigmoid, with both x and 1 - x clamped to at least `eps`.

    Not `torch.logit(eps=…)`, which clamps x to [eps, 1 - eps]: in float32 the two differ at the
    ends, and published weights were trained with this one.
    """
    boxes = boxes.clamp(0, 1)
    return torch.log(boxes.clamp(min=eps) / (1 - boxes).clamp(min=eps))
