"""Focal, L1 and GIoU losses over every stage, and their weighted total."""

# B images   Q queries   S pixels of all levels   C classes   N objects, padded
# M matches per object   K decoder layers

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deta.model.assigner import (
    Matches,
    assign_by_iou,
    match_one_to_one,
    predicted_object,
    random_priority,
)
from deta.model.batch import Batch, Targets
from deta.model.boxes import cxcywh_to_xyxy, generalized_iou
from deta.model.config import CriterionConfig
from deta.model.detector import Outputs, Predictions

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2  # Lin et al. 2017, and all published DETA code


FIRST_STAGE_POSITIVES = 128  # half of 256, DETA, released code
SECOND_STAGE_SHARE = 0.25  # of the queries may be positive, DETA, released code


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Return the sigmoid focal loss of each logit, unreduced.

    Args:
        logits: …
        positive: …, bool.

    Source: Lin et al. 2017, equation 5, https://arxiv.org/abs/1708.02002
    """
    target = positive.to(logits.dtype)
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = torch.where(positive, 1 - probability, probability)
    alpha = torch.where(positive, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return alpha * wrong**FOCAL_GAMMA * cross_entropy


class Criterion:
    """The losses of a detector with two stages (DETA). It has no weights."""

    def __init__(self, config: CriterionConfig, num_queries: int) -> None:
        self.config = config
        # Released code allows no positive with fewer than four queries, so nothing is learned.
        max_positives = max(1, int(SECOND_STAGE_SHARE * num_queries))
        self.second_stage = config.assigner(config.second_stage_iou, max_positives)
        self.first_stage = config.assigner(config.first_stage_iou, FIRST_STAGE_POSITIVES)

    def __call__(
        self, outputs: Outputs, batch: Batch, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Compute every loss, unweighted.

        Args:
            num_boxes: the divisor of all sums: the number of objects (not of matches) in the
                global batch, at least 1, divided by the number of workers.

        Returns:
            Scalars `class`, `l1` and `giou` of the last decoder layer, and the same with `_0`,
            `_1`, … for the layers before it and `_encoder` for the first stage.
        """
        targets = batch.targets
        losses = _decoder_losses(outputs, targets, self.match_decoder(outputs, batch), num_boxes)
        # The first stage learns "any object": every object has class 0; no object has another.
        anything = replace(targets, labels=torch.zeros_like(targets.labels))
        return losses | _losses(
            outputs.encoder_logits,
            outputs.encoder_boxes,
            anything,
            self.match_encoder(outputs, batch),
            num_boxes,
            "_encoder",
        )

    def match_decoder(self, outputs: Outputs, batch: Batch) -> list[Matches]:
        """Match each decoder layer. IoU uses the proposals, so its matches are all the same."""
        if self.config.assignment == "one_to_one":
            return match_one_to_one(
                outputs.logits, outputs.boxes, batch.targets, self.config.matching_cost
            )
        priority = random_priority(batch.seeds, outputs.proposals.shape[1])
        matches = assign_by_iou(outputs.proposals, batch.targets, priority, self.second_stage)
        return [matches] * len(outputs.logits)

    def match_encoder(self, outputs: Outputs, batch: Batch) -> Matches:
        """Match the pixels of the memory, for the first stage."""
        if self.config.assignment == "one_to_one":
            anything = replace(batch.targets, labels=torch.zeros_like(batch.targets.labels))
            return match_one_to_one(
                outputs.encoder_logits[None],
                outputs.encoder_boxes[None],
                anything,
                self.config.matching_cost,
            )[0]
        # Not the decoder's random numbers, so that the stages subsample independently.
        priority = random_priority(~batch.seeds, outputs.anchors.shape[1])
        return assign_by_iou(outputs.anchors, batch.targets, priority, self.first_stage)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return _total(losses, self.config)


class OneToOneCriterion:
    """The losses of a detector without a first stage; each layer is matched one to one (DETR)."""

    def __init__(self, config: CriterionConfig) -> None:
        if config.assignment != "one_to_one":
            raise ValueError(
                f"criterion.assignment={config.assignment} compares objects with the proposals of "
                "a first stage, which this model does not have; set criterion.assignment=one_to_one"
            )
        self.config = config

    def __call__(
        self, outputs: Predictions, batch: Batch, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Compute every loss, unweighted, as `Criterion` does for the decoder."""
        cost = self.config.matching_cost
        matches = match_one_to_one(outputs.logits, outputs.boxes, batch.targets, cost)
        return _decoder_losses(outputs, batch.targets, matches, num_boxes)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return _total(losses, self.config)


def _total(losses: dict[str, Tensor], config: CriterionConfig) -> Tensor:
    weights = {
        "class": config.class_weight,
        "l1": config.l1_weight,
        "giou": config.giou_weight,
    }
    return torch.stack([weights[name.split("_")[0]] * loss for name, loss in losses.items()]).sum()


def _decoder_losses(
    outputs: Predictions, targets: Targets, all_matches: list[Matches], num_boxes: Tensor | float
) -> dict[str, Tensor]:
    num_layers = len(outputs.logits)
    losses: dict[str, Tensor] = {}
    for layer, matches in enumerate(all_matches):
        suffix = "" if layer == num_layers - 1 else f"_{layer}"
        losses |= _losses(
            outputs.logits[layer], outputs.boxes[layer], targets, matches, num_boxes, suffix
        )
    return losses


def _losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    matches: Matches,
    num_boxes: Tensor | float,
    suffix: str,
) -> dict[str, Tensor]:
    """Compute the losses of one stage. Logits B Q C, boxes B Q 4; Q counts queries or pixels."""
    owner = predicted_object(matches, logits.shape[1])  # B Q
    label = targets.labels.gather(1, owner.clamp(min=0)).masked_fill(owner < 0, -1)
    positive = label[..., None] == torch.arange(logits.shape[2], device=logits.device)

    matched = boxes.gather(
        1, matches.predictions.flatten(1)[..., None].expand(-1, -1, 4)
    ).unflatten(1, matches.predictions.shape[1:])  # B N M 4
    wanted = targets.boxes[:, :, None]
    # Compare matches that are padding with their own target, so that no non-finite gradient flows
    # through them. They count as zero below.
    matched = torch.where(matches.valid[..., None], matched, wanted)
    l1 = (matched - wanted).abs().sum(-1)
    giou = 1 - generalized_iou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(wanted))
    return {
        f"class{suffix}": focal_loss(logits, positive).sum() / num_boxes,
        f"l1{suffix}": l1.where(matches.valid, 0).sum() / num_boxes,
        f"giou{suffix}": giou.where(matches.valid, 0).sum() / num_boxes,
    }
