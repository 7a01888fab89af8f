"""Anchor DETR: queries are anchor points, and attention is decoupled into rows and columns.

Source: Anchor DETR, Wang et al. 2021, https://arxiv.org/abs/2109.07107, and its released code
(megvii-research/AnchorDETR). This file holds only what differs from DETA.
"""

# B images   H W height and width of the feature map   D channels   Q queries   A heads
# T anchor points   P patterns, each of them on every point: Q = P T   C classes   K decoder layers

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deta.model.backbone import Backbone
from deta.model.boxes import box_logits
from deta.model.config import AnchorDETRConfig
from deta.model.detector import PRIOR_PROBABILITY, InputProjection, Predictions
from deta.model.position import encode_boxes
from deta.model.transformer import BoxHead, FeedForward

STRIDE = 32  # C5; the same map is twice as fine where the backbone is dilated (DC5)
FIRST_SIZE_LOGIT = -2.0  # every box starts at 0.12 of the image; released code


@dataclass(frozen=True)
class Map:
    """Positions and padding of a feature map, for the transformer."""

    along_x: Tensor  # B W D, where each column is
    along_y: Tensor  # B H D, where each row is
    padding: Tensor  # B H W, true where there is no image
    averaged: Tensor  # B H W, true where a pixel counts in the average of its row and column

    def keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys of columns (B W D) and rows (B H D): mean features plus positions.

        Args:
            memory: B H W D.
        """
        counted = self.averaged[..., None].to(memory.dtype)
        total = memory * counted
        columns = total.sum(1) / counted.sum(1).clamp(min=1)
        rows = total.sum(2) / counted.sum(2).clamp(min=1)
        return columns + self.along_x, rows + self.along_y


class RowColumnAttention(nn.Module):
    """Attention to a map: the product of attention to its columns and attention to its rows.

    A query weighs the W columns and, by another dot product, the H rows; pixel (h, w) gets the
    product of the two. So the weights of a query are H + W numbers instead of H·W.

    Source: Anchor DETR, section 3.3 (row-column decoupled attention).
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Stacked: queries for x, queries for y, keys for x, keys for y, values. One matrix, as in
        # the released code, because Xavier initialisation depends on the shape of the matrix.
        self.in_weight = nn.Parameter(torch.empty(5 * dim, dim))
        self.in_bias = nn.Parameter(torch.zeros(5 * dim))
        self.out_projection = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.in_weight)
        nn.init.zeros_(self.out_projection.bias)

    def forward(
        self,
        queries_x: Tensor,
        queries_y: Tensor,
        keys_x: Tensor,
        keys_y: Tensor,
        values: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """Attend to the map.

        Args:
            queries_x: B Q D, compared with the columns.
            queries_y: B Q D, compared with the rows.
            keys_x: B W D, one for each column.
            keys_y: B H D, one for each row.
            values: B H W D.
            padding: B H W, true where there is no image: complete rows at the bottom, and complete
                columns at the right.

        Returns:
            B Q D.
        """
        weights, biases = self.in_weight.chunk(5), self.in_bias.chunk(5)
        query_x, query_y, key_x, key_y, value = (
            F.linear(part, weight, bias).unflatten(-1, (self.num_heads, -1))
            for part, weight, bias in zip(
                (queries_x, queries_y, keys_x, keys_y, values), weights, biases, strict=True
            )
        )
        weights_x = self._weigh(query_x, key_x, padding[:, 0])  # B A Q W
        weights_y = self._weigh(query_y, key_y, padding[:, :, 0])  # B A Q H
        height, width = values.shape[1:3]
        # Sum over the longer side first, which makes the intermediate result smaller. An exported
        # program must be the same for every shape, so it always sums over columns first.
        if height < width and not torch.compiler.is_exporting():
            by_column = value.permute(0, 3, 2, 1, 4).flatten(3)  # B A W (H D/A)
            read = _sum(weights_y, (weights_x @ by_column).unflatten(3, (height, -1)))
        else:
            by_row = value.permute(0, 3, 1, 2, 4).flatten(3)  # B A H (W D/A)
            read = _sum(weights_x, (weights_y @ by_row).unflatten(3, (width, -1)))
        return self.out_projection(read.transpose(1, 2).flatten(2))

    def _weigh(self, queries: Tensor, keys: Tensor, padding: Tensor) -> Tensor:
        """Return attention weights that sum to 1 over N. B Q A d, B N A d, B N -> B A Q N."""
        scaled = queries.transpose(1, 2) * queries.shape[-1] ** -0.5
        similarity = scaled @ keys.permute(0, 2, 3, 1)
        return self.dropout(similarity.masked_fill(padding[:, None, None], -torch.inf).softmax(-1))


def _sum(weights: Tensor, values: Tensor) -> Tensor:
    """Return the weighted sum over N. B A Q N and B A Q N d -> B A Q d."""
    return (weights[..., None, :] @ values).squeeze(-2)


class AnchorEncoderLayer(nn.Module):
    """An encoder layer: every pixel attends to the whole map."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.attention = RowColumnAttention(config.dim, config.num_heads, config.dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, memory: Tensor, map_: Map) -> Tensor:
        """Update the memory, B H W D."""
        attended = self.attention(
            (memory + map_.along_x[:, None]).flatten(1, 2),
            (memory + map_.along_y[:, :, None]).flatten(1, 2),
            *map_.keys(memory),
            memory,
            map_.padding,
        ).view_as(memory)
        return self.ffn(self.attention_norm(memory + self.dropout(attended)))


@dataclass(frozen=True)
class QueryPosition:
    """Position embeddings of the queries' points, B Q D each."""

    xy: Tensor
    x: Tensor
    y: Tensor


class AnchorDecoderLayer(nn.Module):
    """A decoder layer: every query attends to the other queries, then to the map."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(
            config.dim, config.num_heads, dropout=config.dropout, batch_first=True
        )
        self.self_attention_norm = nn.LayerNorm(config.dim)
        self.cross_attention = RowColumnAttention(config.dim, config.num_heads, config.dropout)
        self.cross_attention_norm = nn.LayerNorm(config.dim)
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        queries: Tensor,
        position: QueryPosition,
        keys: tuple[Tensor, Tensor],
        memory: Tensor,
        padding: Tensor,
    ) -> Tensor:
        """Update the queries, B Q D. `keys` are those of `Map.keys` for the memory, B H W D."""
        positioned = queries + position.xy
        mixed, _ = self.self_attention(positioned, positioned, queries, need_weights=False)
        queries = self.self_attention_norm(queries + self.dropout(mixed))
        read = self.cross_attention(
            queries + position.x, queries + position.y, *keys, memory, padding
        )
        return self.ffn(self.cross_attention_norm(queries + self.dropout(read)))


class PositionMLP(nn.Sequential):
    """An MLP from the sine encoding of a position to its embedding."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


class AnchorDETR(nn.Module):
    """The complete Anchor DETR model."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.backbone = Backbone(config.backbone, strides=(STRIDE,))
        (channels,) = self.backbone.channels
        self.input_projection = InputProjection(channels, dim, kernel_size=1, stride=1)
        self.encoder = _copies([AnchorEncoderLayer(config) for _ in range(config.encoder_layers)])
        self.decoder = _copies([AnchorDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.patterns = nn.Parameter(torch.randn(config.num_patterns, dim))
        if config.points == "learned":
            self.points = nn.Parameter(torch.rand(config.num_points, 2))  # (x, y), relative
        else:
            self.register_buffer("points", _grid(config.num_points), persistent=False)
        self.position_xy = PositionMLP(dim)
        self.position_1d = PositionMLP(dim)  # of columns, of rows and of the queries' x and y
        # One head for all layers, unlike DETA.
        self.class_head = nn.Linear(dim, config.num_classes)
        self.box_head = BoxHead(dim)
        prior_logit = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        nn.init.constant_(self.class_head.bias, prior_logit)
        *_, correction = self.box_head.mlp
        nn.init.constant_(correction.bias[2:], FIRST_SIZE_LOGIT)  # type: ignore[index]

    def forward(self, images: Tensor, padding: Tensor) -> Predictions:
        """Detect objects.

        Args:
            images: B 3 H W, normalised, zero where padded.
            padding: B H W, true where there is no image.
        """
        (feature,) = self.backbone(images)
        return self.detect(self.input_projection(feature), padding)

    def detect(self, feature: Tensor, padding: Tensor) -> Predictions:
        """Detect objects, from the projected feature map (B D h w) and the padding (B H W)."""
        map_ = self._map(
            F.interpolate(padding[None].float(), size=feature.shape[-2:])[0].bool(), feature.dtype
        )
        memory = feature.permute(0, 2, 3, 1)
        for layer in self.encoder:
            memory = layer(memory, map_)

        points = self.points.repeat(self.config.num_patterns, 1).expand(len(memory), -1, -1)
        position = self._query_position(points, feature.dtype)
        point_logits = F.pad(box_logits(points.float(), self.config.logit_eps), (0, 2))  # B Q 4
        keys = map_.keys(memory)
        queries = self.patterns.repeat_interleave(len(self.points), 0).expand(len(memory), -1, -1)
        logits, boxes = [], []
        for layer in self.decoder:
            queries = layer(queries, position, keys, memory, map_.padding)
            logits.append(self.class_head(queries).float())
            # Every layer starts from the point again: boxes are not refined from layer to layer.
            boxes.append(self.box_head(queries, point_logits).sigmoid())
        return Predictions(logits=torch.stack(logits), boxes=torch.stack(boxes))

    def _map(self, padding: Tensor, dtype: torch.dtype) -> Map:
        """Build the `Map`. Positions run from 0 to 1 over the unpadded part of the map."""
        along = []
        for inside in (~padding[:, 0], ~padding[:, :, 0]):  # B W, then B H
            # In integers: CUDA has no deterministic sum along an axis of floats.
            count = inside.cumsum(1).float()
            centres = (count - 0.5) / count[:, -1:]
            along.append(self.position_1d(self._encode(centres[..., None], dtype)))
        averaged = torch.ones_like(padding) if self.config.average_padding else ~padding
        return Map(along[0], along[1], padding, averaged)

    def _query_position(self, points: Tensor, dtype: torch.dtype) -> QueryPosition:
        """Return the position embeddings of points, B Q 2."""
        return QueryPosition(
            xy=self.position_xy(self._encode(points.flip(-1), dtype)),  # y before x, as published
            x=self.position_1d(self._encode(points[..., :1], dtype)),
            y=self.position_1d(self._encode(points[..., 1:], dtype)),
        )

    def _encode(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Encode n relative coordinates as sines, D / n features each. B N n -> B N D."""
        return encode_boxes(places, self.config.dim // places.shape[-1]).to(dtype)


def _grid(num_points: int) -> Tensor:
    """Return the cell centres of a square grid with about `num_points` cells. T 2, (x, y)."""
    side = round(math.sqrt(num_points))
    centres = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(centres, centres)


def _copies(layers: list) -> nn.ModuleList:
    """Initialise all layers as copies of the first, as in the released code."""
    for layer in layers[1:]:
        layer.load_state_dict(layers[0].state_dict())
    return nn.ModuleList(layers)
