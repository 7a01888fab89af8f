"""Multi-scale deformable attention as a PyTorch operator.

Each query samples a few points on every feature map and returns their weighted sum (Deformable
DETR, Zhu et al. 2021, section 4.1, https://arxiv.org/abs/2010.04159). The operator has two forms:
one takes sampling locations and attention weights; the fused one takes what a network predicts,
offsets from a reference and logits. This file registers the operator with PyTorch: schema, shape
rule, gradient, autocast rule, and the kernels for each device. `plain.py` defines what it computes.
"""

# B images   Q queries   H heads   L feature levels   P points per head and level
# S pixels of all levels, flattened level after level, row after row   D channels per head

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from deta.ops import cpu, plain

logger = logging.getLogger(__name__)

_LIBRARY = torch.library.Library("deta", "FRAGMENT")
_LIBRARY.define(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights) -> Tensor"
)
_LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes,"
    " Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference_points,"
    " Tensor sampling_offsets, Tensor attention_logits) -> Tensor"
)
_LIBRARY.define(
    "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes,"
    " Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits)"
    " -> (Tensor, Tensor, Tensor)"
)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample every level bilinearly at the given locations and sum with the given weights.

    Args:
        value: B S H D, the projected features, flattened level after level.
        spatial_shapes: (height, width) of each level, as host integers, so that nothing waits
            for the device.
        sampling_locations: B Q H L P 2, (x, y) with (0, 0) the outer top-left corner of the level
            and (1, 1) its outer bottom-right one. Pixels outside the level count as zero; so does
            a location that is not finite.
        attention_weights: B Q H L P.

    Returns:
        B Q H·D, in the dtype of `value`. Sums are formed in float32 (float64 for float64 input).

    Raises:
        ValueError: the shapes of the arguments do not match.

    Source: Zhu et al. 2021, equation 3; pixel centres lie at (i + 0.5) / N as in
        `grid_sample(align_corners=False)`.
    """
    flat_shapes = [size for shape in spatial_shapes for size in shape]
    _check_shapes(value, flat_shapes, sampling_locations, attention_weights, _NAMES)
    return torch.ops.deta.ms_deform_attn(value, flat_shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute the same from references, offsets and logits, without locations and weights.

    Args:
        value: B S H D.
        spatial_shapes: (height, width) of each level.
        reference_points: B Q L 2, (x, y) in the frame of `sampling_locations`; the offsets are
            then in pixels of each level. Or B Q L 4, boxes (cx, cy, w, h) in that frame; P units
            of offset are then half the box. Stays float32 under autocast: half precision would
            move samples by whole pixels.
        sampling_offsets: B Q H L P 2, (x, y).
        attention_logits: B Q H L P; the softmax is over all levels and points.

    Returns, Raises: as `ms_deform_attn`.

    Source: Zhu et al. 2021, section 4.1 and appendix A.3.
    """
    flat_shapes = [size for shape in spatial_shapes for size in shape]
    _check_shapes(value, flat_shapes, sampling_offsets, attention_logits, _FUSED_NAMES)
    expected = (*sampling_offsets.shape[:2], sampling_offsets.shape[3])
    if tuple(reference_points.shape[:-1]) != expected or reference_points.shape[-1] not in (2, 4):
        raise ValueError(
            f"reference_points must be B Q L 2 or B Q L 4 with B Q L = {tuple(expected)}; "
            f"got {tuple(reference_points.shape)}"
        )
    return torch.ops.deta.ms_deform_attn_fused(
        value, flat_shapes, reference_points, sampling_offsets, attention_logits
    )


_NAMES = ("ms_deform_attn", "sampling_locations", "attention_weights")
_FUSED_NAMES = ("ms_deform_attn_fused", "sampling_offsets", "attention_logits")


def _check_shapes(
    value: Tensor,
    flat_shapes: list[int],
    places: Tensor,
    attention: Tensor,
    names: tuple[str, str, str],
) -> None:
    operator, places_name, attention_name = names
    num_levels = len(flat_shapes) // 2
    if value.dim() != 4 or places.dim() != 6 or attention.dim() != 5:
        raise ValueError(
            f"{operator} takes value B S H D, {places_name} B Q H L P 2 and "
            f"{attention_name} B Q H L P; got {tuple(value.shape)}, {tuple(places.shape)} "
            f"and {tuple(attention.shape)}"
        )
    num_images, num_pixels, num_heads, _ = value.shape
    if num_pixels != sum(h * w for h, w in zip(flat_shapes[::2], flat_shapes[1::2], strict=True)):
        raise ValueError(
            f"value has {num_pixels} pixels, but the levels {flat_shapes} (height, width, …) "
            "have another number"
        )
    expected = (num_images, attention.shape[1], num_heads, num_levels, attention.shape[4])
    if tuple(attention.shape) != expected or tuple(places.shape) != (*expected, 2):
        raise ValueError(
            f"value has {num_images} images and {num_heads} heads and there are {num_levels} "
            f"levels, which does not fit {places_name} {tuple(places.shape)} and "
            f"{attention_name} {tuple(attention.shape)}"
        )


# The kernels. Each module has forward, backward, fused_forward and fused_backward.


@cache
def kernels_for(device_type: str) -> ModuleType:
    """Return the fastest kernels available: compiled, then Triton on CUDA, then plain PyTorch.

    The environment variable DETA_OPS selects others, to compare or to exclude kernels: `plain`, or
    `triton` on CUDA.
    """
    wanted = os.environ.get("DETA_OPS", "")
    if wanted not in ("", "plain", "triton"):
        raise ValueError(f"DETA_OPS={wanted!r} is neither plain nor triton; unset it")
    if wanted != "plain":
        if device_type == "cpu" and cpu.is_available():
            return cpu
        if device_type == "cuda":
            from deta.ops import cuda, triton_kernels

            if wanted != "triton" and cuda.is_available():
                return cuda
            if triton_kernels.is_available():
                return triton_kernels
        logger.warning(
            "multi-scale deformable attention on %s runs on plain PyTorch, many times slower than "
            "compiled; `python -m deta.ops` shows what is missing",
            device_type,
        )
    return plain


def path(device_type: str) -> str:
    """Describe the kernels that run on a device."""
    kernels = kernels_for(device_type)
    return "plain PyTorch" if kernels is plain else kernels.path()


def _on(device_type: str, function: str) -> Callable:
    def kernel(*arguments):
        return getattr(kernels_for(device_type), function)(*arguments)

    return kernel


_KERNELS = {
    "ms_deform_attn": "forward",
    "ms_deform_attn_backward": "backward",
    "ms_deform_attn_fused": "fused_forward",
    "ms_deform_attn_fused_backward": "fused_backward",
}

for _operator, _function in _KERNELS.items():
    _LIBRARY.impl(_operator, getattr(plain, _function), "CompositeExplicitAutograd")
    _LIBRARY.impl(_operator, _on("cpu", _function), "CPU")
    _LIBRARY.impl(_operator, _on("cuda", _function), "CUDA")


def plain_decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Return the operator in standard ones for `run_decompositions`, to export a model."""
    return {
        torch.ops.deta.ms_deform_attn.default: plain.forward,
        torch.ops.deta.ms_deform_attn_fused.default: plain.fused_forward,
    }


# Shape rules, for tracing.


def _output_like(
    value: Tensor, spatial_shapes: Sequence[int], first: Tensor, *others: Tensor
) -> Tensor:
    num_images, _, num_heads, num_channels = value.shape
    # Sampling locations, and references too, are B Q …
    return value.new_empty((num_images, first.shape[1], num_heads * num_channels))


def _gradients_like(
    grad_output: Tensor, value: Tensor, spatial_shapes: Sequence[int], *others: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    places, attention = others[-2:]  # the references get no gradient here
    return (
        value.new_empty(value.shape),
        places.new_empty(places.shape),
        attention.new_empty(attention.shape),
    )


for _operator in _KERNELS:
    torch.library.register_fake(
        f"deta::{_operator}",
        _gradients_like if _operator.endswith("_backward") else _output_like,
        lib=_LIBRARY,
    )


# The gradient.


def _save_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, *others = inputs
    ctx.save_for_backward(value, *others)


def _gradient(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.deta.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _fused_gradient(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor, Tensor]:
    value, references, offsets, logits = ctx.saved_tensors
    grad_value, grad_offsets, grad_logits = torch.ops.deta.ms_deform_attn_fused_backward(
        grad_output, value, ctx.spatial_shapes, references, offsets, logits
    )
    grad_references = None
    if ctx.needs_input_grad[2]:
        dtype = torch.promote_types(value.dtype, torch.float32)
        locations, _ = plain.locations_of(ctx.spatial_shapes, references, offsets, dtype)
        weights = logits.to(dtype).flatten(3).softmax(-1).view_as(logits)
        _, grad_locations, _ = torch.ops.deta.ms_deform_attn_backward(
            grad_output, value, ctx.spatial_shapes, locations, weights
        )
        grad_references = plain.references_gradient(references, offsets, grad_locations)
    return grad_value, None, grad_references, grad_offsets, grad_logits


torch.library.register_autograd(
    "deta::ms_deform_attn", _gradient, setup_context=_save_inputs, lib=_LIBRARY
)
torch.library.register_autograd(
    "deta::ms_deform_attn_fused", _fused_gradient, setup_context=_save_inputs, lib=_LIBRARY
)


# Autocast: features and output use the lower precision. Locations, offsets and weights stay as they
# are: kernels compute with them in float32 anyway.


def _autocast(operator: str, device_type: str, value: Tensor, *others) -> Tensor:
    with torch.autocast(device_type, enabled=False):
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(device_type))
        return getattr(torch.ops.deta, operator)(value, *others)


for _operator in ("ms_deform_attn", "ms_deform_attn_fused"):
    _LIBRARY.impl(_operator, partial(_autocast, _operator, "cpu"), "AutocastCPU")
    _LIBRARY.impl(_operator, partial(_autocast, _operator, "cuda"), "AutocastCUDA")
