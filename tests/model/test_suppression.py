"""The exportable suppression keeps the same boxes as torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from deta.model.proposals import select_spread
from deta.model.suppression import best_surviving, surviving


def crowded_boxes(num_images: int, num_boxes: int, seed: int) -> Tensor:
    """Return boxes on a grid, B N 4 xyxy float64; equal boxes and IoUs at the limit occur."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 12, (num_images, num_boxes, 2), generator=generator)
    size = torch.randint(0, 7, (num_images, num_boxes, 2), generator=generator)
    return torch.cat([low, low + size], -1).double()


def falling_scores(num_boxes: int) -> Tensor:
    """Return descending scores with ties, whose order torchvision's stable sort preserves."""
    return torch.linspace(1, 0, num_boxes).mul(20).round().div(20).double()


@pytest.mark.parametrize("num_boxes", [1, 2, 30, 400])
@pytest.mark.parametrize("max_iou", [0.25, 0.5, 0.9])
def test_the_same_boxes_survive_as_in_torchvision(num_boxes, max_iou):
    boxes = crowded_boxes(3, num_boxes, seed=num_boxes)

    stays = surviving(boxes, max_iou)

    for image in range(3):
        kept = nms(boxes[image], falling_scores(num_boxes), max_iou)
        assert stays[image].nonzero()[:, 0].tolist() == sorted(kept.tolist())


@pytest.mark.parametrize("num_best", [1, 10, 100])
@pytest.mark.parametrize("num_boxes", [1, 30, 400])
def test_the_best_survivors_of_each_class_are_those_of_torchvision(num_boxes, num_best):
    boxes = crowded_boxes(2, num_boxes, seed=num_best)
    labels = torch.randint(0, 3, (2, num_boxes), generator=torch.Generator().manual_seed(0))

    chosen = best_surviving(boxes, labels, 0.5, num_best)

    assert chosen.shape == (2, num_best)
    for image in range(2):
        kept = batched_nms(boxes[image], falling_scores(num_boxes), labels[image], 0.5)
        expected = kept[:num_best].tolist()
        assert chosen[image].tolist() == expected + [-1] * (num_best - len(expected))


def test_a_long_chain_of_removals_ends():
    """Each box removes only the next, so every second one stays, after as many rounds as boxes."""
    left = torch.arange(50.0, dtype=torch.float64)
    boxes = torch.stack([left, left * 0, left + 2.5, left * 0 + 1], -1)[None]  # 1 50 4

    stays = surviving(boxes, 0.4)

    assert stays[0].tolist() == [True, False] * 25


@pytest.mark.parametrize("seed", range(4))
def test_proposals_are_the_same_with_either_suppression(monkeypatch, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(40, 44), (12, 11), (3, 4)]
    num_pixels = sum(height * width for height, width in shapes)
    scores = torch.randn(2, num_pixels, generator=generator)
    scores = scores.round(decimals=3 - seed)  # coarser rounding gives more ties
    boxes = torch.rand(2, num_pixels, 4, generator=generator) * 0.05 + 0.4

    expected = select_spread(scores, boxes, shapes, 60)
    # Takes the code path of an export; loops run as plain Python.
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    monkeypatch.setattr("deta.model.suppression.while_loop", _plain_loop)

    assert torch.equal(select_spread(scores, boxes, shapes, 60), expected)


def _plain_loop(condition, step, state):
    while condition(*state):
        state = step(*state)
    return state
