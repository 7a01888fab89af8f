"""Batched non-maximum suppression (NMS) in operations of fixed shape, for exported programs.

torchvision's NMS returns as many rows as survive, image by image, so a program that is exported for
any batch size cannot contain it. These functions make the same decisions on masks, with IoU in
float64. They need only standard operations and a loop, which `torch.export` and ONNX both have.
Training and prediction use torchvision's NMS, which is faster.
"""

# B images   N boxes, best first   K detections

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop


def surviving(boxes: Tensor, max_iou: float) -> Tensor:
    """Return which boxes survive when each removes the later ones with an IoU above `max_iou`.

    Whether a box survives depends only on earlier boxes. So each pass applies the rule to all boxes
    at once, starting from the result of the last pass, and settles at least one more box. The loop
    ends when nothing changes, after as many passes as the longest chain of removals.

    Args:
        boxes: B N 4, xyxy, float64, best first.

    Returns:
        B N, bool; the same choice as `torchvision.ops.nms`.
    """
    num_boxes = boxes.shape[1]
    later = torch.ones(num_boxes, num_boxes, dtype=torch.bool, device=boxes.device).triu(1)
    # One tensor per coordinate: arithmetic on the last, short dimension is many times slower.
    sides = boxes.unbind(-1)  # 4 times B N
    iou = _iou([side[:, :, None] for side in sides], [side[:, None] for side in sides])
    removes = (iou > max_iou) & later  # B N N

    def has_changed(before: Tensor, stays: Tensor) -> Tensor:
        return (before != stays).any()

    def apply(before: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
        return stays.clone(), ~(stays[:, :, None] & removes).any(1)

    all_ = torch.ones_like(boxes[..., 0], dtype=torch.bool)
    _, stays = _repeat(has_changed, apply, (~all_, all_))
    return stays


def best_surviving(boxes: Tensor, labels: Tensor, max_iou: float, num_best: int) -> Tensor:
    """Return the best boxes that survive when each removes later ones of its class, as above.

    Each pass selects one box per image, so this takes K passes over N boxes and no N by N matrix.

    Args:
        boxes: B N 4, xyxy, float64, best first.
        labels: B N.

    Returns:
        B K, int64, indices into the N boxes, best first, then -1 if fewer survive: the first K
        results of `torchvision.ops.batched_nms`.
    """
    num_boxes = boxes.shape[1]
    place = torch.arange(num_boxes, device=boxes.device)
    slot = torch.arange(num_best, device=boxes.device)
    sides = [side.contiguous() for side in boxes.unbind(-1)]  # 4 times B N

    def is_unfinished(turn: Tensor, remains: Tensor, chosen: Tensor) -> Tensor:
        return turn < num_best

    def choose(turn: Tensor, remains: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = remains.to(torch.uint8).argmax(1, keepdim=True)  # B 1, the first that remains
        iou = _iou(sides, [side.gather(1, best) for side in sides])
        removed = (iou > max_iou) & (labels == labels.gather(1, best))
        taken = torch.where(remains.any(1, keepdim=True), best, -1)
        return (
            turn + 1,
            remains & ~removed & (place != best),
            torch.where(slot == turn, taken, chosen),
        )

    start = (
        torch.zeros((), dtype=torch.int64, device=boxes.device),
        torch.ones_like(labels, dtype=torch.bool),
        torch.full_like(labels[:, :1], -1).repeat(1, num_best),
    )
    return _repeat(is_unfinished, choose, start)[2]


def _iou(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the IoU of boxes (x1, y1, x2, y2) that broadcast, computed as torchvision does.

    Two boxes without area give NaN, which is not greater than any limit.
    """
    width = (torch.minimum(one[2], other[2]) - torch.maximum(one[0], other[0])).clamp(min=0)
    height = (torch.minimum(one[3], other[3]) - torch.maximum(one[1], other[1])).clamp(min=0)
    intersection = width * height
    return intersection / (_area(*one) + _area(*other) - intersection)


def _area(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    return (x2 - x1) * (y2 - y1)


def _repeat(
    condition: Callable[..., Tensor],
    step: Callable[..., tuple[Tensor, ...]],
    state: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Repeat the step while the condition holds; under export, as a loop of the program."""
    if torch.compiler.is_exporting():
        return while_loop(condition, step, state)
    while condition(*state):
        state = step(*state)
    return state
