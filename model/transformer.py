"""Encoder and decoder of the deformable transformer.

Source: Deformable DETR (Zhu et al. 2021, https://arxiv.org/abs/2010.04159), as DETA uses it.
"""

# B images   S pixels of all levels, flattened level after level   L levels   Q queries   D channels

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deta.model.attention import MultiScaleDeformableAttention
from deta.model.boxes import box_logits


@dataclass(frozen=True)
class Levels:
    """Shapes and padding of the flattened feature pyramid, for all parts of the transformer."""

    shapes: list[tuple[int, int]]  # (height, width) of each level
    padding: Tensor  # B S, true where there is no image
    index: Tensor  # S, the level that a pixel belongs to
    valid_size: Tensor  # B L 2, (columns, rows) of each level that contain image
    valid_ratio: Tensor  # B L 2, (x, y): the share of each level that contains image

    @staticmethod
    def of(paddings: list[Tensor]) -> Levels:
        """Build from the padding of each level, B h w."""
        shapes = [(padding.shape[1], padding.shape[2]) for padding in paddings]
        device = paddings[0].device
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32).to(
            device, non_blocking=True
        )
        valid_size = torch.stack(
            [
                torch.stack([(~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)], -1)
                for padding in paddings
            ],
            1,
        ).float()
        index = torch.cat(
            [torch.full((h * w,), level, device=device) for level, (h, w) in enumerate(shapes)]
        )
        return Levels(
            shapes=shapes,
            padding=torch.cat([padding.flatten(1) for padding in paddings], 1),
            index=index,
            valid_size=valid_size,
            valid_ratio=valid_size / sizes,
        )

    def pixel_centres(self) -> Tensor:
        """Return (x, y) of each pixel, relative to the unpadded part of its level. B S 2."""
        centres = []
        for level, (height, width) in enumerate(self.shapes):
            y = torch.arange(height, device=self.padding.device, dtype=torch.float32) + 0.5
            x = torch.arange(width, device=self.padding.device, dtype=torch.float32) + 0.5
            grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)  # h w 2
            centres.append(grid.flatten(0, 1) / self.valid_size[:, None, level])
        return torch.cat(centres, 1)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between, a residual connection and a norm."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.linear1(x).relu())
        return self.norm(x + self.dropout(self.linear2(hidden)))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.attention_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory: Tensor, position: Tensor, centres: Tensor, levels: Levels) -> Tensor:
        attended = self.attention(memory + position, centres, memory, levels.shapes, levels.padding)
        return self.ffn(self.attention_norm(memory + self.dropout(attended)))


class Encoder(nn.Module):
    """The encoder: every pixel of every level attends to all levels."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, features: Tensor, position: Tensor, levels: Levels) -> Tensor:
        """Encode features and their positions, B S D each, as the memory, B S D."""
        # Each pixel's own position, converted to the padded frame of every level that it samples.
        centres = levels.pixel_centres()[:, :, None] * levels.valid_ratio[:, None]  # B S L 2
        memory = features
        for layer in self.layers:
            memory = layer(memory, position, centres, levels)
        return memory


class DecoderLayer(nn.Module):
    """Self-attention, deformable attention to the memory, and a feed-forward block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(
            dim, num_heads, dropout=dropout, batch_first=True
        )
        self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = MultiScaleDeformableAttention(dim, num_heads, num_levels, num_points)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        reference_boxes: Tensor,
        memory: Tensor,
        levels: Levels,
    ) -> Tensor:
        """Update the queries, B Q D. Boxes are B Q 4, cxcywh relative to the unpadded image."""
        positioned = queries + query_position
        mixed, _ = self.self_attention(positioned, positioned, queries, need_weights=False)
        queries = self.self_attention_norm(queries + self.dropout(mixed))

        boxes = reference_boxes[:, :, None] * levels.valid_ratio.repeat(1, 1, 2)[:, None]  # B Q L 4
        read = self.cross_attention(
            queries + query_position, boxes, memory, levels.shapes, levels.padding
        )
        queries = self.cross_attention_norm(queries + self.dropout(read))
        return self.ffn(queries)


class BoxHead(nn.Module):
    """Correct each query's reference box.

    The correction is added in logit space, so a box stays inside the image however large it is
    (Deformable DETR, section 4.2). It starts at zero: initially every box is its reference.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        correction = nn.Linear(dim, 4)
        nn.init.zeros_(correction.weight)
        nn.init.zeros_(correction.bias)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), correction
        )

    def forward(self, queries: Tensor, reference_logits: Tensor) -> Tensor:
        """Return the corrected boxes as logits of cxcywh, B Q 4, at least float32."""
        return self.mlp(queries).float() + reference_logits


class Decoder(nn.Module):
    """The decoder: queries attend to the memory around their boxes, which each layer refines."""

    def __init__(self, layers: list[DecoderLayer], logit_eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.logit_eps = logit_eps

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        proposals: Tensor,
        memory: Tensor,
        levels: Levels,
        box_heads: nn.ModuleList,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Refine queries and boxes, layer by layer.

        Returns:
            The queries (B Q D) and the boxes (B Q 4, cxcywh, relative) of each layer. Gradients
            of a layer's boxes reach only its own box head: references are detached, and there is
            no look-forward-twice.
        """
        all_queries, all_boxes = [], []
        reference = proposals
        # Not strict: there is one more head, which belongs to the first stage.
        for layer, box_head in zip(self.layers, box_heads, strict=False):
            queries = layer(queries, query_position, reference, memory, levels)
            boxes = box_head(queries, box_logits(reference, self.logit_eps)).sigmoid()
            all_queries.append(queries)
            all_boxes.append(boxes)
            reference = boxes.detach()
        return all_queries, all_boxes
