"""Runs an exported file: prepares images for it and reads its detections.

`pack_images` is all that a caller of such a file has to implement, in whatever language.
"""

# B images   H W height and width of the padded images   N detections

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import deta.model.without_dynamo  # noqa: F401

# isort: split
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from deta.model.postprocess import Detections
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.data.transforms import resized_size

INPUTS = ("images", "sizes_px", "original_sizes_px")


# Packed images to scores (B N), labels (B N) and boxes (B N 4), as `DetectionProgram` returns them
Runtime = Callable[["PackedImages"], tuple[Tensor, Tensor, Tensor]]


class PackedImages(NamedTuple):
    """Images in the form that an exported file takes."""

    images: Tensor  # B 3 H W, uint8, RGB, each at the top left
    sizes_px: Tensor  # B 2, int64, (height, width) of each resized image
    original_sizes_px: Tensor  # B 2, int64, (height, width) before resizing


def pack_images(
    images: Sequence[Image.Image], size: EvaluationSize, least_side_px: int
) -> PackedImages:
    """Resize RGB images with PIL's bilinear filter and put them into one array.

    Args:
        size: the short edge becomes `short_edge`, but the long one at most `max_long_edge`.
        least_side_px: least height and width of the array; a thinner image is padded to it.
    """
    pixels = []
    for image in images:
        height, width = resized_size(image.height, image.width, size.short_edge, size.max_long_edge)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels.append(functional.pil_to_tensor(resized))  # 3 h w
    sizes_px = torch.tensor([one.shape[1:] for one in pixels])
    height, width = sizes_px.amax(0).clamp(min=least_side_px).tolist()
    packed = torch.zeros(len(pixels), 3, height, width, dtype=torch.uint8)
    for row, one in zip(packed, pixels, strict=True):
        row[:, : one.shape[1], : one.shape[2]] = one
    return PackedImages(
        packed, sizes_px, torch.tensor([(image.height, image.width) for image in images])
    )


def open_program(path: Path, device: torch.device | str = "cpu") -> Runtime:
    """Open a `torch.export` program, which must have been exported for this device.

    Opening such a file can run code in it. So open only files that this process has just written,
    to compare them with their model.
    """
    module = torch.export.load(path).module()

    def run(packed: PackedImages) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode():
            scores, labels, boxes_px = module(*(part.to(device) for part in packed))
        return scores.cpu(), labels.cpu(), boxes_px.cpu()

    return run


def open_onnx(path: Path) -> Runtime:
    """Open an ONNX file on the CPU, with as many threads as torch uses."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: needs ONNX Runtime: pip install 'deta-platform[export]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(packed: PackedImages) -> tuple[Tensor, Tensor, Tensor]:
        inputs = {name: part.numpy() for name, part in zip(INPUTS, packed, strict=True)}
        scores, labels, boxes_px = map(torch.from_numpy, session.run(None, inputs))
        return scores, labels, boxes_px

    return run


def unpack_detections(scores: Tensor, labels: Tensor, boxes_px: Tensor) -> list[Detections]:
    """Return the detections of each image, without the padding after them."""
    counts = (labels >= 0).sum(1).tolist()
    return [
        Detections(scores[row, :count], labels[row, :count], boxes_px[row, :count])
        for row, count in enumerate(counts)
    ]
