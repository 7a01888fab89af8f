"""The operator's calls in DETA R50 5-scale on an image of 800 × 1333, for benchmarks.

Features are random, but queries sample where trained ones do: encoder tokens a few pixels around
themselves, decoder queries around their boxes. These places determine the use of the caches.
"""

# B images   Q queries   H heads   L feature levels   P points   S pixels of all levels   D channels

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deta.ops import plain

Stage = Literal["encoder", "decoder"]

HEADS, CHANNELS, POINTS, QUERIES = 8, 32, 4, 900
STRIDES = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Workload:
    """The arguments of one call, in both forms."""

    value: Tensor  # B S H D
    flat_shapes: list[int]
    references: Tensor  # B Q L 2 or 4
    offsets: Tensor  # B Q H L P 2
    logits: Tensor  # B Q H L P
    grad_output: Tensor  # B Q H·D

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return list(zip(self.flat_shapes[::2], self.flat_shapes[1::2], strict=True))

    def prepare(self) -> tuple[Tensor, Tensor]:
        """Return locations and weights, as a network computes them for the form without fusion."""
        weights = self.logits.flatten(3).softmax(-1).view_as(self.logits)
        locations, _ = plain.locations_of(
            self.flat_shapes, self.references, self.offsets, torch.float32
        )
        return locations, weights

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Workload:
        """Move to a device, with features in another dtype. All else stays float32."""
        return Workload(
            self.value.to(device, dtype),
            self.flat_shapes,
            self.references.to(device),
            self.offsets.to(device),
            self.logits.to(device),
            self.grad_output.to(device, dtype),
        )

    def bytes_touched(self, backward: bool) -> int:
        """Return the bytes that the fused form must move at least: each tensor once."""
        read = (self.value, self.references, self.offsets, self.logits)
        moved = sum(t.nbytes for t in (*read, self.grad_output))  # the output, or its gradient
        if backward:
            moved += sum(t.nbytes for t in (self.value, self.offsets, self.logits))
        return moved


def make_workload(
    stage: Stage, size: tuple[int, int] = (800, 1333), images: int = 1, seed: int = 0
) -> Workload:
    """Make the arguments of one layer's call.

    Args:
        size: (height, width) of the images in pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(math.ceil(side / stride) for side in size) for stride in STRIDES]
    num_levels, num_pixels = len(shapes), sum(h * w for h, w in shapes)
    if stage == "encoder":
        centres = [
            torch.stack(
                torch.meshgrid(
                    (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"
                )[::-1],
                -1,
            ).flatten(0, 1)
            for h, w in shapes
        ]
        references = torch.cat(centres)[None, :, None].expand(images, -1, num_levels, -1)
        spread = 2.0  # pixels around the ring of the initial offsets
    else:
        boxes = torch.rand(images, QUERIES, 1, 4, generator=generator)
        boxes = boxes * torch.tensor([1.0, 1.0, 0.3, 0.3])
        references = boxes.expand(-1, -1, num_levels, -1)
        spread = 1.0
    size_of_logits = (images, references.shape[1], HEADS, num_levels, POINTS)
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    ring = directions[:, None, None] * torch.arange(1, POINTS + 1)[:, None]  # H 1 P 2
    offsets = ring + spread * torch.randn(*size_of_logits, 2, generator=generator)
    return Workload(
        value=torch.randn(images, num_pixels, HEADS, CHANNELS, generator=generator),
        flat_shapes=[side for shape in shapes for side in shape],
        references=references.contiguous(),
        offsets=offsets,
        logits=torch.randn(size_of_logits, generator=generator),
        grad_output=torch.randn(images, references.shape[1], HEADS * CHANNELS, generator=generator),
    )
