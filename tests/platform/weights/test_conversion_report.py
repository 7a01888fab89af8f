"""Test `conversion_report.py` with `model_file.py`: conversions to and from published layouts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deta.jobs.recipes import find_variant
from deta.model import pretrained
from deta.platform.weights.conversion_report import compare_with_model, complete_state
from deta.platform.weights.model_file import identify

SHARED = Path(
    os.environ.get("DETA_SHARED", Path(__file__).resolve().parents[3] / "../shared")
).resolve()
LAYOUTS = ("official", "detrex", "huggingface")


def shared_tables() -> list:
    tables = {path.stem: json.loads(path.read_text()) for path in SHARED.glob("keys/*.json")}
    cases = [
        pytest.param(table, id=name)
        for name, table in sorted(tables.items())
        if isinstance(table, list) and "dtype" in table[0]
    ]
    return cases or [pytest.param(None, marks=pytest.mark.skip(f"no tables in {SHARED}/keys"))]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))


def random_tensors(table: list[dict], noise: Tensor) -> dict[str, Tensor]:
    """Of the shapes in a table of published names, each with its own values; copies are equal."""
    tensors: dict[str, Tensor] = {}
    for place, entry in enumerate(table):
        shape, name = entry["shape"], entry["name"]
        if name.endswith("relative_position_index"):
            tensors[name] = window_positions(int(shape[0] ** 0.5))
        elif entry["alias_of"] is not None:
            tensors[name] = tensors[entry["alias_of"]]
        else:
            count = int(torch.Size(shape).numel())
            tensors[name] = noise[place : place + count].view(shape)
    return tensors


def window_positions(window: int) -> Tensor:
    """Which row of the bias table lies between each two pixels of a window; P P."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


@pytest.mark.parametrize("table", shared_tables())
def test_parity_of_a_round_trip_of_every_published_table(table, noise):
    """100 % of the tensors, found without a word of the model, and back to the same bits."""
    published = random_tensors(table, noise)

    file = identify(Path("a.pth"), published, find_variant("deta_r50"))
    report = compare_with_model(file)
    ours = complete_state(file, report)
    back = pretrained.to_published(ours, file.config.model, file.layout)

    assert report.is_complete
    assert report.allowed_missing == report.allowed_unused == []
    sources = [name for names in report.used.values() for name in names]
    assert sorted([*sources, *report.computed]) == sorted(published)
    assert all(name.endswith("relative_position_index") for name in report.computed)
    assert_same(back, published)
    for layout in set(LAYOUTS) - {file.layout}:  # ours to the others and back
        exported = pretrained.to_published(ours, file.config.model, layout)
        again = identify(Path("a.pth"), exported, find_variant("deta_r50"))
        assert again.layout == layout
        assert_same(again.tensors, ours)
