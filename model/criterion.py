"""Focal, L1 and GIoU losses over every stage, and their weighted total."""

# B images   Q queries   S pixels of all levels   C classes   N objects, padded
# M matches an object   K decoder layers

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from deta.model.assigner import (
    IouAssignerConfig,
    Matches,
    MatchingCost,
    assign_by_iou,
    match_one_to_one,
    predicted_object,
    random_priority,
)
from deta.model.batch import Batch, Targets
from deta.model.boxes import cxcywh_to_xyxy, generalized_iou
from deta.model.detector import Outputs, Predictions

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2  # Lin et al. 2017, and all published DETA code


@dataclass(frozen=True, kw_only=True)
class CriterionConfig:
    # "iou": several predictions an object, by overlap (DETA).
    # "one_to_one": the cheapest matching of each layer (improved Deformable DETR).
    assignment: Literal["iou", "one_to_one"] = "iou"
    class_weight: float = 1.0  # all DETA configurations; Deformable DETR had 2
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    first_stage_iou: float = 0.7  # DETA, released code
    second_stage_iou: float = 0.6  # DETA, released code
    max_per_object: int = 4
    exclusive: bool = False  # the repairs, see IouAssignerConfig
    require_overlap: bool = False
    subsample: bool = True
    matching_cost: MatchingCost = field(default_factory=MatchingCost)

    def __post_init__(self) -> None:
        if self.assignment not in ("iou", "one_to_one"):
            raise ValueError(f"assignment={self.assignment!r} is neither iou nor one_to_one")
        self.assigner(self.first_stage_iou, 1)
        self.assigner(self.second_stage_iou, 1)

    def assigner(self, positive_iou: float, max_positives: int) -> IouAssignerConfig:
        return IouAssignerConfig(
            positive_iou=positive_iou,
            max_positives=max_positives,
            max_per_object=self.max_per_object,
            exclusive=self.exclusive,
            require_overlap=self.require_overlap,
            subsample=self.subsample,
        )


FIRST_STAGE_POSITIVES = 128  # half of 256, DETA, released code
SECOND_STAGE_SHARE = 0.25  # of the queries may be positive, DETA, released code


def focal_loss(logits: Tensor, positive: Tensor) -> Tensor:
    """Sigmoid focal loss of each logit, not summed.

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
    """Outputs and targets to losses. Holds no weights."""

    def __init__(self, config: CriterionConfig, num_queries: int) -> None:
        self.config = config
        # Released code rounds the share of fewer than four queries to none: nothing is learned.
        max_positives = max(1, int(SECOND_STAGE_SHARE * num_queries))
        self.second_stage = config.assigner(config.second_stage_iou, max_positives)
        self.first_stage = config.assigner(config.first_stage_iou, FIRST_STAGE_POSITIVES)

    def __call__(
        self, outputs: Outputs, batch: Batch, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """Every loss, unweighted.

        Args:
            num_boxes: what sums are divided by: the number of objects (not of matches) in the
                whole global batch, over the number of workers; at least 1 in total.

        Returns:
            Scalars `class`, `l1` and `giou` of the last decoder layer, and the same with `_0`,
            `_1`, … for the layers before it and `_encoder` for the first stage.
        """
        targets = batch.targets
        losses = _decoder_losses(outputs, targets, self.match_decoder(outputs, batch), num_boxes)
        # The first stage learns "any object": every object has class 0, the other columns nothing.
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
        """One for each decoder layer. By IoU they are all the same: made from the proposals."""
        if self.config.assignment == "one_to_one":
            return match_one_to_one(
                outputs.logits, outputs.boxes, batch.targets, self.config.matching_cost
            )
        priority = random_priority(batch.seeds, outputs.proposals.shape[1])
        matches = assign_by_iou(outputs.proposals, batch.targets, priority, self.second_stage)
        return [matches] * len(outputs.logits)

    def match_encoder(self, outputs: Outputs, batch: Batch) -> Matches:
        if self.config.assignment == "one_to_one":
            anything = replace(batch.targets, labels=torch.zeros_like(batch.targets.labels))
            return match_one_to_one(
                outputs.encoder_logits[None],
                outputs.encoder_boxes[None],
                anything,
                self.config.matching_cost,
            )[0]
        # Another stream than the decoder's, so that the two stages do not thin out alike.
        priority = random_priority(~batch.seeds, outputs.anchors.shape[1])
        return assign_by_iou(outputs.anchors, batch.targets, priority, self.first_stage)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum."""
        return _total(losses, self.config)


class OneToOneCriterion:
    """The losses of a detector without a first stage, each layer matched one to one (DETR)."""

    def __init__(self, config: CriterionConfig) -> None:
        if config.assignment != "one_to_one":
            raise ValueError(
                f"criterion.assignment={config.assignment} compares objects with the proposals of "
                "a first stage, which this model has not; set criterion.assignment=one_to_one"
            )
        self.config = config

    def __call__(
        self, outputs: Predictions, batch: Batch, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """As `Criterion`, without the losses of the first stage."""
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
    """Of one stage: logits B Q C and boxes B Q 4, Q standing for queries or pixels."""
    owner = predicted_object(matches, logits.shape[1])  # B Q
    label = targets.labels.gather(1, owner.clamp(min=0)).masked_fill(owner < 0, -1)
    positive = label[..., None] == torch.arange(logits.shape[2], device=logits.device)

    matched = boxes.gather(
        1, matches.predictions.flatten(1)[..., None].expand(-1, -1, 4)
    ).unflatten(1, matches.predictions.shape[1:])  # B N M 4
    wanted = targets.boxes[:, :, None]
    # Matches that are only padding are compared with their own target, so that nothing that is
    # not finite can come back through them; then they count as zero.
    matched = torch.where(matches.valid[..., None], matched, wanted)
    l1 = (matched - wanted).abs().sum(-1)
    giou = 1 - generalized_iou(cxcywh_to_xyxy(matched), cxcywh_to_xyxy(wanted))
    return {
        f"class{suffix}": focal_loss(logits, positive).sum() / num_boxes,
        f"l1{suffix}": l1.where(matches.valid, 0).sum() / num_boxes,
        f"giou{suffix}": giou.where(matches.valid, 0).sum() / num_boxes,
    }
