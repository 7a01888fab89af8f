"""Pictures into an exported file, and detections out of it.

`pack` is all that is left to do around such a file; what it does fits on a page in any language.
"""

# B images   H W height and width of the padded images   N detections

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from deta.model.postprocess import Detections
from deta.platform.data.transforms import EvaluationSize, resized_size
from deta.platform.inference.export import INPUTS

# Packed pictures to scores (B N), labels (B N) and boxes (B N 4), as `DetectionProgram` has it.
Runtime = Callable[["Packed"], tuple[Tensor, Tensor, Tensor]]


class Packed(NamedTuple):
    """Pictures as an exported file wants them."""

    images: Tensor  # B 3 H W, uint8, RGB, each at the top left
    sizes_px: Tensor  # B 2, int64, (height, width) of each in there
    original_sizes_px: Tensor  # B 2, int64, (height, width) before they were resized


def pack(images: Sequence[Image.Image], size: EvaluationSize, least_side_px: int) -> Packed:
    """Resize RGB pictures with PIL's bilinear filter and put them into one array.

    Args:
        size: the short edge becomes `short_edge`, but the long one at most `max_long_edge`.
        least_side_px: of the array; a thin picture is padded to it, as beside a larger one.
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
    return Packed(packed, sizes_px, torch.tensor([(image.height, image.width) for image in images]))


def open_program(path: Path, device: torch.device | str = "cpu") -> Runtime:
    """A `torch.export` program. It must have been exported for this device.

    Opening one can run code that somebody put into it. So this is for a file that was just written
    here, to compare it with its model; nothing opens one that was given.
    """
    module = torch.export.load(path).module()

    def run(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode():
            scores, labels, boxes_px = module(*(part.to(device) for part in packed))
        return scores.cpu(), labels.cpu(), boxes_px.cpu()

    return run


def open_onnx(path: Path) -> Runtime:
    """An ONNX file, on the CPU, with as many threads as torch uses."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
        inputs = {name: part.numpy() for name, part in zip(INPUTS, packed, strict=True)}
        scores, labels, boxes_px = map(torch.from_numpy, session.run(None, inputs))
        return scores, labels, boxes_px

    return run


def unpack(scores: Tensor, labels: Tensor, boxes_px: Tensor) -> list[Detections]:
    """The detections of each picture, without the empty places after them."""
    counts = (labels >= 0).sum(1).tolist()
    return [
        Detections(scores[row, :count], labels[row, :count], boxes_px[row, :count])
        for row, count in enumerate(counts)
    ]
