"""Augment and resize decoded images, and convert them to the model's input.

Every transform maps a `Sample` to a `Sample` and changes pixels and boxes alike. Augmentation and
sizes are those of the released DETA code (DETR's recipe: Carion et al. 2020, appendix A.4), with
PIL's bilinear resize, as the published weights were trained. All randomness comes from the
argument `draws`. Sizes in the configurations are in pixels.
"""

# H, W height and width of the image in px   N boxes of one image

from __future__ import annotations

from dataclasses import replace

import deta.model.without_dynamo  # noqa: F401

# isort: split
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from deta.model.batch import Target
from deta.platform.data.coco_dataset import Sample
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.data.sample_order import Draws

# The released code has no maximum for the resize before the crop, so that an image 1 px high would
# grow to 400 x 400 times its width. Aspect ratios below 27 do not reach this maximum.
MAX_LONG_EDGE_BEFORE_CROP = 16384


def resized_size(
    height: int, width: int, short_edge: int, max_long_edge: int | None
) -> tuple[int, int]:
    """Return the (height, width) to which the released code resizes an image.

    The short edge becomes `short_edge`, and the long edge is scaled alike and truncated. If it
    would exceed `max_long_edge`, the short edge is reduced and *rounded* first, so that the long
    edge may end on either side of the maximum: 1332 to 1334 px for ordinary images and a maximum
    of 1333.

    Ours: an image so thin that its short edge would round to 0 px, an error in the released code,
    becomes 1 px by `max_long_edge`.
    """
    short, long = min(height, width), max(height, width)
    if max_long_edge is not None and long / short * short_edge > max_long_edge:
        short_edge = round(max_long_edge * short / long)
        if short_edge == 0:
            return (1, max_long_edge) if height < width else (max_long_edge, 1)
    if width < height:
        return short_edge * height // width, short_edge
    return short_edge, short_edge * width // height


def flip(sample: Sample) -> Sample:
    """Flip the sample horizontally."""
    width = sample.image.width
    x1, y1, x2, y2 = sample.boxes_px.unbind(1)
    boxes_px = torch.stack([width - x2, y1, width - x1, y2], dim=1)  # N 4
    return _with_image(sample, functional.horizontal_flip(sample.image), boxes_px)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Crop the image and its boxes; all arguments are in px."""
    image = functional.crop(sample.image, top, left, height, width)
    return _with_image(sample, image, sample.boxes_px - sample.boxes_px.new_tensor([left, top] * 2))


def resize(sample: Sample, short_edge: int, max_long_edge: int | None) -> Sample:
    """Resize the sample to `resized_size`, bilinearly."""
    image = sample.image
    height, width = resized_size(image.height, image.width, short_edge, max_long_edge)
    # The two factors differ slightly, since each edge is a whole number of pixels.
    scale = sample.boxes_px.new_tensor([width / image.width, height / image.height] * 2)
    resized = functional.resize(image, [height, width], interpolation=InterpolationMode.BILINEAR)
    return _with_image(sample, resized, sample.boxes_px * scale)


def _with_image(sample: Sample, image: Image.Image, boxes_px: Tensor) -> Sample:
    """Return the sample with a new image and new boxes, clipped to it, without empty ones.

    The released code clips only after a crop. Otherwise only float32 rounding can move a box out of
    the image or make it empty, so the difference is below 1e-4 px.
    """
    size_px = boxes_px.new_tensor([image.width, image.height] * 2)
    boxes_px = boxes_px.clamp(min=0).minimum(size_px)  # N 4
    has_area = (boxes_px[:, 2:] > boxes_px[:, :2]).all(dim=1)
    return replace(sample, image=image, boxes_px=boxes_px[has_area], labels=sample.labels[has_area])


def augment(sample: Sample, config: AugmentationConfig, draws: Draws) -> Sample:
    """Flip, crop and resize the sample at random; it may lose all its boxes."""
    if draws.fraction() < config.flip_probability:
        sample = flip(sample)
    if config.crop and draws.fraction() < 0.5:
        sample = resize(
            sample, draws.choice(config.crop_pre_short_edges), MAX_LONG_EDGE_BEFORE_CROP
        )
        width = _crop_length(sample.image.width, config, draws)
        height = _crop_length(sample.image.height, config, draws)
        top = draws.integer(0, sample.image.height - height)
        left = draws.integer(0, sample.image.width - width)
        sample = crop(sample, top, left, height, width)
    return resize(sample, draws.choice(config.short_edges), config.max_long_edge)


def _crop_length(side_px: int, config: AugmentationConfig, draws: Draws) -> int:
    # A side shorter than the smallest crop is not cropped (the released code would fail).
    return draws.integer(min(config.crop_min, side_px), min(config.crop_max, side_px))


def resize_for_evaluation(sample: Sample, size: EvaluationSize) -> Sample:
    """Resize the sample to the evaluation size."""
    return resize(sample, size.short_edge, size.max_long_edge)


def to_model_input(sample: Sample) -> tuple[Tensor, Target]:
    """Convert the sample to tensors.

    Returns:
        3 H W uint8, for `pad_batch` and `normalise`, and the target with boxes in cxcywh relative
        to this image.
    """
    x1, y1, x2, y2 = sample.boxes_px.unbind(1)
    boxes_px = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1)  # N 4, cxcywh
    size_px = boxes_px.new_tensor([sample.image.width, sample.image.height] * 2)
    return functional.pil_to_tensor(sample.image), Target(
        boxes=boxes_px / size_px, labels=sample.labels
    )
