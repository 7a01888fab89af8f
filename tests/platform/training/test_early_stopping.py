"""Early stopping ends a run at the same step, resumed or not; frozen parts stay the same."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deta.model.architectures import make_detector
from deta.model.config import BackboneConfig, ModelConfig
from deta.platform.checkpoint.format import read_checkpoint
from deta.platform.checkpoint.local import all_checkpoints, best_checkpoint, newest_checkpoint
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.evaluation.evaluate_model import EvaluationResult
from deta.platform.launch.resume_check import refuse_if_finished
from deta.platform.learning.distributed import Worker
from deta.platform.learning.schedule import OptimConfig, ScheduleConfig
from deta.platform.run.config import ClusterConfig, DataConfig, RunConfig, override
from deta.platform.run.journal import read_events
from deta.platform.run.run import Run
from deta.platform.run.run_file import RunExistsError
from deta.platform.run.run_state import RunState
from deta.platform.training import loop as training
from deta.platform.training.loop import train


@pytest.mark.parametrize(
    ("key", "value"), [("schedule.patience", "0"), ("schedule.min_delta", "-1")]
)
def test_an_invalid_patience_is_refused_by_name(key: str, value: str):
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        override(RunConfig(), {key: value})


TINY_MODEL = ModelConfig(
    backbone=BackboneConfig(
        name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
    ),
    num_classes=5,
    num_levels=4,
    dim=16,
    num_heads=2,
    num_points=1,
    encoder_layers=1,
    decoder_layers=1,
    ffn_dim=16,
    num_queries=10,
)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[CocoDataset, CocoDataset]:
    drawn = write_shapes(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=2, size_px=48)
    return (
        CocoDataset.open(drawn.train_images, drawn.train_annotations),
        CocoDataset.open(drawn.val_images, drawn.val_annotations),
    )


def make_run(datasets: tuple[CocoDataset, CocoDataset], folder: Path, **changes: Any) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        model=TINY_MODEL,
        data=DataConfig(
            loader_workers=0,
            augmentation=AugmentationConfig(short_edges=(48,), max_long_edge=64, crop=False),
            evaluation_size=EvaluationSize(short_edge=48, max_long_edge=64),
        ),
        optim=OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(epochs=8, lr_drop_epochs=(), patience=2, min_delta=0.5),
        cluster=ClusterConfig(num_workers=1, gpu=False, cpus_per_worker=1),
        total_batch_size=4,
        micro_batch_size=2,
        log_every_steps=1,
        num_pictures=0,
    )
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    return Run(override(config, flat), folder, *datasets)


# After each epoch of two steps. The third is the best; the fifth is the second without a gain.
APS = [10.0, 20.0, 30.0, 30.4, 29.0, 90.0, 91.0, 92.0]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make evaluations return the APs above by step, without running the model."""

    class Metrics:
        def __init__(self, ap: float) -> None:
            self.ap, self.ap_per_category = ap, {}

        def percent(self) -> dict[str, float]:
            return {"AP": self.ap}

        def table(self, categories: object) -> str:
            return f"AP {self.ap}"

    def evaluate_and_save(self: Any) -> dict[str, float]:
        ap = APS[self.state.step // 2 - 1]

        def evaluation(*_: object, **__: object) -> Any:
            return EvaluationResult(Metrics(ap), [])  # type: ignore[arg-type]

        monkeypatch.setattr(training, "evaluate_model", evaluation)
        return real(self)

    real = training._Loop._evaluate_and_save
    monkeypatch.setattr(training._Loop, "_evaluate_and_save", evaluate_and_save)


def test_a_run_stops_when_patience_ends_and_keeps_its_best(datasets, tmp_path: Path, scripted):
    run = make_run(datasets, tmp_path)
    metrics = train(run, Worker())
    assert metrics["AP"] == 29.0
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert newest.state.step == 10  # of 16
    assert newest.state.ap_history == APS[:5]
    best = best_checkpoint(run.checkpoints)
    assert best is not None
    # The best on disk is by AP alone: 30.4 is more than 30, though no gain that patience counts.
    assert read_checkpoint(best).state.metrics["AP"] == 30.4
    assert len(all_checkpoints(run.checkpoints)) == 2  # the newest two, the best among them
    events = [event for event, _ in read_events(run.folder)]
    assert events[-1]["kind"] == "end"
    assert events[-1]["step"] == 10
    assert "stopped early after step 10 of 16" in events[-1]["reason"]
    assert "stopped early" in run.reason_to_stop(newest.state)
    with pytest.raises(RunExistsError, match="stopped early"):
        refuse_if_finished(run)  # what `--resume` says


@pytest.mark.parametrize("stops_after_epochs", [2, 4])
def test_a_resumed_run_stops_at_the_same_step(
    datasets, tmp_path: Path, scripted, stops_after_epochs: int
):
    whole = make_run(datasets, tmp_path / "whole")
    train(whole, Worker())
    parts = make_run(datasets, tmp_path / "parts")
    train(
        replace(parts, config=override(parts.config, {"schedule.epochs": stops_after_epochs})),
        Worker(),
    )
    train(parts, Worker())
    one, other = (newest_checkpoint(run.checkpoints) for run in (whole, parts))
    assert one is not None
    assert other is not None
    assert replace(one.state, useful_s=0) == replace(other.state, useful_s=0)
    assert all(torch.equal(t, other.model_state()[name]) for name, t in one.model_state().items())


def test_a_stopped_run_that_is_started_again_makes_no_step(datasets, tmp_path: Path, scripted):
    run = make_run(datasets, tmp_path)
    train(run, Worker())
    count = sum(event["kind"] == "progress" for event, _ in read_events(run.folder))
    train(run, Worker())
    events = [event for event, _ in read_events(run.folder)]
    assert sum(event["kind"] == "progress" for event in events) == count
    assert "stopped early" in events[-1]["reason"]


def test_a_damaged_last_checkpoint_is_evaluated_again_and_counts_once(
    datasets, tmp_path: Path, scripted
):
    run = make_run(datasets, tmp_path)
    train(run, Worker())
    newest = all_checkpoints(run.checkpoints)[-1]
    (newest / "model.safetensors").write_bytes(b"")
    train(run, Worker())
    again = newest_checkpoint(run.checkpoints)
    assert again is not None
    assert again.state.ap_history == APS[:5]
    assert again.state.step == 10


def test_with_more_patience_a_stopped_run_continues(datasets, tmp_path: Path, scripted):
    run = make_run(datasets, tmp_path)
    train(run, Worker())
    patient = replace(run, config=override(run.config, {"schedule.patience": "none"}))
    refuse_if_finished(patient)
    train(patient, Worker())
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert newest.state.ap_history == APS


def test_a_run_that_reached_its_end_was_not_stopped(datasets, tmp_path: Path, scripted):
    run = make_run(datasets, tmp_path, schedule__epochs=5)
    train(run, Worker())
    last = [event for event, _ in read_events(run.folder)][-1]
    assert (last["step"], last["reason"]) == (10, "")


def test_a_validation_set_without_boxes_never_stops_a_run(datasets, tmp_path: Path):
    schedule = ScheduleConfig(patience=1)
    state = RunState(step=4, samples_seen=16, epoch=2.0, ap_history=[])
    run = make_run(datasets, tmp_path)
    run = replace(run, config=replace(run.config, schedule=schedule))
    assert run.reason_to_stop(state) == ""


def test_a_checkpoint_from_before_early_stopping_is_read(datasets, tmp_path: Path, scripted):
    run = make_run(datasets, tmp_path, schedule__epochs=1)
    train(run, Worker())
    (path,) = all_checkpoints(run.checkpoints)
    content = json.loads((path / "state.json").read_text())
    del content["ap_history"]
    assert RunState(**{k: v for k, v in content.items() if k != "categories"}).ap_history == []


FROZEN_WORKER = """
import pickle, sys
import torch, torch.distributed as dist
from deta.platform.learning.distributed import Worker
from deta.platform.training.loop import train

rank, port, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
)
with open(file, "rb") as pickled:
    train(pickle.load(pickled), Worker(rank, 2))
dist.destroy_process_group()
"""


def test_two_workers_train_only_what_is_not_frozen(datasets, tmp_path: Path):
    import pickle

    run = make_run(
        datasets,
        tmp_path,
        optim__freeze=("backbone", "encoder"),
        schedule__epochs=1,
        cluster__num_workers=2,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = tmp_path / "run.pickle"
    file.write_bytes(pickle.dumps(run))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", FROZEN_WORKER, str(rank), str(port), str(file)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=200)
        assert worker.returncode == 0, errors
    newest = newest_checkpoint(run.checkpoints)
    assert newest is not None
    torch.manual_seed(run.config.seed)
    start = make_detector(run.config.model).state_dict()
    for name, tensor in newest.model_state().items():
        if name.startswith(("pyramid.backbone", "encoder")):
            assert torch.equal(tensor, start[name]), name
    trained = [name for name, t in newest.model_state().items() if not torch.equal(t, start[name])]
    assert any(name.startswith("decoder") for name in trained)
    assert any(name.startswith("class_heads") for name in trained)
    resting = [name for name in newest.training_state() if "/pyramid.backbone" in name]
    assert not resting  # no moments of what does not train
