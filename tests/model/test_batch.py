"""Padding of images and targets."""

from __future__ import annotations

import pytest
import torch

from deta.model.batch import Target, pad_batch, pad_targets


def make_target(num_boxes: int, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    return Target(
        torch.rand(num_boxes, 4, generator=generator),
        torch.randint(1, 9, (num_boxes,), generator=generator),
    )


def test_images_lie_in_the_top_left_corner_and_padding_is_zero():
    images = [torch.randn(3, 5, 8), torch.randn(3, 7, 4)]
    batch = pad_batch(images, [make_target(2), make_target(0)])
    assert batch.images.shape == (2, 3, 7, 8)
    for row, image in enumerate(images):
        height, width = image.shape[1:]
        assert torch.equal(batch.images[row, :, :height, :width], image)
        assert not batch.padding[row, :height, :width].any()
        assert int((~batch.padding[row]).sum()) == height * width
        assert (batch.images[row].masked_select(batch.padding[row]) == 0).all()


@pytest.mark.parametrize("counts", [[0], [0, 0], [3, 0, 1], [1]])
def test_targets_are_recovered_from_the_padding(counts: list[int]):
    targets = [make_target(count, seed) for seed, count in enumerate(counts)]
    padded = pad_targets(targets)
    assert padded.labels.shape == (len(counts), max(1, *counts, 0))
    assert padded.present.sum(1).tolist() == counts
    for row, target in enumerate(targets):
        assert torch.equal(padded.boxes[row][padded.present[row]], target.boxes)
        assert torch.equal(padded.labels[row][padded.present[row]], target.labels)


def test_a_batch_counts_its_objects():
    images = [torch.zeros(3, 2, 2)] * 3
    batch = pad_batch(images, [make_target(count) for count in (4, 0, 7)])
    assert batch.num_boxes == 11
    assert len(batch) == 3
    assert batch.to("cpu").num_boxes == 11


def test_seeds_are_kept_to_the_last_bit():
    seeds = [2**63 - 1, 0, 2**62 + 1]
    batch = pad_batch([torch.zeros(3, 1, 1)] * 3, [make_target(0)] * 3, seeds)
    assert batch.seeds.tolist() == seeds


def test_images_keep_their_precision():
    batch = pad_batch([torch.zeros(3, 2, 2, dtype=torch.float64)], [make_target(1)])
    assert batch.images.dtype == torch.float64


@pytest.mark.parametrize(
    ("num_images", "num_targets", "seeds"), [(0, 0, None), (2, 1, None), (2, 2, [1])]
)
def test_images_targets_and_seeds_of_different_numbers_are_refused(num_images, num_targets, seeds):
    images = [torch.zeros(3, 2, 2)] * num_images
    with pytest.raises(ValueError, match="a batch needs images"):
        pad_batch(images, [make_target(1)] * num_targets, seeds)
