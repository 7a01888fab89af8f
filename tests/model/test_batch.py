"""Padding of images and targets."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchvision.transforms.v2 import functional

from deta.model.batch import (
    PIXEL_MEAN,
    PIXEL_STD,
    Target,
    _statistics,
    normalise,
    pad_batch,
    pad_targets,
)


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


def test_eight_bit_images_are_normalised_as_one_by_one_and_padded_with_exact_zeros():
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 8), (7, 4), (6, 6)]
    images = [
        torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]
    images[0] = images[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as decoded
    loaded = pad_batch(images, [make_target(1)] * 3)
    assert loaded.images.dtype == torch.uint8
    assert (loaded.images.masked_select(loaded.padding[:, None]) == 0).all()

    batch = loaded.to("cpu")

    assert batch.images.is_contiguous()
    for row, image in enumerate(images):
        height, width = image.shape[1:]
        expected = functional.normalize(image.float() / 255, PIXEL_MEAN, PIXEL_STD)
        assert torch.equal(batch.images[row, :, :height, :width], expected)
        assert (batch.images[row].masked_select(batch.padding[row]) == 0).all()


def test_a_batch_is_normalised_once():
    batch = pad_batch([torch.full((3, 2, 2), 200, dtype=torch.uint8)], [make_target(1)]).to("cpu")
    assert torch.equal(batch.to("cpu").images, batch.images)


def test_statistics_made_for_predictions_can_be_used_in_training():
    _statistics.cache_clear()
    image = torch.full((1, 3, 2, 2), 9, dtype=torch.uint8)
    with torch.inference_mode():
        predicted = normalise(image)
    weight = torch.ones((), requires_grad=True)
    (normalise(image) * weight).sum().backward()
    assert torch.equal(predicted, normalise(image))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_another_process_gets_the_same_batch(dtype: torch.dtype):
    images = [torch.ones(3, *size).to(dtype) for size in ((5, 8), (7, 4), (7, 8), (1, 1))]
    batch = pad_batch(images, [make_target(count) for count in (2, 0, 1, 3)])

    received = pickle.loads(pickle.dumps(batch))

    for one, other in ((batch.images, received.images), (batch.padding, received.padding)):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert torch.equal(batch.targets.boxes, received.targets.boxes)
    assert torch.equal(batch.targets.present, received.targets.present)
    assert torch.equal(batch.seeds, received.seeds)
