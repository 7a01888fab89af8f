"""Assignment of predictions to ground-truth objects.

DETA assigns by IoU, several predictions per object; the baseline matches one to one. Both return
the same type, padded to the same size for all images. So the losses need no loop and no
synchronisation with the device.
"""

# B images   N objects, padded   Q predictions   M matches per object, at most   C classes
# K decoder layers

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy  # loads its modules on first use: half a second that DETA does not need
import torch
from torch import Tensor

from deta.model.batch import Targets
from deta.model.boxes import cxcywh_to_xyxy, pairwise_generalized_iou, pairwise_iou
from deta.model.config import IouAssignerConfig, MatchingCost


@dataclass(frozen=True)
class Matches:
    """The predictions that are assigned to each object."""

    predictions: Tensor  # B N M, int64
    valid: Tensor  # B N M, bool

    def pairs(self, image: int) -> tuple[Tensor, Tensor]:
        """Return (prediction, object) indices of one image, by object. Waits for the device."""
        objects, _ = self.valid[image].nonzero(as_tuple=True)
        return self.predictions[image][self.valid[image]], objects


def random_priority(seeds: Tensor, length: int) -> Tensor:
    """Return random numbers that are a pure function of each image's seed.

    So neither the number of workers nor the order of images changes the subsampling.

    Args:
        seeds: B, int64.

    Returns:
        B length, int64, at least 0.

    Source: the finalizer of SplitMix64 (Steele et al. 2014), with wrapping arithmetic.
    """
    index = torch.arange(1, length + 1, device=seeds.device)
    x = seeds[:, None] + index * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x ^ (x >> 31 & (1 << 33) - 1)) & (1 << 62) - 1


@torch.no_grad()
def assign_by_iou(
    boxes: Tensor, targets: Targets, priority: Tensor, config: IouAssignerConfig
) -> Matches:
    """Assign to each object the predictions that overlap it most, as many as chose it.

    A prediction chooses the object that it overlaps most, provided that their IoU is at least
    `positive_iou` or that no other prediction overlaps that object more. An object chosen by c
    predictions gets the min(c, max_per_object) predictions that overlap it most, whichever object
    those chose.

    Args:
        boxes: B Q 4, cxcywh, relative: proposals or anchors.
        priority: B Q; subsampling keeps the positives with the lowest priority.

    Source: DETA, Ouyang-Zhang et al. 2022, section 3.2, and the released code, which differs from
        the paper in the low-quality matches and in the subsampling.
    """
    num_boxes = boxes.shape[1]
    iou = pairwise_iou(cxcywh_to_xyxy(targets.boxes), cxcywh_to_xyxy(boxes))  # B N Q
    iou = iou.masked_fill(~targets.present[..., None], -1)

    best_iou, chosen = iou.max(1)  # B Q; ties go to the first object
    highest = iou.amax(2, keepdim=True)  # B N 1
    is_highest = (iou == highest) & targets.present[..., None]
    if config.require_overlap:
        is_highest &= highest > 0
    positive = (best_iou >= config.positive_iou) | is_highest.any(1)  # B Q

    if config.subsample and config.max_positives < num_boxes:
        last = torch.iinfo(torch.int64).max
        order = priority.to(torch.int64).masked_fill(~positive, last).argsort(dim=1, stable=True)
        kept = torch.zeros_like(positive).scatter(1, order[:, : config.max_positives], True)
        positive = positive & kept

    num_choices = torch.zeros_like(targets.labels).scatter_add(1, chosen, positive.long())  # B N
    top_iou, predictions = iou.topk(min(config.max_per_object, num_boxes), 2)  # B N M
    rank = torch.arange(predictions.shape[2], device=boxes.device)
    valid = (rank < num_choices[..., None]) & targets.present[..., None]
    if config.exclusive:
        valid = _keep_best_owner(predictions, top_iou, valid, num_boxes)
    return Matches(predictions, valid)


def _keep_best_owner(predictions: Tensor, iou: Tensor, valid: Tensor, num_boxes: int) -> Tensor:
    """Drop each match whose prediction overlaps another object more; ties keep the first."""
    num_images = len(predictions)
    flat, flat_iou = predictions.flatten(1), iou.masked_fill(~valid, -1).flatten(1)
    best = flat_iou.new_full((num_images, num_boxes), -1).scatter_reduce(1, flat, flat_iou, "amax")
    contender = valid.flatten(1) & (flat_iou == best.gather(1, flat))
    place = torch.arange(flat.shape[1], device=flat.device).expand_as(flat)
    place = place.masked_fill(~contender, flat.shape[1])
    first = place.new_full((num_images, num_boxes), flat.shape[1]).scatter_reduce(
        1, flat, place, "amin"
    )
    return (contender & (place == first.gather(1, flat))).view_as(valid)


def predicted_object(matches: Matches, num_predictions: int) -> Tensor:
    """Return the object whose class each prediction is trained on, -1 for none. B Q.

    If a prediction has several objects, the last one wins. In released code the winner depends on
    the order of the GPU's writes; here it is the same on every device.
    """
    num_images, num_objects, num_matches = matches.predictions.shape
    objects = torch.arange(num_objects, device=matches.predictions.device)
    objects = objects[:, None].expand(num_objects, num_matches).flatten().expand(num_images, -1)
    objects = objects.masked_fill(~matches.valid.flatten(1), -1)
    none = objects.new_full((num_images, num_predictions), -1)
    return none.scatter_reduce(1, matches.predictions.flatten(1), objects, "amax")


@torch.no_grad()
def match_one_to_one(
    logits: Tensor, boxes: Tensor, targets: Targets, cost: MatchingCost
) -> list[Matches]:
    """Find the cheapest one-to-one matching for each layer (Hungarian; Carion et al. 2020).

    The assignment problem is solved on the host, so this waits for the device once.

    Args:
        logits: K B Q C.
        boxes: K B Q 4, cxcywh, relative.

    Returns:
        One for each layer. With more objects than predictions, some objects stay unmatched.
    """
    num_layers, num_images, num_predictions, _ = logits.shape
    labels = targets.labels[None, :, None].expand(num_layers, -1, num_predictions, -1)
    p = logits.sigmoid().gather(3, labels)  # K B Q N
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    l1 = torch.cdist(boxes, targets.boxes.expand(num_layers, -1, -1, -1), p=1)
    giou = pairwise_generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes))
    total = cost.class_ * (positive - negative) + cost.l1 * l1 - cost.giou * giou
    # A non-finite prediction must reach the loss, which stops the run and names the images.
    costs = total.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    counts = targets.present.sum(1).tolist()

    predictions = np.zeros((num_layers, num_images, targets.labels.shape[1], 1), np.int64)
    valid = np.zeros(predictions.shape, bool)
    for layer in range(num_layers):
        for image, count in enumerate(counts):
            rows, objects = scipy.optimize.linear_sum_assignment(costs[layer, image, :, :count])
            predictions[layer, image, objects, 0] = rows
            valid[layer, image, objects, 0] = True
    return [
        Matches(torch.from_numpy(p).to(logits.device), torch.from_numpy(v).to(logits.device))
        for p, v in zip(predictions, valid, strict=True)
    ]
