"""Box arithmetic against published numbers, hand calculations and torchvision."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchvision.ops import box_iou, generalized_box_iou

from deta.model.boxes import (
    area,
    box_logits,
    cxcywh_to_xyxy,
    generalized_iou,
    pairwise_generalized_iou,
    pairwise_iou,
    xyxy_to_cxcywh,
)

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
CASES = [
    (path, name)
    for path in sorted((SHARED / "parity").glob("*/functions/functions*.safetensors"))
    for name in sorted({key.split(".")[0] for key in load_file(path)})
]


def cases(prefix: str) -> dict:
    """Return the arguments of parametrize for every shared case with this prefix."""
    chosen = [case for case in CASES if case[1].startswith(prefix)]
    return {
        "argnames": ("path", "name"),
        "argvalues": chosen,
        "ids": [f"{path.stem}-{name}" for path, name in chosen],
    }


def random_boxes(num_boxes: int, seed: int) -> torch.Tensor:
    """Return xyxy boxes in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_boxes, 2, 2, generator=generator)
    return torch.cat([corners.amin(1), corners.amax(1)], -1)


@pytest.mark.parametrize(**cases("boxes"))
def test_parity_of_iou_and_generalized_iou(path: Path, name: str, compare):
    case = load_file(path)
    boxes1, boxes2 = (cxcywh_to_xyxy(case[f"{name}.{key}"]) for key in "ab")
    # One rounding of difference; detrex's epsilon would show as 5e-6.
    compare("functions", "IoU", pairwise_iou(boxes1, boxes2), case[f"{name}.iou"], 1e-6)
    found = pairwise_generalized_iou(boxes1, boxes2)
    compare("functions", "GIoU", found, case[f"{name}.giou"], 1e-6)


@pytest.mark.parametrize(**cases("inverse_sigmoid"))
def test_parity_of_box_logits(path: Path, name: str, compare):
    case = {key.split(".", 1)[1]: value for key, value in load_file(path).items() if name in key}
    for key, eps in (("y", 1e-5), ("detrex_y_eps1e-3", 1e-3)):
        if key in case:
            found = box_logits(case["x"], eps)
            compare("functions", f"inverse sigmoid, {eps}", found, case[key], 1e-6)


def test_iou_agrees_with_torchvision():
    boxes1, boxes2 = random_boxes(30, seed=0), random_boxes(20, seed=1)
    torch.testing.assert_close(pairwise_iou(boxes1, boxes2), box_iou(boxes1, boxes2))
    torch.testing.assert_close(
        pairwise_generalized_iou(boxes1, boxes2), generalized_box_iou(boxes1, boxes2)
    )


def test_iou_by_hand():
    one = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    other = torch.tensor([[1.0, 1.0, 3.0, 3.0], [4.0, 0.0, 6.0, 2.0]])
    torch.testing.assert_close(pairwise_iou(one, other), torch.tensor([[1 / 7, 0.0]]))
    # Hulls of 9 and of 12, unions of 7 and of 8.
    expected = torch.tensor([[1 / 7 - 2 / 9, -4 / 12]])
    torch.testing.assert_close(pairwise_generalized_iou(one, other), expected)


def test_boxes_without_area_give_zero_and_finite_gradients():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 0.0]], requires_grad=True)
    assert torch.equal(pairwise_iou(boxes, boxes), torch.zeros(2, 2))
    value = generalized_iou(boxes, boxes)
    value.sum().backward()
    assert value.isfinite().all()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_formats_are_inverse_to_each_other():
    boxes = random_boxes(50, seed=2)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    torch.testing.assert_close(area(boxes), xyxy_to_cxcywh(boxes)[:, 2:].prod(-1))


def test_leading_dimensions_are_kept():
    boxes1, boxes2 = random_boxes(6, seed=3).view(2, 3, 4), random_boxes(8, seed=4).view(2, 4, 4)
    together = pairwise_iou(boxes1, boxes2)
    assert together.shape == (2, 3, 4)
    for image in range(2):
        assert torch.equal(together[image], pairwise_iou(boxes1[image], boxes2[image]))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_box_logits_are_finite_and_the_sigmoid_inverts_them(eps: float):
    boxes = torch.tensor([-1.0, 0.0, eps / 2, eps, 0.25, 0.5, 1 - 2 * eps, 1.0, 2.0])
    logits = box_logits(boxes, eps)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.sigmoid(), boxes.clamp(0, 1), atol=1.01 * eps, rtol=0)
