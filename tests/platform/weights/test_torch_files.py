"""Test `torch_files.py` with `restricted_unpickler.py` on files of torch.save and pickle.dump."""

from __future__ import annotations

import argparse
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deta.platform.weights.torch_files import read_pickled_weights
from deta.platform.weights.weight_files import read_weights

TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def every_tensor() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        str(dtype): (10 * torch.randn(3, 4, 5, generator=generator)).to(dtype) for dtype in TYPES
    }
    fused = torch.randn(6, 4, generator=generator)
    return state | {
        "scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "turned": fused.T,
        "slice": fused[2:5, 1:], "whole": fused, "trained": torch.nn.Parameter(fused[0].clone()),
    }  # fmt: skip


def everything(content: object) -> dict[str, object]:
    assert isinstance(content, dict)
    return content["model"]


@pytest.mark.parametrize("use_zip", [True, False])
def test_tensors_of_every_type_and_layout_are_as_torch_reads_them(tmp_path, use_zip):
    state = every_tensor()
    path = tmp_path / "checkpoint.pth"
    content = {
        "model": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": 7}}, "param_groups": []},
        "milestones": Counter([2, 3]),
        "args": argparse.Namespace(
            output=Path("/a"), device=torch.device("cpu"), best=np.float64(3)
        ),
    }
    torch.save(content, path, _use_new_zipfile_serialization=use_zip)

    found = read_pickled_weights(path, everything)

    by_torch = torch.load(path, weights_only=False)["model"]
    assert list(found) == list(state)
    for name, tensor in by_torch.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].stride() == tensor.stride(), name
        assert torch.equal(found[name], tensor), name
    assert found["slice"].untyped_storage().data_ptr() == found["whole"].data_ptr()


def test_only_the_weights_are_read(tmp_path):
    """A checkpoint whose optimizer is damaged still gives its weights."""
    path = tmp_path / "checkpoint.pth"
    moments = torch.arange(1000.0)
    torch.save({"model": {"a": torch.ones(3)}, "optimizer": {"moments": moments}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(moments.numpy().tobytes()) + 99] ^= 1
    path.write_bytes(content)

    assert torch.equal(read_weights(path)["a"], torch.ones(3))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_numpy_arrays_are_read_in_every_protocol(tmp_path, protocol, order):
    generator = np.random.default_rng(0)
    arrays = {
        code: np.asarray(9 * generator.normal(size=(3, 4)), dtype=code, order=order)
        for code in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")
    }
    arrays |= {"scalar": np.ones((), "f4"), "empty": np.zeros((0, 2), "f4")}
    path = tmp_path / "R-50.pkl"
    path.write_bytes(
        pickle.dumps({"model": arrays, "__author__": "torchvision", "n": np.int64(3)}, protocol)
    )

    found = read_weights(path)

    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(found[name].numpy(), array), name
        assert found[name].numpy().dtype == array.dtype


@pytest.mark.parametrize("dtype", ["O", "U3", "f4,f4", "c8", ">f4", "M8[s]"])
def test_arrays_of_other_bad_types_are_refused(tmp_path, dtype):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"a": np.zeros(2, dtype)}))

    with pytest.raises(ValueError, match=r"a\.pkl: (damaged|refused)"):
        read_weights(path)


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Any changed byte of a zip is noticed, or changes no tensor; nothing crashes or hangs."""
    path = tmp_path / "a.pth"
    state = {"a": torch.arange(64.0), "b": torch.ones(3)}
    torch.save({"model": state, "epoch": 3}, path)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for place in generator.integers(0, len(whole), 300):
        content = bytearray(whole)
        content[place] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(content)
        try:
            found = read_weights(path)
        except ValueError as error:
            refused += str(path) in str(error)
            continue
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)
    assert refused > 50
