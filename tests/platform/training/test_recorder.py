"""What the recorder writes can be resumed from, and only the newest recorder may write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deta.model.config import BackboneConfig, ModelConfig
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.learning.distributed import Worker
from deta.platform.run.config import ClusterConfig, RunConfig
from deta.platform.run.fence import FencedOffError
from deta.platform.run.journal import read_events
from deta.platform.run.run import Run
from deta.platform.run.run_state import RunState
from deta.platform.training.recorder import Recorder
from deta.platform.training.train_state import make_train_state


@pytest.fixture
def run(tmp_path: Path) -> Run:
    drawn = write_shapes(tmp_path / "data", num_train=4, num_val=2, size_px=64)
    backbone = BackboneConfig(
        name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
    )
    model = ModelConfig(
        backbone=backbone, num_classes=5, num_levels=4, dim=32, num_heads=4, num_points=2,
        encoder_layers=1, decoder_layers=1, ffn_dim=32, num_queries=20,
    )  # fmt: skip
    config = replace(
        RunConfig(), model=model, ema_decay=0.9, cluster=ClusterConfig(num_workers=1, gpu=False)
    )
    folder = tmp_path / "run"
    folder.mkdir()
    return Run(
        config,
        folder,
        CocoDataset.open(drawn.train_images, drawn.train_annotations),
        CocoDataset.open(drawn.val_images, drawn.val_annotations),
    )


def test_a_saved_state_is_restored_bit_for_bit(run: Run):
    recorder = Recorder(run, leads=True)
    train_state = make_train_state(run, Worker(), None)
    with torch.no_grad():
        for parameter in train_state.model.parameters():
            parameter.add_(0.125)
    assert train_state.ema is not None
    train_state.ema.update_parameters(train_state.model)
    recorder.save(train_state, RunState(step=3, samples_seen=12, epoch=0.5), wait=True)
    assert recorder.log_saves() == ""

    resumed = recorder.open_newest()

    assert resumed is not None
    assert resumed.state.step == 3
    restored = make_train_state(run, Worker(), resumed)
    for found, expected in (
        (restored.model.state_dict(), train_state.model.state_dict()),
        (restored.eval_model.state_dict(), train_state.eval_model.state_dict()),
        (restored.training_state(), train_state.training_state()),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [event["kind"] for event, _ in read_events(run.folder)] == ["checkpoint", "starting"]


def test_a_new_recorder_fences_off_the_earlier_one(run: Run):
    train_state = make_train_state(run, Worker(), None)
    earlier = Recorder(run, leads=True)
    Recorder(run, leads=True)
    earlier.save(train_state, RunState(step=1, samples_seen=4, epoch=0.1), wait=True)
    with pytest.raises(FencedOffError):
        earlier.log_saves()


def test_other_ranks_write_nothing(run: Run):
    recorder = Recorder(run, leads=False)
    recorder.log_event("end", step=1)
    train_state = make_train_state(run, Worker(), None)
    recorder.save(train_state, RunState(step=1, samples_seen=4, epoch=0.1), wait=True)
    recorder.close(timeout_s=1)
    assert not list(run.folder.iterdir())
