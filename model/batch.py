"""Model inputs: images padded to one size, and their targets."""

# B images   H W height and width of the largest image   N boxes, padded to the most in one image

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of ImageNet, in RGB order, as the pretrained backbones were trained.
PIXEL_MEAN = [0.485, 0.456, 0.406]
PIXEL_STD = [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Target:
    """The objects of one image."""

    boxes: Tensor  # N 4, cxcywh relative to the unpadded image
    labels: Tensor  # N, int64, class index


@dataclass(frozen=True)
class Targets:
    """The objects of all images, padded to the same number so that no loop is needed."""

    boxes: Tensor  # B N 4, cxcywh relative to the unpadded image
    labels: Tensor  # B N, int64
    present: Tensor  # B N, bool, false where there is no object

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return Targets(
            self.boxes.to(device, non_blocking=non_blocking),
            self.labels.to(device, non_blocking=non_blocking),
            self.present.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class Batch:
    """Images of different sizes in one tensor, the smaller ones padded at right and bottom.

    A loader makes it with 8-bit pixels, a quarter of the bytes; `to` normalises them.
    """

    images: Tensor  # B 3 H W, uint8 or normalised; zero where padded
    padding: Tensor  # B H W, bool, true where there is no image
    targets: Targets
    seeds: Tensor  # B, int64: an image's seed determines all its random choices

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_boxes(self) -> int:
        """The boxes of all images. Read it before the batch is on a device: it would wait."""
        return int(self.targets.present.sum())

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the sizes of the images to another process instead of `padding`, a byte a pixel."""
        heights = (~self.padding[:, :, 0]).sum(1).tolist()
        widths = (~self.padding[:, 0]).sum(1).tolist()
        return _with_padding, (self.images, heights, widths, self.targets, self.seeds)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copy the batch to a device, and normalise its images there if they are not yet."""
        padding = self.padding.to(device, non_blocking=non_blocking)
        return Batch(
            normalise(self.images.to(device, non_blocking=non_blocking), padding),
            padding,
            self.targets.to(device, non_blocking=non_blocking),
            self.seeds.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """Copy to pinned memory, so that copies to a GPU are asynchronous; for the data loader."""
        return Batch(
            self.images.pin_memory(),
            self.padding.pin_memory(),
            Targets(
                self.targets.boxes.pin_memory(),
                self.targets.labels.pin_memory(),
                self.targets.present.pin_memory(),
            ),
            self.seeds.pin_memory(),
        )


def normalise(images: Tensor, padding: Tensor | None = None) -> Tensor:
    """Subtract the mean of ImageNet's pixels and divide by their deviation.

    On a CPU it gives the same bits as torchvision, image by image; on a GPU it may differ in the
    last one.

    Args:
        images: B 3 H W, uint8. Floats are returned as they are: they are normalised already.
        padding: B H W, true where the result is to be exactly zero.

    Returns:
        B 3 H W, float32 on the same device, contiguous.
    """
    if images.is_floating_point():
        return images
    mean, deviation = _statistics(images.device)
    # Divide, as in the training of the published models; others multiply by 1 / 255.
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    pixels.sub_(mean).div_(deviation)
    return pixels if padding is None else pixels.masked_fill_(padding[:, None], 0)


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, each 3 1 1. Kept, because a copy to a GPU waits for it."""
    with torch.inference_mode(False):  # also used in training
        mean, deviation = (torch.tensor(one, device=device) for one in (PIXEL_MEAN, PIXEL_STD))
        return mean[:, None, None], deviation[:, None, None]


def pad_targets(targets: Sequence[Target]) -> Targets:
    """Pad to one row per image, and at least one column, so that `max` over objects works."""
    num_boxes = max(1, *(len(target.labels) for target in targets))
    boxes = torch.zeros(len(targets), num_boxes, 4)
    labels = torch.zeros(len(targets), num_boxes, dtype=torch.int64)
    present = torch.zeros(len(targets), num_boxes, dtype=torch.bool)
    for row, target in enumerate(targets):
        boxes[row, : len(target.labels)] = target.boxes
        labels[row, : len(target.labels)] = target.labels
        present[row, : len(target.labels)] = True
    return Targets(boxes, labels, present)


def pad_batch(
    images: Sequence[Tensor], targets: Sequence[Target], seeds: Sequence[int] | None = None
) -> Batch:
    """Put images of different sizes into one batch.

    Args:
        images: each 3 h w, all uint8 or all normalised.
        targets: one per image.
        seeds: one per image, of at most 63 bits; 0, 1, 2, … by default.

    Raises:
        ValueError: there are no images, or the number of targets or seeds is another.
    """
    seeds = range(len(images)) if seeds is None else seeds
    if not images or len(images) != len(targets) or len(images) != len(seeds):
        raise ValueError(
            f"a batch needs images, and a target and a seed for each: got {len(images)} images, "
            f"{len(targets)} targets and {len(seeds)} seeds"
        )
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    # Decoded images hold the three colours of a pixel side by side, and keep this order here.
    is_decoded = images[0].dtype == torch.uint8
    padded = torch.empty(
        (len(images), images[0].shape[0], height, width),
        dtype=images[0].dtype,
        memory_format=torch.channels_last if is_decoded else torch.contiguous_format,
    )
    for row, image in enumerate(images):
        padded[row, :, : image.shape[1], : image.shape[2]] = image
        padded[row, :, image.shape[1] :] = 0
        padded[row, :, : image.shape[1], image.shape[2] :] = 0
    return _with_padding(
        padded,
        [image.shape[1] for image in images],
        [image.shape[2] for image in images],
        pad_targets(targets),
        torch.tensor(list(seeds), dtype=torch.int64),
    )


def _with_padding(
    images: Tensor, heights: Sequence[int], widths: Sequence[int], targets: Targets, seeds: Tensor
) -> Batch:
    padding = torch.ones(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    for row, (height, width) in enumerate(zip(heights, widths, strict=True)):
        padding[row, :height, :width] = False
    return Batch(images, padding, targets, seeds)
