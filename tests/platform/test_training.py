"""A whole training run on a tiny drawn data set: the same on one worker or two, resumed or not."""

from __future__ import annotations

import math
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deta.model.backbone import BackboneConfig
from deta.model.detector import ModelConfig
from deta.platform import checkpoint
from deta.platform.coco import CocoDataset
from deta.platform.config import ClusterConfig, DataConfig, RunConfig, override
from deta.platform.detect import Worker
from deta.platform.journal import read_events
from deta.platform.optim import OptimConfig, ScheduleConfig
from deta.platform.shapes import ShapesDataset, write_shapes
from deta.platform.run import Run
from deta.platform.training import train
from deta.platform.transforms import AugmentationConfig, EvaluationSize


def tiny_config() -> RunConfig:
    return RunConfig(
        name="tiny",
        model=ModelConfig(
            backbone=BackboneConfig(
                name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
            ),
            num_classes=5,
            num_levels=4,
            dim=32,
            num_heads=4,
            num_points=2,
            encoder_layers=1,
            decoder_layers=2,
            ffn_dim=32,
            num_queries=20,
        ),
        data=DataConfig(
            loader_workers=0,
            augmentation=AugmentationConfig(
                short_edges=(48, 64),
                max_long_edge=96,
                crop_pre_short_edges=(48, 64),
                crop_min=32,
                crop_max=64,
            ),
            evaluation_size=EvaluationSize(short_edge=64, max_long_edge=96),
        ),
        optim=OptimConfig(lr=1e-3, backbone_lr_factor=1.0, max_grad_norm=1.0),
        schedule=ScheduleConfig(epochs=5, lr_drop_epochs=(4.0,)),
        cluster=ClusterConfig(num_workers=1, gpu=False, cpus_per_worker=1),
        total_batch_size=4,
        micro_batch_size=2,
        log_every_steps=1,
        evaluate_every_epochs=5,
        num_pictures=2,
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=16, num_val=6, size_px=64)


def make_run(drawn: ShapesDataset, folder: Path, **changes: object) -> Run:
    folder.mkdir(exist_ok=True, parents=True)
    return Run(
        override(tiny_config(), {key.replace("__", "."): v for key, v in changes.items()}),
        folder,
        CocoDataset.open(drawn.train_images, drawn.train_annotations),
        CocoDataset.open(drawn.val_images, drawn.val_annotations),
    )


def losses_of(folder: Path) -> dict[int, float]:
    """By step; the last word on a step that was done twice."""
    return {
        event["step"]: event["metrics"]["train/loss"]
        for event, _ in read_events(folder)
        if event["kind"] == "progress"
    }


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    return newest.model_state()


WORKER = """
import pickle, sys
import torch, torch.distributed as dist
from deta.platform.detect import Worker
from deta.platform.training import train

rank, world_size, port, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
)
with open(file, "rb") as pickled:
    train(pickle.load(pickled), Worker(rank, world_size))
dist.destroy_process_group()
"""


def train_on(world_size: int, run: Run) -> None:
    """In processes of their own, without a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = run.folder / "run.pickle"
    file.write_bytes(pickle.dumps(run))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(world_size), str(port), str(file)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors


@pytest.fixture(scope="module")
def undisturbed(drawn: ShapesDataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """20 steps on one worker in this process."""
    run = make_run(drawn, tmp_path_factory.mktemp("undisturbed"))
    train(run, Worker())
    return run


def test_two_workers_learn_what_one_learns(drawn: ShapesDataset, undisturbed: Run, tmp_path: Path):
    run = make_run(drawn, tmp_path, cluster__num_workers=2)
    train_on(2, run)
    one, two = losses_of(undisturbed.folder), losses_of(run.folder)
    assert len(one) == 20
    assert one.keys() == two.keys()
    worst = max(abs(one[step] - two[step]) / abs(one[step]) for step in one)
    # Sums in another order; it grows from step to step as the weights drift apart.
    print(f"losses of one and of two workers differ by {worst:.1e} at most")
    assert worst <= 1e-5
    metrics = [checkpoint.newest_checkpoint(r.checkpoints) for r in (undisturbed, run)]
    assert metrics[0].state.metrics == pytest.approx(metrics[1].state.metrics, abs=0.1)


def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(
    drawn: ShapesDataset, undisturbed: Run, tmp_path: Path
):
    run = make_run(drawn, tmp_path, evaluate_every_epochs=2, num_pictures=0)
    stopped = replace(run, config=override(run.config, {"schedule.epochs": 4}))
    # Stop at step 16 as if a longer schedule had been cut: the rate drop is the same.
    train(stopped, Worker())
    train(run, Worker())
    assert losses_of(run.folder) == losses_of(undisturbed.folder)
    expected = weights_of(undisturbed.folder)
    found = weights_of(run.folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_averaged_run_resumes_bit_for_bit_too(drawn: ShapesDataset, tmp_path: Path):
    whole = make_run(drawn, tmp_path / "whole", ema_decay=0.9, num_pictures=0)
    train(whole, Worker())
    parts = make_run(drawn, tmp_path / "parts", ema_decay=0.9, num_pictures=0)
    train(replace(parts, config=override(parts.config, {"schedule.epochs": 4})), Worker())
    train(parts, Worker())
    expected, found = weights_of(whole.folder), weights_of(parts.folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = make_run(drawn, tmp_path / "plain", num_pictures=0)
    train(plain, Worker())
    assert any(not torch.equal(weights_of(plain.folder)[name], expected[name]) for name in expected)


def test_loader_workers_change_nothing(drawn: ShapesDataset, undisturbed: Run, tmp_path: Path):
    run = make_run(drawn, tmp_path, data__loader_workers=2, num_pictures=0)
    train(run, Worker())
    assert losses_of(run.folder) == losses_of(undisturbed.folder)


def test_a_run_leaves_what_it_promises(undisturbed: Run):
    events = [event for event, _ in read_events(undisturbed.folder)]
    kinds = [event["kind"] for event in events]
    assert kinds[:2] == ["starting", "begin"]
    assert kinds[-1] == "end"
    assert kinds.count("evaluation") == kinds.count("picture") == 1
    assert kinds.count("checkpoint") == 2  # before the evaluation, and with its result
    assert (undisturbed.folder / "pictures" / "validation-step-00000020.png").exists()
    newest = checkpoint.newest_checkpoint(undisturbed.checkpoints)
    assert newest.state.samples_seen == 80
    assert newest.state.epoch == 5
    assert newest.config == undisturbed.config
    assert [category.name for category in newest.categories] == [
        category.name for category in undisturbed.train_set.categories
    ]
    assert newest.state.data_fingerprint == undisturbed.train_set.fingerprint


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(
    drawn: ShapesDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(drawn, tmp_path, log_every_steps=4, num_pictures=0)
    bad_step = 6
    from deta.platform import loader

    def poisoned(sample):
        image, target = to_model_input(sample)
        key = (sample.image_id, poisoned.calls)
        poisoned.calls += 1
        if poisoned.calls == 4 * (bad_step - 1) + 2:
            poisoned.image_id = key[0]
            image = image * math.nan
        return image, target

    poisoned.calls = 0
    to_model_input = loader.to_model_input
    monkeypatch.setattr(loader, "to_model_input", poisoned)
    with pytest.raises(FloatingPointError, match=f"step {bad_step}: ") as error:
        train(run, Worker())
    assert str(poisoned.image_id) in str(error.value)
    assert checkpoint.newest_checkpoint(run.checkpoints) is None
