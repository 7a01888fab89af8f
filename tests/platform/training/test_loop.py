"""Complete training runs on a tiny synthetic data set: one or two workers, resumed or not."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import pickle
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deta.model.config import BackboneConfig, ModelConfig
from deta.platform.checkpoint import local as checkpoint
from deta.platform.data import data_loader as loader
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.evaluation.coco_metrics import evaluate_detections
from deta.platform.evaluation.evaluation_folder import read_evaluation
from deta.platform.learning.distributed import Worker
from deta.platform.learning.schedule import OptimConfig, ScheduleConfig
from deta.platform.run.config import ClusterConfig, DataConfig, RunConfig, override
from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run import Run
from deta.platform.training import recorder
from deta.platform.training.loop import train
from deta.platform.training.train_events import BrokenImagesError


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
    """Return the loss of each step; of a step that was repeated, the last one."""
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
from deta.platform.learning.distributed import Worker
from deta.platform.training.loop import train

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
    """Train in separate processes, without a cluster."""
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
    # What is logged is summed in another order; the weights are the same bits.
    print(f"losses of one and of two workers differ by {worst:.1e} at most")
    assert worst <= 1e-5
    expected, found = weights_of(undisturbed.folder), weights_of(run.folder)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    metrics = [checkpoint.newest_checkpoint(r.checkpoints) for r in (undisturbed, run)]
    assert metrics[0].state.metrics == pytest.approx(metrics[1].state.metrics, abs=0.1)


@pytest.mark.parametrize("exact_sum", [True, False])
def test_workers_agree_on_the_statistics_of_a_batch_norm(
    exact_sum: bool, drawn: ShapesDataset, tmp_path: Path
):
    run = make_run(
        drawn, tmp_path, cluster__num_workers=2, model__backbone__norm="batch",
        optim__exact_sum=exact_sum, compare_weights_every_steps=1,
    )  # fmt: skip
    train_on(2, run)  # a DriftError otherwise
    assert len(losses_of(run.folder)) == run.num_steps


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


def test_a_run_with_ema_resumes_bit_for_bit_too(drawn: ShapesDataset, tmp_path: Path):
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


def test_a_run_writes_its_events_checkpoints_and_images(undisturbed: Run):
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


def test_the_saved_evaluation_is_that_of_the_checkpoint(undisturbed: Run):
    newest = checkpoint.newest_checkpoint(undisturbed.checkpoints)
    kept = read_evaluation(undisturbed.folder / "evaluations" / newest.path.name)
    weights = (newest.path / "model.safetensors").read_bytes()
    assert kept.origin.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert kept.origin.data_fingerprint == undisturbed.val_set.fingerprint
    assert kept.metrics.percent() == newest.state.metrics
    assert kept.metrics == evaluate_detections(kept.ground_truth, kept.results)
    assert (kept.folder / "report.html").is_file()
    (events,) = [e for e, _ in read_events(undisturbed.folder) if e["kind"] == "evaluation"]
    assert {"val/error_missed", "val/explain_seconds"} <= events["metrics"].keys()


def poison(monkeypatch: pytest.MonkeyPatch, *bad_steps: int) -> dict[int, int]:
    """Make one image of each of these steps NaN; return a dict that fills with its id by step."""
    poisoned: dict[int, int] = {}
    count = itertools.count()

    def collate(inputs):
        loaded = real(inputs)
        step, place = divmod(next(count), 2)
        if step + 1 not in bad_steps or place == 1:
            return loaded
        poisoned[step + 1] = loaded.image_ids[1]
        batch = loaded.batch.to("cpu")  # normalised: 8 bits hold no NaN
        batch.images[1] = math.nan
        return replace(loaded, batch=batch)

    real = loader._collate
    monkeypatch.setattr(loader, "_collate", collate)
    return poisoned


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    drawn: ShapesDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poisoned = poison(monkeypatch, 3, 6)
    run = make_run(drawn, tmp_path, log_every_steps=4, num_pictures=0, ema_decay=0.5)
    train(run, Worker())
    skipped = [e for e, _ in read_events(run.folder) if e["kind"] == "skipped"]
    assert [(e["step"], e["in_a_row"], e["total"]) for e in skipped] == [(3, 1, 1), (6, 1, 2)]
    assert all(poisoned[e["step"]] in e["images"] and "loss" in e["not_finite"] for e in skipped)
    progress = [e for e, _ in read_events(run.folder) if e["kind"] == "progress"]
    assert [loss is None for e in progress for loss in e["losses"]] == [
        step in (3, 6) for step in range(1, 21)
    ]
    assert all(math.isfinite(e["metrics"]["train/loss"]) for e in progress)
    newest = checkpoint.newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert (newest.state.skipped_steps, newest.state.skipped_in_a_row) == (2, 0)
    assert all(tensor.isfinite().all() for tensor in newest.model_state().values())
    # Neither the optimizer nor the EMA has counted the skipped steps.
    state = newest.training_state()
    assert {int(t) for name, t in state.items() if name.startswith("optimizer/step/")} == {18}
    assert int(state["num_averaged"]) == 18


def test_too_many_in_a_row_stop_the_run_and_name_the_images(
    drawn: ShapesDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    poisoned = poison(monkeypatch, 5, 6, 7)
    run = make_run(drawn, tmp_path, max_skipped_steps=3, num_pictures=0)
    with pytest.raises(FloatingPointError, match=r"step 7: .* 3 steps in a row") as error:
        train(run, Worker())
    assert str(poisoned[7]) in str(error.value)
    dump = json.loads((run.folder / "not-finite-step-00000007.json").read_text())
    assert poisoned[7] in dump["workers"][0]["images"]
    assert checkpoint.newest_checkpoint(run.checkpoints) is None


def test_a_stopped_run_saves_and_resumes_with_the_same_bits(
    drawn: ShapesDataset, undisturbed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recorder, "POLL_STOP_FILE_EVERY_S", 0.0)
    run = make_run(drawn, tmp_path, num_pictures=0)
    stop = run.folder / recorder.STOP_FILE

    def write(self: Journal, kind: str, **values: object) -> None:
        real(self, kind, **values)
        if values.get("step") == 7:
            stop.touch()

    real = Journal.write
    monkeypatch.setattr(Journal, "write", write)
    assert train(run, Worker()) == {}
    newest = checkpoint.newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert newest.state.step == 7
    assert [e["kind"] for e, _ in read_events(run.folder)][-2:] == ["checkpoint", "stopping"]
    monkeypatch.undo()
    stop.unlink()
    train(run, Worker())
    assert losses_of(run.folder) == losses_of(undisturbed.folder)
    assert all(
        torch.equal(tensor, weights_of(undisturbed.folder)[name])
        for name, tensor in weights_of(run.folder).items()
    )
    begins = [e["step"] for e, _ in read_events(run.folder) if e["kind"] == "begin"]
    assert begins == [0, 7]


def test_broken_images_are_replaced_up_to_a_limit(drawn: ShapesDataset, tmp_path: Path):
    images = tmp_path / "images"
    shutil.copytree(drawn.train_images, images)
    run = make_run(drawn, tmp_path / "run", num_pictures=0)
    run = replace(run, train_set=CocoDataset.open(images, drawn.train_annotations))
    broken = sorted(images.iterdir())[:2]
    broken[0].write_bytes(broken[0].read_bytes()[:200])
    train(run, Worker())  # one is always tolerated
    events = [e for e, _ in read_events(run.folder) if e["kind"] == "replaced"]
    assert len(events) == 1
    assert broken[0].name in events[0]["images"][0]["reason"]
    newest = checkpoint.newest_checkpoint(run.checkpoints)
    assert newest is not None
    assert len(newest.state.broken_images) == 1

    again = replace(run, folder=tmp_path / "again")
    again.folder.mkdir()
    broken[1].write_bytes(b"")
    with pytest.raises(BrokenImagesError, match=broken[1].name):
        train(again, Worker())
