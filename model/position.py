"""Sine encodings of pixel positions on a feature map and of box coordinates."""

# B images   H W height and width of a feature map   Q boxes   D features

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000  # as in all published DETA code
_EPS = 1e-6


def _sines(angles: Tensor, num_features: int) -> Tensor:
    """Return sine and cosine of each angle at D / 2 frequencies, interleaved. … -> … D."""
    index = torch.arange(num_features, dtype=torch.float32, device=angles.device)
    wavelengths = TEMPERATURE ** (2 * (index // 2) / num_features)
    phases = angles[..., None] / wavelengths
    return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], -1).flatten(-2)


def encode_pixels(padding: Tensor, dim: int) -> Tensor:
    """Encode the position of each pixel in its image.

    Args:
        padding: B H W, true where there is no image.
        dim: features per pixel, even: half for y, then half for x.

    Returns:
        B H W dim, float32. Positions run from 0 to 2π over the unpadded part.

    Source: DETR (Carion et al. 2020) with the half-pixel shift of Deformable DETR's code.
    """
    encoded = []
    for axis in (1, 2):
        # Counted in integers: CUDA has no deterministic sum along an axis of floats.
        count = (~padding).cumsum(axis).float()
        last = count.narrow(axis, -1, 1)
        position = (count - 0.5) / (last + _EPS) * (2 * math.pi)
        encoded.append(_sines(position, dim // 2))
    return torch.cat(encoded, -1)


def encode_boxes(boxes: Tensor, dim: int) -> Tensor:
    """Encode the coordinates of each box.

    Args:
        boxes: B Q 4, cxcywh, relative.
        dim: features per coordinate, even.

    Returns:
        B Q 4·dim, float32, in the order cx, cy, w, h.

    Source: two-stage Deformable DETR, released code (`get_proposal_pos_embed`).
    """
    return _sines(boxes.float() * (2 * math.pi), dim).flatten(-2)
