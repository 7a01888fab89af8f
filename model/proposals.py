"""First stage: anchors, and the selection of the proposals that the decoder starts from."""

# B images   S pixels of all levels, flattened   L levels   Q proposals

from __future__ import annotations

from collections.abc import Sequence

import deta.model.without_dynamo  # noqa: F401

# isort: split
import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from deta.model.boxes import cxcywh_to_xyxy
from deta.model.suppression import surviving
from deta.model.transformer import Levels

# Both as in all published code, relative to the image.
ANCHOR_SIZE = 0.05  # on the finest level; doubles with each level
ANCHOR_MARGIN = 0.01  # an anchor this close to the border, or this small, is not used
CANDIDATES_PER_LEVEL = 1000  # DETA, released code
PROPOSAL_NMS_IOU = 0.9  # DETA, released code
# In one call. The host waits for each on a GPU, so there are few; a CPU has more work with many.
IMAGES_PER_NMS = {"cpu": 1, "cuda": 8, "meta": 8}


def make_anchors(levels: Levels) -> tuple[Tensor, Tensor]:
    """Make one anchor per pixel, the prior of the first stage.

    Returns:
        Anchors as logits of relative cxcywh, B S 4, and whether they are used, B S. An unused one
        (padding, or too close to the border) is infinite, so its box is (1, 1, 1, 1) and stays so
        whatever correction is added.
    """
    centres = levels.pixel_centres()
    sizes = ANCHOR_SIZE * 2.0 ** levels.index.float()  # S
    anchors = torch.cat([centres, sizes[None, :, None].expand(centres.shape[0], -1, 2)], -1)
    used = ((anchors > ANCHOR_MARGIN) & (anchors < 1 - ANCHOR_MARGIN)).all(-1) & ~levels.padding
    return (anchors / (1 - anchors)).log().masked_fill(~used[..., None], torch.inf), used


def select_highest(scores: Tensor, num_proposals: int) -> Tensor:
    """Select the pixels with the highest scores, best first (Deformable DETR). B S -> B Q."""
    return scores.topk(_at_most(num_proposals, scores.shape[1]), 1).indices


@torch.no_grad()
def select_spread(
    scores: Tensor, boxes: Tensor, shapes: Sequence[tuple[int, int]], num_proposals: int
) -> Tensor:
    """Select high-scoring pixels from every level, without near duplicates (DETA).

    The best 1000 pixels of each level go through non-maximum suppression (NMS) within the level.
    Each level then contributes its best Q / L pixels, and the best of the rest fill the remaining
    places. If fewer than Q pixels of an image survive, the highest scores are taken without NMS,
    as in the released code.

    Args:
        scores: B S, logits.
        boxes: B S 4, cxcywh, relative.
        shapes: (height, width) of each level.
        num_proposals: Q; clamped to S.

    Returns:
        B Q pixel indices, best first over all levels.

    Source: DETA, Ouyang-Zhang et al. 2022, released code (`assign_first_stage`).
    """
    num_proposals = _at_most(num_proposals, scores.shape[1])
    boxes_xyxy = cxcywh_to_xyxy(boxes).clamp(0, 1)

    level_sizes = [height * width for height, width in shapes]
    level_index = torch.cat(
        [torch.full((size,), level, device=scores.device) for level, size in enumerate(level_sizes)]
    )  # S
    starts = [sum(level_sizes[:level]) for level in range(len(shapes))]
    candidates = [
        start + level_scores.topk(torch.sym_min(CANDIDATES_PER_LEVEL, size), 1).indices
        for start, size, level_scores in zip(
            starts, level_sizes, scores.split(level_sizes, 1), strict=True
        )
    ]  # for each level B C
    survives = _survivors(scores, boxes_xyxy, candidates, level_index)  # B S

    too_few = survives.sum(1, keepdim=True) < num_proposals
    survives = survives | too_few
    ranking = scores.masked_fill(~survives, -torch.inf).argsort(dim=1, descending=True, stable=True)
    alive = survives.gather(1, ranking)  # B S, best first from here on
    of_level = level_index[ranking, None] == torch.arange(len(shapes), device=scores.device)
    rank_in_level = ((of_level & alive[..., None]).cumsum(1) * of_level).sum(-1)  # from 1
    # Without NMS, levels have no quota.
    share = alive & ((rank_in_level <= num_proposals // len(shapes)) & ~too_few)
    rest = alive & ~share
    room = num_proposals - share.sum(1, keepdim=True)
    selected = share | (rest & (rest.cumsum(1) <= room))
    first = (~selected).int().argsort(dim=1, stable=True)[:, :num_proposals]
    return ranking.gather(1, first)


def _at_most(num_proposals: int, num_pixels: int) -> int:
    """Limit the number of proposals to the number of pixels.

    An exported program has a fixed number of queries, and therefore a minimum image size.
    """
    if torch.compiler.is_exporting():
        torch._check(num_pixels >= num_proposals)
        return num_proposals
    return min(num_proposals, num_pixels)


def _survivors(
    scores: Tensor, boxes_xyxy: Tensor, candidates: list[Tensor], level_index: Tensor
) -> Tensor:
    """Return which candidates survive the NMS of their level, B S, bool."""
    survives = torch.zeros_like(scores, dtype=torch.bool)
    if torch.compiler.is_exporting():
        for of_level in candidates:
            boxes = boxes_xyxy.gather(1, of_level[..., None].expand(-1, -1, 4))
            stays = surviving(boxes.double(), PROPOSAL_NMS_IOU)
            survives = survives.scatter(1, of_level, stays)
        return survives
    of_image = torch.cat(candidates, 1)  # B C
    num_candidates = of_image.shape[1]
    at_once = IMAGES_PER_NMS[scores.device.type]
    for first in range(0, scores.shape[0], at_once):
        chosen = of_image[first : first + at_once]  # n C
        image = torch.arange(len(chosen), device=scores.device)[:, None]
        # float64: NMS separates groups by an offset to the coordinates, which in float32 would cost
        # the last bits of the IoU.
        kept = _nms_in_groups(
            boxes_xyxy[first + image, chosen].flatten(0, 1).double(),
            scores[first + image, chosen].flatten().double(),
            (level_index[chosen] + len(candidates) * image).flatten(),
        )
        survives[first + kept // num_candidates, chosen.flatten()[kept]] = True
    return survives


def _nms_in_groups(boxes_xyxy: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    """Return the indices of the boxes, within 0..1, that survive the NMS of their group."""
    if IMAGES_PER_NMS[boxes_xyxy.device.type] == 1:
        return batched_nms(boxes_xyxy, scores, groups, PROPOSAL_NMS_IOU)
    # One kernel: with many boxes, batched_nms would wait for the device once for each group.
    return nms(boxes_xyxy + 2.0 * groups[:, None], scores, PROPOSAL_NMS_IOU)
