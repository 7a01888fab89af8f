"""Test `weight_files.py`: it reads weights, refuses other files, and never runs code from them."""

from __future__ import annotations

import argparse
import os
import stat

import pytest
import torch
from safetensors.torch import load_file

from deta.platform.system import atomic_write
from deta.platform.weights.weight_files import read_metadata, read_weights, write_weights


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype
        assert not found[name].requires_grad


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.95])
def test_a_truncated_bad_file_is_refused(tmp_path, state, suffix, share):
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"part{suffix}"
    if suffix == ".pth":
        torch.save(state, whole)
    else:
        write_weights(whole, state)
    content = whole.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    with pytest.raises(ValueError, match=rf"{path}: .*(copy|download)"):
        read_weights(path)


def test_a_folder_a_missing_file_and_other_bad_files_are_refused(tmp_path, state):
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path / "absent.pth")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    with pytest.raises(ValueError, match="a folder"):
        read_weights(folder)
    with pytest.raises(ValueError, match="a folder"):
        read_metadata(folder)
    text = tmp_path / "notes.txt"
    text.write_text("weights are elsewhere")
    with pytest.raises(ValueError, match=r"files of weights end in \.safetensors"):
        read_weights(text)
    with pytest.raises(ValueError, match=r"not written by torch\.save"):
        read_weights(text.rename(tmp_path / "notes.pth"))
    with pytest.raises(ValueError, match="end the name in \.safetensors"):
        write_weights(tmp_path / "weights.pth", state)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"model": {"a": torch.zeros(2), "b": 3}}, r"1 of 2 entries are not tensors \(b\)"),
        ({"epoch": 3}, r"1 of 1 entries are not tensors \(epoch\)"),
        ({"model": {}}, "no named weights"),
        ({"ema": {"shadow_params": [torch.zeros(2)]}}, "1 of 1 entries are not tensors"),
        (torch.zeros(2), "contains Tensor and no named weights"),
        ([torch.zeros(2)], "contains list and no named weights"),
    ],
)
def test_a_bad_file_of_other_things_than_tensors_is_refused(tmp_path, content, reason):
    path = tmp_path / "weights.pth"
    torch.save(content, path)

    with pytest.raises(ValueError, match=reason):
        read_weights(path)


def test_an_official_checkpoint_is_read(tmp_path, state):
    """With all that the official training code puts beside the weights."""
    parameter = torch.nn.Parameter(state["conv.weight"])
    optimizer = torch.optim.AdamW([parameter], lr=1e-4)
    parameter.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    path = tmp_path / "checkpoint.pth"
    torch.save(
        {
            "model": state,
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "epoch": 11,
            "args": argparse.Namespace(lr=2e-4, num_queries=900, resume="", device="cuda"),
        },
        path,
    )

    assert_same(read_weights(path), state)


@pytest.mark.parametrize("use_zip", [True, False])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize(
    "wrappers", [(), ("model",), ("state_dict",), ("model_state_dict",), ("ema", "state_dict")]
)
def test_weights_are_found_under_wrappers_and_prefixes(tmp_path, state, wrappers, prefix, use_zip):
    content: dict = {prefix + name: torch.nn.Parameter(t, False) for name, t in state.items()}
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3}
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=use_zip)

    assert_same(read_weights(path), state)


def test_written_weights_and_metadata_are_read_back(tmp_path, state):
    path = tmp_path / "new" / "weights.safetensors"

    write_weights(path, state, {"config": "{}", "classes": "cat, dog"})

    assert_same(read_weights(path), state)
    assert read_metadata(path) == {"config": "{}", "classes": "cat, dog", "format": "pt"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_file_without_metadata_has_none(tmp_path, state):
    write_weights(tmp_path / "weights.safetensors", state)
    torch.save(state, tmp_path / "weights.pth")

    assert read_metadata(tmp_path / "weights.safetensors") == {"format": "pt"}
    assert read_metadata(tmp_path / "weights.pth") == {}


def test_tensors_that_share_memory_are_all_written(tmp_path):
    path = tmp_path / "weights.safetensors"
    fused = torch.arange(12.0).view(6, 2)
    query, key, value = fused.chunk(3)
    shared = {
        "copy": fused, "fused": fused, "q": query, "k": key, "v": value, "turned": fused.T,
        "one": torch.ones(()).expand(3, 2), "trained": torch.nn.Parameter(fused),
    }  # fmt: skip

    write_weights(path, shared)

    assert_same(load_file(path), {name: tensor.detach() for name, tensor in shared.items()})


def test_others_may_read_a_written_file_as_the_umask_says(tmp_path, state):
    path = tmp_path / "weights.safetensors"
    before = os.umask(0o027)
    try:
        write_weights(path, state)
    finally:
        os.umask(before)

    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, state, monkeypatch):
    path = tmp_path / "weights.safetensors"
    write_weights(path, state)

    def full_disk(path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic_write, "force_to_disk", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_weights(path, {"other": torch.zeros(3)})

    assert_same(read_weights(path), state)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
