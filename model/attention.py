"""Multi-scale deformable attention as a module; the only file that imports `deta.ops`."""

# B images   Q queries   H heads   L feature levels   P points per head and level
# S pixels of all levels, flattened   D channels

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deta.ops.ms_deform_attn import ms_deform_attn_fused


class MultiScaleDeformableAttention(nn.Module):
    """Attention in which each query samples P points per level, at offsets that it predicts.

    Source: Deformable DETR, Zhu et al. 2021, section 4.1, https://arxiv.org/abs/2010.04159
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"dim={dim} cannot be divided among {num_heads} attention heads")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_projection = nn.Linear(dim, dim)
        self.output_projection = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise head h to sample 1, 2, … P units in direction h of a full turn."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)  # H 2
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * steps[:, None]  # H 1 P 2
        offsets = offsets.expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Sequence[tuple[int, int]],
        padding: Tensor,
    ) -> Tensor:
        """Attend to the memory.

        Args:
            queries: B Q D.
            references: B Q L 2, (x, y) of each query's reference point, relative to the padded
                level; offsets are then in pixels. Or B Q L 4, its reference box (cx, cy, w, h) in
                the same frame; P units of offset are then half the box. At least float32: half
                precision moves a sample by several pixels.
            memory: B S D, the features to sample.
            shapes: (height, width) of each level.
            padding: B S, true where there is no image; features there count as zero.

        Returns:
            B Q D.
        """
        points = (self.num_heads, self.num_levels, self.num_points)
        value = self.value_projection(memory).masked_fill(padding[..., None], 0)
        read = ms_deform_attn_fused(
            value.unflatten(-1, (self.num_heads, -1)),  # B S H D/H
            shapes,
            references,
            self.sampling_offsets(queries).unflatten(-1, (*points, 2)),
            self.attention_weights(queries).unflatten(-1, points),
        )
        return self.output_projection(read)
