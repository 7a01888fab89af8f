"""Encoder, decoder and their description of the pyramid's levels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deta.model.boxes import box_logits
from deta.model.transformer import (
    BoxHead,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    Levels,
)

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
CASES = [
    (path, name)
    for path in sorted((SHARED / "parity").glob("*/functions/functions*.safetensors"))
    for name in sorted({key.split(".")[0] for key in load_file(path)})
    if name.startswith("geom")
]


@pytest.mark.parametrize(
    ("path", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES]
)
def test_parity_of_valid_ratios_and_encoder_reference_points(path: Path, name: str, compare):
    case = {key.removeprefix(f"{name}."): value for key, value in load_file(path).items()}
    num_levels = len(case["spatial_shapes"])
    levels = Levels.of([case[f"mask{level}"] for level in range(num_levels)])

    assert levels.shapes == [tuple(shape) for shape in case["spatial_shapes"].tolist()]
    assert torch.equal(levels.padding, case["mask_flat"])
    assert torch.equal(levels.index, case["level_ids"])
    compare("functions", "valid ratios", levels.valid_ratio, case["valid_ratios"], 1e-6)

    centres = torch.empty(0)

    class Probe(nn.Module):
        """Replaces an encoder layer and records its reference points."""

        def forward(self, memory, position, seen, levels):
            nonlocal centres
            centres = seen
            return memory

    encoder = Encoder([])
    encoder.layers.append(Probe())
    encoder(case["memory"], case["memory"], levels)
    expected = case["encoder_reference_points"]
    compare("functions", "encoder reference points", centres, expected, 1e-6)


def make_levels(valid=((4, 6), (2, 3)), padded=((5, 7), (3, 4))) -> Levels:
    """Return two levels of one image, each valid in its top left corner."""
    paddings = []
    for (rows, columns), (height, width) in zip(valid, padded, strict=True):
        padding = torch.ones(1, height, width, dtype=torch.bool)
        padding[:, :rows, :columns] = False
        paddings.append(padding)
    return Levels.of(paddings)


def make_decoder(num_layers: int = 3) -> tuple[Decoder, nn.ModuleList, dict]:
    torch.manual_seed(0)
    levels = make_levels()
    decoder = Decoder([DecoderLayer(16, 2, 2, 2, 32, 0.0) for _ in range(num_layers)], 1e-5)
    heads = nn.ModuleList(BoxHead(16) for _ in range(num_layers + 1))
    for head in heads:
        nn.init.normal_(head.mlp[-1].weight, std=0.2)
    arguments = {
        "queries": torch.randn(1, 6, 16),
        "query_position": torch.randn(1, 6, 16),
        "proposals": torch.rand(1, 6, 4) * 0.5 + 0.2,
        "memory": torch.randn(1, 47, 16),
        "levels": levels,
        "box_heads": heads,
    }
    return decoder, heads, arguments


def test_levels_by_hand():
    levels = make_levels()
    assert levels.shapes == [(5, 7), (3, 4)]
    assert torch.equal(levels.valid_size, torch.tensor([[[6.0, 4.0], [3.0, 2.0]]]))
    torch.testing.assert_close(levels.valid_ratio, torch.tensor([[[6 / 7, 4 / 5], [3 / 4, 2 / 3]]]))
    centres = levels.pixel_centres()[0]
    torch.testing.assert_close(centres[0], torch.tensor([0.5 / 6, 0.5 / 4]))
    torch.testing.assert_close(centres[7 + 2], torch.tensor([2.5 / 6, 1.5 / 4]))
    torch.testing.assert_close(centres[35 + 4 + 1], torch.tensor([1.5 / 3, 1.5 / 2]))


def test_the_order_of_decoder_queries_does_not_matter():
    decoder, _, arguments = make_decoder()
    queries, boxes = decoder(**arguments)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {key: arguments[key][:, order] for key in ("queries", "query_position", "proposals")}
    shuffled_queries, shuffled_boxes = decoder(**arguments | shuffled)
    for layer in range(3):
        torch.testing.assert_close(shuffled_queries[layer], queries[layer][:, order])
        torch.testing.assert_close(shuffled_boxes[layer], boxes[layer][:, order])


def test_each_layer_corrects_the_boxes_of_the_one_before():
    decoder, heads, arguments = make_decoder()
    queries, boxes = decoder(**arguments)
    reference = arguments["proposals"]
    for layer in range(3):
        expected = (heads[layer].mlp(queries[layer]) + box_logits(reference, 1e-5)).sigmoid()
        torch.testing.assert_close(boxes[layer], expected)
        reference = boxes[layer]


def test_a_box_trains_its_own_head_only():
    decoder, heads, arguments = make_decoder()
    _, boxes = decoder(**arguments)
    boxes[1].sum().backward()
    trained = [head.mlp[-1].weight.grad is not None for head in heads]
    assert trained == [False, True, False, False]


def test_memory_under_the_padding_affects_no_query_and_no_pixel():
    decoder, _, arguments = make_decoder()
    levels = arguments["levels"]
    junk = arguments["memory"].masked_fill(levels.padding[..., None], 1e4)
    expected, _ = decoder(**arguments)
    found, _ = decoder(**arguments | {"memory": junk})
    assert torch.equal(found[-1], expected[-1])

    encoder = Encoder([EncoderLayer(16, 2, 2, 2, 32, 0.0) for _ in range(2)])
    position = torch.randn(1, 47, 16)
    inside = ~levels.padding[0]
    expected = encoder(arguments["memory"], position, levels)[0, inside]
    assert torch.equal(encoder(junk, position, levels)[0, inside], expected)


def test_a_new_box_head_does_not_change_the_reference():
    boxes = torch.rand(2, 3, 4)
    head = BoxHead(8)
    torch.testing.assert_close(head(torch.randn(2, 3, 8), box_logits(boxes, 1e-5)).sigmoid(), boxes)


def test_dropout_is_active_in_training_only():
    torch.manual_seed(0)
    ffn = FeedForward(8, 16, dropout=0.5)
    x = torch.randn(4, 8)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))
