"""The operator in plain PyTorch: its specification, and the fallback if nothing was compiled.

Every function uses only standard operators and changes nothing in place, so that a model can be
exported with these instead of the operator. Arithmetic is in float32 at least: PyTorch's bfloat16
grid_sample on the CPU computes pixel indices in bfloat16, which gives wrong results and can read
out of bounds.
"""

# B images   Q queries   H heads   L feature levels   P points per head and level
# S pixels of all levels, flattened level after level, row after row   D channels per head

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BILINEAR, _ZERO_PADDING = 0, 0  # the codes that aten::grid_sampler_2d gives these modes


def forward(
    value: Tensor, shapes: Sequence[int], locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample at locations with weights. B Q H·D, in the dtype of `value`."""
    num_images, _, num_heads, num_channels = value.shape
    num_queries = locations.shape[1]
    dtype = accumulation_dtype(value)
    weights = _per_head(attention_weights.to(dtype))  # B·H Q L P
    output = value.new_zeros((num_images * num_heads, num_channels, num_queries), dtype=dtype)
    for level, features, grid in _levels(value, shapes, locations, dtype):
        samples = torch.ops.aten.grid_sampler_2d(features, grid, _BILINEAR, _ZERO_PADDING, False)
        output = output + (samples * weights[:, None, :, level]).sum(-1)  # B·H D Q
    output = output.view(num_images, num_heads * num_channels, num_queries)
    return output.transpose(1, 2).to(value.dtype).contiguous()


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, each in the dtype of its tensor."""
    num_images, num_pixels, num_heads, num_channels = value.shape
    num_queries, num_levels = locations.shape[1], locations.shape[3]
    dtype = accumulation_dtype(value)
    weights = _per_head(attention_weights.to(dtype))  # B·H Q L P
    grad = grad_output.to(dtype).reshape(num_images, num_queries, num_heads, num_channels)
    grad = grad.permute(0, 2, 3, 1).flatten(0, 1)[..., None]  # B·H D Q 1

    # Levels without pixels keep these defaults.
    nothing = weights.new_zeros(weights[:, :, 0].shape)  # B·H Q P
    grad_features = [value.new_zeros((num_images * num_heads, num_channels, 0), dtype=dtype)]
    grad_grids = [nothing[..., None].expand(*nothing.shape, 2)] * num_levels
    grad_weights = [nothing] * num_levels
    for level, features, grid in _levels(value, shapes, locations, dtype):
        samples = torch.ops.aten.grid_sampler_2d(features, grid, _BILINEAR, _ZERO_PADDING, False)
        grad_weights[level] = (samples * grad).sum(1)  # B·H Q P
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
        grad_grids[level] = 2 * grad_grid  # B·H Q P 2; the grid is 2 · location - 1

    def per_query(levels: list[Tensor]) -> Tensor:
        """L times B·H Q P … -> B Q H L P …"""
        stacked = torch.stack(levels, 2)
        return stacked.unflatten(0, (num_images, num_heads)).transpose(1, 2).contiguous()

    grad_value = torch.cat(grad_features, 2)  # B·H D S
    grad_value = grad_value.view(num_images, num_heads, num_channels, num_pixels)
    return (
        grad_value.permute(0, 3, 1, 2).to(value.dtype).contiguous(),
        per_query(grad_grids).to(locations.dtype),
        per_query(grad_weights).to(attention_weights.dtype),
    )


def fused_forward(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Sample at references plus offsets, weighted by the softmax of the logits. B Q H·D."""
    locations, _, weights = unfused(value, shapes, references, offsets, logits)
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
    locations, offset_unit, weights = unfused(value, shapes, references, offsets, logits)
    grad_value, grad_locations, grad_weights = backward(
        grad_output, value, shapes, locations, weights
    )
    return (
        grad_value,
        (grad_locations * offset_unit).to(offsets.dtype),
        softmax_gradient(weights, grad_weights).to(logits.dtype),
    )


def references_gradient(references: Tensor, offsets: Tensor, grad_locations: Tensor) -> Tensor:
    """Compute the gradient of the references, B Q L 2 or 4, from that of the locations.

    The kernels do not compute it, because DETA does not train through its references.

    Args:
        grad_locations: B Q H L P 2.
    """
    grad = grad_locations.sum((2, 4))  # B Q L 2
    if references.shape[-1] == 4:
        share = offsets.to(grad_locations.dtype) * (0.5 / offsets.shape[4])
        grad = torch.cat([grad, (grad_locations * share).sum((2, 4))], -1)
    return grad.to(references.dtype)


def locations_of(
    shapes: Sequence[int], references: Tensor, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the sampling locations (B Q H L P 2), and the length of one unit of offset."""
    references = references.to(dtype)[:, :, None, :, None]  # B Q 1 L 1 2 or 4
    if references.shape[-1] == 4:
        unit = references[..., 2:] * (0.5 / offsets.shape[4])
    else:
        one = references.new_ones(())
        # Tensor by tensor, since under export a side may be a symbol. A side of 0 has no pixels.
        pixel = [one if isinstance(side, int) and side == 0 else one / side for side in shapes]
        unit = torch.stack(pixel).view(-1, 2).flip(1)[:, None]  # L 1 2, of (x, y)
    return references[..., :2] + offsets.to(dtype) * unit, unit


def unfused(
    value: Tensor, shapes: Sequence[int], references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return locations, the unit of their offsets, and weights, in the arithmetic's dtype."""
    dtype = accumulation_dtype(value)
    weights = logits.to(dtype).flatten(3).softmax(-1).reshape(logits.shape)
    return *locations_of(shapes, references, offsets, dtype), weights


def softmax_gradient(weights: Tensor, grad_weights: Tensor) -> Tensor:
    """Return the gradient of the logits, B Q H L P, from that of their softmax."""
    grad_weights = grad_weights.to(weights.dtype)
    return weights * (grad_weights - (weights * grad_weights).sum((3, 4), keepdim=True))


def _levels(
    value: Tensor, shapes: Sequence[int], locations: Tensor, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each level's index, features (B·H D h w) and sampling grid (B·H Q P 2, in -1..1)."""
    num_images, _, num_heads, num_channels = value.shape
    # A location at -1 or 2 is more than a pixel outside of every level and contributes nothing.
    # Clamping keeps infinities and NaN out of the index arithmetic without changing any result.
    locations = locations.to(dtype).nan_to_num(nan=-1.0).clamp(-1.0, 2.0)
    start = 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        if isinstance(height, int) and isinstance(width, int) and height * width == 0:
            continue
        features = value[:, start : start + height * width].to(dtype)  # B hw H D
        features = features.permute(0, 2, 3, 1).reshape(
            num_images * num_heads, num_channels, height, width
        )
        grid = 2 * locations[:, :, :, level].transpose(1, 2) - 1  # B H Q P 2
        yield level, features, grid.flatten(0, 1)
        start += height * width


def _per_head(tensor: Tensor) -> Tensor:
    """Merge images and heads, B Q H … -> B·H Q …"""
    return tensor.transpose(1, 2).flatten(0, 1)


def accumulation_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 for float64 values, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32
