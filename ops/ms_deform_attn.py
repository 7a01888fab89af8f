"""Multi-scale deformable attention: the one operation that PyTorch does not have.

Each query looks at a few points on every feature map, wherever it likes, and takes the
weighted sum of what it finds there (Deformable DETR, Zhu et al. 2021, section 4.1,
https://arxiv.org/abs/2010.04159). This file is the whole definition of the operator: its
schema, the plain PyTorch kernel that is the specification, the shape rule and the gradient.
A compiled kernel registers itself under the same schema for one device and is taken there
instead; everything else stays.
"""

# B images   Q queries   H heads   L feature levels   P points per head and level
# S pixels of all levels, flattened level after level, row after row   D channels per head

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deta.ops import compiled

_LIBRARY = torch.library.Library("deta", "FRAGMENT")
_LIBRARY.define(
    "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
    " Tensor attention_weights) -> Tensor"
)
_LIBRARY.define(
    "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes,"
    " Tensor sampling_locations, Tensor attention_weights) -> (Tensor, Tensor, Tensor)"
)

_BILINEAR, _ZERO_PADDING = 0, 0  # the codes that aten::grid_sampler_2d gives these modes


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
        ValueError: the shapes of the arguments do not belong together.

    Source: Zhu et al. 2021, equation 3; pixel centres lie at (i + 0.5) / N as in
        `grid_sample(align_corners=False)`.
    """
    flat_shapes = [size for shape in spatial_shapes for size in shape]
    _check_shapes(value, flat_shapes, sampling_locations, attention_weights)
    return torch.ops.deta.ms_deform_attn(value, flat_shapes, sampling_locations, attention_weights)


def _check_shapes(
    value: Tensor, flat_shapes: list[int], locations: Tensor, weights: Tensor
) -> None:
    num_levels = len(flat_shapes) // 2
    if value.dim() != 4 or locations.dim() != 6 or weights.dim() != 5:
        raise ValueError(
            "ms_deform_attn takes value B S H D, sampling_locations B Q H L P 2 and "
            f"attention_weights B Q H L P; got {tuple(value.shape)}, {tuple(locations.shape)} "
            f"and {tuple(weights.shape)}"
        )
    num_images, num_pixels, num_heads, _ = value.shape
    if num_pixels != sum(h * w for h, w in zip(flat_shapes[::2], flat_shapes[1::2], strict=True)):
        raise ValueError(
            f"value holds {num_pixels} pixels, but the levels {flat_shapes} (height, width, …) "
            "have another number"
        )
    expected = (num_images, weights.shape[1], num_heads, num_levels, weights.shape[4])
    if tuple(weights.shape) != expected or tuple(locations.shape) != (*expected, 2):
        raise ValueError(
            f"value has {num_images} images and {num_heads} heads and there are {num_levels} "
            f"levels, which does not fit sampling_locations {tuple(locations.shape)} and "
            f"attention_weights {tuple(weights.shape)}"
        )


# The plain kernel. Arithmetic is never below float32: PyTorch's bfloat16 grid_sample on the CPU
# computes pixel indices in bfloat16, which gives wrong results and can read out of bounds.


def _levels(
    value: Tensor, flat_shapes: Sequence[int], locations: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each level's features (B·H D h w) and sampling grid (B·H Q P 2, in -1..1)."""
    num_images, _, num_heads, num_channels = value.shape
    # A location at -1 or 2 is further than a pixel outside every level and so contributes nothing;
    # clamping keeps infinities and NaN out of the index arithmetic without changing any result.
    locations = locations.to(dtype).nan_to_num(nan=-1.0).clamp(-1.0, 2.0)
    start = 0
    for level, (height, width) in enumerate(zip(flat_shapes[::2], flat_shapes[1::2], strict=True)):
        features = value[:, start : start + height * width].to(dtype)  # B hw H D
        features = features.permute(0, 2, 3, 1).reshape(-1, num_channels, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2) - 1  # B H Q P 2
        yield features, grid.reshape(num_images * num_heads, *grid.shape[2:])
        start += height * width


def _per_head(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """B Q H … -> B·H Q …"""
    return tensor.to(dtype).transpose(1, 2).flatten(0, 1)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.impl(_LIBRARY, "ms_deform_attn", "CompositeExplicitAutograd")
def plain_forward(
    value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, attention_weights: Tensor
) -> Tensor:
    num_images, _, num_heads, num_channels = value.shape
    num_queries = locations.shape[1]
    dtype = _accumulation_dtype(value.dtype)
    output = value.new_zeros(
        (num_images * num_heads, num_channels, num_queries), dtype=dtype
    )  # B·H D Q
    if output.numel() > 0:
        weights = _per_head(attention_weights, dtype)  # B·H Q L P
        for level, (features, grid) in enumerate(_levels(value, spatial_shapes, locations, dtype)):
            samples = torch.ops.aten.grid_sampler_2d(
                features, grid, _BILINEAR, _ZERO_PADDING, False
            )  # B·H D Q P
            output += (samples * weights[:, None, :, level]).sum(-1)
    output = output.view(num_images, num_heads * num_channels, num_queries)
    return output.transpose(1, 2).to(value.dtype).contiguous()


@torch.library.impl(_LIBRARY, "ms_deform_attn_backward", "CompositeExplicitAutograd")
def plain_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    num_images, _, num_heads, num_channels = value.shape
    num_queries, num_points = locations.shape[1], locations.shape[4]
    if grad_output.numel() == 0 or num_points == 0:
        return (
            torch.zeros_like(value, memory_format=torch.contiguous_format),
            torch.zeros_like(locations, memory_format=torch.contiguous_format),
            torch.zeros_like(attention_weights, memory_format=torch.contiguous_format),
        )
    dtype = _accumulation_dtype(value.dtype)
    weights = _per_head(attention_weights, dtype)  # B·H Q L P
    grad = grad_output.to(dtype).view(num_images, num_queries, num_heads, num_channels)
    grad = grad.permute(0, 2, 3, 1).reshape(-1, num_channels, num_queries, 1)  # B·H D Q 1

    grad_features, grad_grids, grad_weights = [], [], []
    for level, (features, grid) in enumerate(_levels(value, spatial_shapes, locations, dtype)):
        samples = torch.ops.aten.grid_sampler_2d(features, grid, _BILINEAR, _ZERO_PADDING, False)
        grad_weights.append((samples * grad).sum(1))  # B·H Q P
        grad_feature, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad * weights[:, None, :, level],
            features,
            grid,
            _BILINEAR,
            _ZERO_PADDING,
            False,
            [True, True],
        )
        grad_features.append(grad_feature.flatten(2))  # B·H D hw
        grad_grids.append(2 * grad_grid)  # B·H Q P 2; the grid is 2 · location - 1

    def per_query(levels: list[Tensor]) -> Tensor:
        """L times B·H Q P … -> B Q H L P …"""
        stacked = torch.stack(levels, 2)
        return stacked.view(num_images, num_heads, *stacked.shape[1:]).transpose(1, 2).contiguous()

    grad_value = torch.cat(grad_features, 2).view(num_images, num_heads, num_channels, -1)
    return (
        grad_value.permute(0, 3, 1, 2).to(value.dtype).contiguous(),
        per_query(grad_grids).to(locations.dtype),
        per_query(grad_weights).to(attention_weights.dtype),
    )


# The compiled kernels, where they were built; registered for the CPU alone, they come first there.

if compiled.is_available():
    torch.library.impl(_LIBRARY, "ms_deform_attn", "CPU")(compiled.forward)
    torch.library.impl(_LIBRARY, "ms_deform_attn_backward", "CPU")(compiled.backward)


# Shape rules, for tracing, and the gradient.


@torch.library.register_fake("deta::ms_deform_attn", lib=_LIBRARY)
def _forward_shape(
    value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, attention_weights: Tensor
) -> Tensor:
    num_images, _, num_heads, num_channels = value.shape
    return value.new_empty((num_images, locations.shape[1], num_heads * num_channels))


@torch.library.register_fake("deta::ms_deform_attn_backward", lib=_LIBRARY)
def _backward_shape(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        attention_weights.new_empty(attention_weights.shape),
    )


def _save_inputs(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, locations, attention_weights = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(value, locations, attention_weights)


def _gradient(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, attention_weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.deta.ms_deform_attn_backward(
        grad_output.contiguous(), value, ctx.spatial_shapes, locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


torch.library.register_autograd(
    "deta::ms_deform_attn", _gradient, setup_context=_save_inputs, lib=_LIBRARY
)
