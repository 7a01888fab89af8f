"""Exports a detector as one file that needs none of this package: `torch.export` or ONNX.

Both contain every step between a resized image and its detections: normalisation, padding, model,
suppression and the conversion to pixels of the original image. They hold our operator and
torchvision's suppression as standard operators, so a program loads with torch alone, and an ONNX
file with any runtime of operator set 18. Batch and image size are dynamic; the number of detections
is fixed.
"""

# B images   H W height and width of the padded images   N detections

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from deta.model.architectures import Detector, DetectorConfig
from deta.model.batch import PIXEL_MEAN, PIXEL_STD
from deta.model.config import ModelConfig, PostprocessConfig
from deta.model.postprocess import detect_fixed_number
from deta.ops.ms_deform_attn import plain_decompositions
from deta.platform.inference.exported_model import INPUTS

ONNX_OPSET = 18  # the first with GridSample, LayerNormalization and GroupNormalization
OUTPUTS = ("scores", "labels", "boxes_px")
COARSEST_MAP_STRIDE = 32
TRACED_IMAGES = 2  # torch.export would compile a batch of one in as a constant


class DetectionProgram(nn.Module):
    """The exported module: 8-bit images to detections.

    Pixels are bytes, so callers need not normalise or mask them, and the input is a quarter of the
    size. Only resizing is left to the caller: neither format has an operator for PIL's antialiased
    bilinear filter, with which the published weights were trained.
    """

    mean: Tensor  # 3 1 1
    std: Tensor  # 3 1 1

    def __init__(self, detector: Detector, postprocess: PostprocessConfig) -> None:
        super().__init__()
        self.detector = detector
        self.postprocess = postprocess
        self.register_buffer("mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def forward(
        self, images: Tensor, sizes_px: Tensor, original_sizes_px: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect objects.

        Args:
            images: B 3 H W, uint8, RGB, each resized image at the top left; the pixels right of it
                and below are ignored.
            sizes_px: B 2, int64, (height, width) of each resized image.
            original_sizes_px: B 2, int64, (height, width) before resizing.

        Returns:
            Scores (B N, 0..1), labels (B N, int64, class index) and boxes (B N 4, xyxy in pixels
            of the original image), best first. After the last detection of an image, scores and
            boxes are 0 and labels are -1.
        """
        rows = torch.arange(images.shape[2], device=images.device)[:, None]
        columns = torch.arange(images.shape[3], device=images.device)
        height, width = sizes_px[:, :1, None], sizes_px[:, 1:, None]  # B 1 1 each
        padding = (rows >= height) | (columns >= width)  # B H W
        pixels = (images.float() / 255 - self.mean) / self.std
        outputs = self.detector(pixels.masked_fill(padding[:, None], 0), padding)
        return detect_fixed_number(outputs, original_sizes_px, self.postprocess)


def least_side_px(config: DetectorConfig) -> int:
    """Return the smallest height and width of a padded batch that an exported detector takes.

    Every feature level needs two rows and columns, since a size of one is compiled in. All levels
    together need as many pixels as the detector has queries.
    """
    if not isinstance(config, ModelConfig):
        return 2 * COARSEST_MAP_STRIDE
    for side in count(COARSEST_MAP_STRIDE + 1):
        edges = [math.ceil(side / stride) for stride in (8, 16, COARSEST_MAP_STRIDE)]
        while len(edges) < config.num_levels:
            edges.append(math.ceil(edges[-1] / 2))
        if edges[-1] >= 2 and sum(edge**2 for edge in edges) >= config.num_queries:
            return side
    raise AssertionError("unreachable")


def trace_detector(
    detector: Detector, postprocess: PostprocessConfig, device: torch.device | str = "cpu"
) -> ExportedProgram:
    """Trace a detector into a float32 program. This takes minutes for a large one.

    Args:
        device: the device of the program; it cannot be changed afterwards.

    Raises:
        RuntimeError: the program still contains an operator that is not PyTorch's own.
    """
    device = torch.device(device)
    program = DetectionProgram(detector.eval(), postprocess).to(device)
    least = least_side_px(detector.config)
    # Sizes that differ and are no multiples of a stride, so that no relation between them is
    # compiled in.
    sides = (least + 45, least + 78)
    sizes_px = torch.tensor([[least + 40, least + 78], [least + 45, least + 50]], device=device)
    with torch.no_grad(), warnings.catch_warnings(), _PlainForms():
        warnings.simplefilter("ignore")  # torch's own warnings, which callers cannot act on
        exported = torch.export.export(
            program,
            (
                torch.zeros(TRACED_IMAGES, 3, *sides, dtype=torch.uint8, device=device),
                sizes_px,
                sizes_px * 2,
            ),
            dynamic_shapes=_free_sizes(least),
            # It cannot infer how strides are halved, so it checks these sizes at run time.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    if left := foreign_operators(exported):
        raise RuntimeError(
            f"the program still contains {', '.join(sorted(left))}, which torch alone does not "
            "have; give them a plain form in deta.ops.ms_deform_attn.plain_decompositions"
        )
    return exported


class _PlainForms(TorchFunctionMode):
    """Replace calls of our operators by their plain forms.

    `run_decompositions` afterwards would do the same, but processes the whole program again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forms: dict[Any, Callable] = {}
        for operator, form in plain_decompositions().items():
            self.forms[operator] = self.forms[operator.overloadpacket] = form

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self.forms.get(function, function)(*args, **(kwargs or {}))


def _free_sizes(least_side_px: int) -> tuple[dict[int, Dim], ...]:
    """Return the dynamic dimensions of each input."""
    batch = Dim("batch")
    height, width = Dim("height", min=least_side_px), Dim("width", min=least_side_px)
    return {0: batch, 2: height, 3: width}, {0: batch}, {0: batch}


def foreign_operators(program: ExportedProgram) -> set[str]:
    """Return the names of operators from outside PyTorch in a program, loops included."""
    return {
        str(node.target)
        for part in program.graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace not in ("aten", "prims", "higher_order")
    }


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write a program as one ONNX file of at most 2 GB. Needs onnx and onnxscript."""
    try:
        from onnxscript import optimizer
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: needs onnxscript: pip install 'deta-platform[export]'"
        ) from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it logs what it does not optimise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program,
            opset_version=ONNX_OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            dynamic_shapes=_free_sizes(1),  # sets only their names
            optimize=False,  # pattern search doubles the time, and runtimes optimise too
            verbose=False,
        )
    assert converted is not None
    optimizer.inline(converted.model)
    optimizer.fold_constants(converted.model)
    optimizer.remove_unused_nodes(converted.model)
    converted.save(path, external_data=False)


def _stable_sort(values: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    """Return aten::sort.stable as TopK of all values: ONNX puts the first of equal values first."""
    from onnxscript import opset18

    onnx: Any = opset18
    length = onnx.Gather(onnx.Shape(values), onnx.Constant(value_ints=[dim]))
    return onnx.TopK(values, length, axis=dim, largest=int(descending), sorted=1)
