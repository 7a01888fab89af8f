"""The attention module against published numbers, and its initial sampling offsets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deta.model.attention import MultiScaleDeformableAttention

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[2] / "../shared")
).resolve()
CASES = [
    (path, name)
    for path in sorted((SHARED / "parity").glob("*/functions/functions*.safetensors"))
    for name in sorted({key.split(".")[0] for key in load_file(path)})
    if name.startswith("msda")
]
OUR_NAMES = {"value_proj": "value_projection", "output_proj": "output_projection"}


@pytest.mark.parametrize(
    ("path", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES]
)
def test_parity_of_attention(path: Path, name: str, compare):
    case = {
        key.removeprefix(f"{name}."): value
        for key, value in load_file(path).items()
        if key.startswith(f"{name}.")
    }
    meta = json.loads(path.with_suffix(".json").read_text())["meta"][name]
    attention = MultiScaleDeformableAttention(
        meta["d_model"], meta["heads"], meta["levels"], meta["points"]
    )
    compare(
        "functions",
        "first sampling offsets",
        attention.sampling_offsets.bias,
        case["default_init.sampling_offsets.bias"],
        1e-6,
    )
    weights = {}
    for key, value in case.items():
        if key.startswith("weights."):
            layer, kind = key.removeprefix("weights.").split(".")
            weights[f"{OUR_NAMES.get(layer, layer)}.{kind}"] = value
    attention.load_state_dict(weights)

    found = attention(
        case["query"],
        case["reference_points"],
        case["input"],
        [tuple(shape) for shape in case["spatial_shapes"].tolist()],
        case["padding_mask"],
    )
    compare("functions", "attention", found, case["output"], 1e-5)


def make_attention(**changes) -> tuple[MultiScaleDeformableAttention, dict]:
    torch.manual_seed(0)
    attention = MultiScaleDeformableAttention(16, num_heads=2, num_levels=2, num_points=3)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(attention.attention_weights.weight)
    shapes = [(4, 6), (2, 3)]
    padding = torch.zeros(1, 30, dtype=torch.bool)
    padding[:, [4, 5, 10, 11, 26]] = True
    arguments = {
        "queries": torch.randn(1, 5, 16),
        "references": torch.rand(1, 5, 2, 4),
        "memory": torch.randn(1, 30, 16),
        "shapes": shapes,
        "padding": padding,
    }
    return attention, arguments | changes


def test_memory_under_the_padding_is_never_read():
    attention, arguments = make_attention()
    expected = attention(**arguments)
    junk = arguments["memory"].masked_fill(arguments["padding"][..., None], 1e6)
    assert torch.equal(attention(**arguments | {"memory": junk}), expected)


def test_queries_do_not_depend_on_each_other():
    attention, arguments = make_attention()
    together = attention(**arguments)
    alone = attention(
        **arguments
        | {"queries": arguments["queries"][:, 2:3], "references": arguments["references"][:, 2:3]}
    )
    torch.testing.assert_close(together[:, 2:3], alone)


def test_initially_each_head_samples_in_its_own_direction_further_with_each_point():
    attention = MultiScaleDeformableAttention(32, num_heads=4, num_levels=3, num_points=2)
    offsets = attention.sampling_offsets.bias.detach().view(4, 3, 2, 2)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for point in range(2):
        expected = (point + 1) * directions[:, None].expand(4, 3, 2)
        torch.testing.assert_close(offsets[:, :, point], expected, atol=1e-6, rtol=0)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="dim=10 cannot be divided among 3"):
        MultiScaleDeformableAttention(10, num_heads=3, num_levels=1, num_points=1)
