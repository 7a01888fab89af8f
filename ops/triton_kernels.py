"""The operator in Triton, for CUDA devices where no CUDA library was compiled.

PyTorch computes the locations and weights of the fused form. Triton compiles a kernel when it is
first called with a new dtype, number of heads or number of channels, but not for new image sizes.
Triton is imported on the first call.
"""

# B images   Q queries   H heads   L feature levels   P points per head and level
# S pixels of all levels, flattened   D channels per head   R numbers of a reference, 2 or 4

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from deta.ops import plain

_QUERIES = 32  # per program


def is_available() -> bool:
    """Return whether Triton is installed and has a CUDA device or its interpreter to run on."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def path() -> str:
    """Describe whether Triton can run, or why it cannot."""
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return "Triton" if is_available() else "installed; no CUDA device"


def _levels(shapes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield index, height, width and first pixel of each level that has pixels."""
    first_pixel = 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        if height * width > 0:
            yield level, height, width, first_pixel
        first_pixel += height * width


def _constants(value: Tensor, queries: int) -> tuple[tuple[int, int, int], dict]:
    """Return the grid, and the constants that the kernels are compiled for."""
    import triton
    import triton.language as tl

    images, _, heads, channels = value.shape
    constants = {
        "HEADS": heads,
        "D": channels,
        "QUERIES": _QUERIES,
        "CHANNELS": triton.next_power_of_2(channels),
        "SUM": tl.float64 if value.dtype == torch.float64 else tl.float32,
    }
    return (triton.cdiv(queries, _QUERIES), heads, images), constants


def forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample at locations with weights. B Q H·D, in the dtype of `value`."""
    images, pixels, heads, channels = value.shape
    _, queries, _, levels, points = weights.shape
    exact = plain.accumulation_dtype(value)
    output = value.new_zeros((images, queries, heads * channels), dtype=exact)
    if weights.numel() == 0 or value.numel() == 0:
        return output.to(value.dtype)
    from deta.ops.triton_source import forward_level

    value, weights = value.contiguous(), weights.contiguous()
    locations = locations.to(exact).contiguous()
    grid, constants = _constants(value, queries)
    with _on(value.device):
        for level, height, width, first_pixel in _levels(shapes):
            forward_level[grid](
                value,
                locations,
                weights,
                output,
                pixels,
                queries,
                levels * points,
                level * points,
                points,
                height,
                width,
                first_pixel,
                **constants,
            )
    return output.to(value.dtype)


def backward(
    grad_output: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, each in the dtype of its tensor."""
    pixels = value.shape[1]
    _, queries, _, levels, points = weights.shape
    exact = plain.accumulation_dtype(value)
    dtypes = value.dtype, locations.dtype, weights.dtype
    value, weights, grad_output = value.contiguous(), weights.contiguous(), grad_output.contiguous()
    locations = locations.to(exact).contiguous()
    is_fixed_point = torch.are_deterministic_algorithms_enabled()
    sums = torch.zeros_like(value, dtype=torch.int64 if is_fixed_point else exact)
    grad_locations = torch.zeros_like(locations)
    grad_weights = torch.zeros_like(weights, dtype=exact)
    if weights.numel() == 0 or value.numel() == 0:
        return sums.to(dtypes[0]), grad_locations.to(dtypes[1]), grad_weights.to(dtypes[2])
    from deta.ops.triton_source import backward_level

    unit = _fixed_point_unit(grad_output, weights) if is_fixed_point else sums
    grid, constants = _constants(value, queries)
    with _on(value.device):
        for level, height, width, first_pixel in _levels(shapes):
            backward_level[grid](
                grad_output,
                value,
                locations,
                weights,
                sums,
                grad_locations,
                grad_weights,
                unit,
                pixels,
                queries,
                levels * points,
                level * points,
                points,
                height,
                width,
                first_pixel,
                FIXED_POINT=is_fixed_point,
                **constants,
            )
    grad_value = sums.to(torch.float64) / unit.to(torch.float64) if is_fixed_point else sums
    return grad_value.to(dtypes[0]), grad_locations.to(dtypes[1]), grad_weights.to(dtypes[2])


def _fixed_point_unit(grad_output: Tensor, weights: Tensor) -> Tensor:
    """Return the number of integer steps per 1, a power of two, so that no sum exceeds 61 bits.

    Sums of integers are the same in any order. Each of the Q·P samples of a level adds to a pixel
    at most once. If a gradient or weight is not finite, the unit is NaN, and so is the result.
    """
    largest = [
        torch.linalg.vector_norm(tensor, torch.inf, dtype=torch.float64)
        for tensor in (grad_output, weights)
    ]
    bound = largest[0] * largest[1] * (weights.shape[1] * weights.shape[4])
    exponent = (60 - bound.clamp(min=1e-30).log2().ceil()).clamp(-100, 100)
    return torch.exp2(exponent) + 0 * bound


def fused_forward(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Sample at references plus offsets, weighted by the softmax of the logits. B Q H·D."""
    locations, _, weights = plain.unfused(value, shapes, references, offsets, logits)
    return forward(value, shapes, locations, weights)


def fused_backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, offsets and logits, each in the dtype of its tensor."""
    locations, unit, weights = plain.unfused(value, shapes, references, offsets, logits)
    grad_value, grad_locations, grad_weights = backward(
        grad_output, value, shapes, locations, weights
    )
    return (
        grad_value,
        (grad_locations * unit).to(offsets.dtype),
        plain.softmax_gradient(weights, grad_weights).to(logits.dtype),
    )


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
