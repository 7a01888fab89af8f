"""Checkpoints are whole or absent, and a damaged one is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deta.platform.checkpoint import (
    CheckpointError,
    RunState,
    all_checkpoints,
    best_checkpoint,
    keep_newest_and_best,
    load_optimizer_state,
    newest_checkpoint,
    optimizer_state,
    read_checkpoint,
    write_checkpoint,
)
from deta.platform.coco import Category
from deta.platform.config import RunConfig, override

CATEGORIES = (Category(1, "disc"), Category(90, "Zahnbürste"))


def write(folder: Path, step: int, ap: float | None = None) -> Path:
    return write_checkpoint(
        folder,
        model_state={"weight": torch.full((3,), float(step)), "count": torch.tensor(step)},
        training_state={"optimizer/exp_avg/weight": torch.arange(3.0)},
        state=RunState(
            step=step,
            samples_seen=16 * step,
            epoch=step / 10,
            metrics={} if ap is None else {"AP": ap},
            best_ap=ap,
            data_fingerprint="f",
        ),
        config=override(RunConfig(), {"optim.lr": 1e-5}),
        categories=CATEGORIES,
    )


def test_what_is_written_is_read(tmp_path: Path):
    found = read_checkpoint(write(tmp_path, 7, ap=12.5))
    assert found.state.step == 7
    assert found.state.samples_seen == 112
    assert found.state.metrics == {"AP": 12.5}
    assert found.config.optim.lr == 1e-5
    assert found.categories == CATEGORIES
    assert torch.equal(found.model_state()["weight"], torch.full((3,), 7.0))
    assert found.model_state()["count"] == 7
    assert torch.equal(found.training_state()["optimizer/exp_avg/weight"], torch.arange(3.0))


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors", "state.json"])
def test_one_flipped_bit_is_found(tmp_path: Path, name: str):
    path = write(tmp_path, 1)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.json", "config.json", "MANIFEST.json"]
)
def test_a_file_cut_short_or_gone_is_found(tmp_path: Path, name: str):
    path = write(tmp_path, 1)
    (path / name).write_bytes((path / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError):
        read_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_the_newest_whole_one_is_taken_and_a_damaged_one_set_aside(tmp_path: Path):
    write(tmp_path, 1)
    good = write(tmp_path, 2)
    damaged = write(tmp_path, 3)
    (damaged / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path).path == good
    assert not damaged.exists()
    assert (tmp_path / f"damaged-{damaged.name}").exists()
    assert newest_checkpoint(tmp_path).path == good


def test_a_save_that_was_interrupted_is_not_seen_and_is_cleaned_up(tmp_path: Path):
    write(tmp_path, 1)
    leftover = tmp_path / ".step-00000002.unfinished"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path).state.step == 1
    keep_newest_and_best(tmp_path)
    assert not leftover.exists()


def test_newest_and_best_are_kept(tmp_path: Path):
    for step, ap in ((1, 10.0), (2, 30.0), (3, 20.0), (4, 25.0)):
        write(tmp_path, step, ap)
        keep_newest_and_best(tmp_path)
    assert [path.name for path in all_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    assert best_checkpoint(tmp_path).name == "step-00000002"


def test_an_empty_folder_has_none(tmp_path: Path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    assert best_checkpoint(tmp_path) is None


def test_a_newer_format_is_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, 1)
    monkeypatch.setattr("deta.platform.checkpoint.FORMAT_VERSION", 0)
    with pytest.raises(CheckpointError, match="format 1"):
        read_checkpoint(path)
    assert json.loads((path / "state.json").read_text())["format_version"] == 1


def test_optimizer_state_survives_another_order_of_parameters():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 1)})
    optimizer = torch.optim.AdamW(model.parameters())
    model["b"](model["a"](torch.ones(1, 2))).sum().backward()
    optimizer.step()
    tensors = optimizer_state(optimizer, model)

    other = torch.nn.ModuleDict({"b": torch.nn.Linear(2, 1), "a": torch.nn.Linear(2, 2)})
    restored = torch.optim.AdamW(other.parameters())
    load_optimizer_state(restored, other, tensors)
    again = optimizer_state(restored, other)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
