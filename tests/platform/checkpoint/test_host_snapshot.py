"""Copies of tensors in memory are written as files that safetensors reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from deta.platform.checkpoint.host_snapshot import DTYPES, copy_tensors, write_file


def example(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.empty(shape).numel() * dtype.itemsize
    raw = torch.tensor([i * 37 % 251 for i in range(size)], dtype=torch.uint8)
    if dtype == torch.bool:
        raw %= 2
    return raw.view(dtype).view(shape)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other)]
    return same and torch.equal(*flat)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_safetensors_loads_what_is_written(tmp_path_factory, kinds, order):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    names = [f'"ä{number}"' for number in range(len(kinds))]
    order.shuffle(names)
    tensors = {n: example(*kind) for n, kind in zip(names, kinds, strict=True)}
    written = write_file(path, copy_tensors(tensors).parts)
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.num_bytes == path.stat().st_size
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shared_and_strided_tensors_are_written_by_value(tmp_path: Path):
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "base": base, "transposed": base.T, "every second": base[:, ::2], "expanded":
        base[:1].expand(3, 6), "tied": base, "parameter": torch.nn.Parameter(base),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }  # fmt: skip
    write_file(tmp_path / "a.safetensors", copy_tensors(tensors).parts)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_an_unsupported_type_is_refused_with_the_name_of_the_tensor():
    with pytest.raises(ValueError, match=r"phase.*complex128"):
        copy_tensors({"phase": torch.zeros(1, dtype=torch.complex128)})
