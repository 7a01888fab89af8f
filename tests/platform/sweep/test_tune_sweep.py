"""Sweeps on a real Ray cluster, with a real MLflow store: small trials of a tiny model.

`tests/jobs/test_study_batch_lr.py` runs a study that is killed in the middle.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from optuna.distributions import CategoricalDistribution

from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.learning.distributed import Worker
from deta.platform.run.config import RunConfig, override
from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run import Run
from deta.platform.sweep.results import open_trials
from deta.platform.sweep.search_space import Sweep
from deta.platform.sweep.sweep_folder import describe_sweep, refuse_another
from deta.platform.sweep.trial_folder import MismatchError
from deta.platform.training.loop import train

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[3]
# Over the demo's; AP stays near nothing, which is all that is needed here.
TINY = [
    *("model.backbone.width=0.25", "model.dim=32", "model.num_heads=4", "model.ffn_dim=32"),
    *("model.encoder_layers=1", "model.decoder_layers=1", "model.num_queries=20"),
    *("data.augmentation.short_edges=48,64", "data.augmentation.max_long_edge=96"),
    *("data.evaluation_size.short_edge=64", "data.evaluation_size.max_long_edge=96"),
    *("data.train_first=16", "data.loader_workers=0", "log_every_steps=2", "num_pictures=0"),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=16, num_val=6, size_px=64)


def sweep_lr(drawn: ShapesDataset, storage: Path, *arguments: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "jobs" / "sweep_lr.py"), "--no-probe",
        "--train-images", str(drawn.train_images),
        "--train-annotations", str(drawn.train_annotations),
        "--val-images", str(drawn.val_images), "--val-annotations", str(drawn.val_annotations),
        "--storage", str(storage), *TINY, *arguments,
    ]  # fmt: skip


def tiny_sweep(drawn: ShapesDataset, storage: Path) -> tuple[Sweep, Run]:
    from deta.jobs.deta_r50 import demo

    changes: dict[str, object] = dict(text.split("=", 1) for text in TINY)
    changes |= {"storage": str(storage), "name": "tiny", "schedule.epochs": 1}
    changes |= {"cluster.num_workers": 1, "schedule.warmup_epochs": 0, "model.num_classes": 5}
    base = override(demo(), changes)
    run = Run(
        base,
        storage / "tiny",
        CocoDataset.open(drawn.train_images, drawn.train_annotations),
        CocoDataset.open(drawn.val_images, drawn.val_annotations),
    )
    return Sweep(base=base, space={"total_batch_size": CategoricalDistribution((4, 8))}), run


def test_asha_stops_trials_that_are_behind_and_says_so(
    drawn: ShapesDataset, ray_cluster, tmp_path: Path
):
    arguments = ("--trials", "4", "--name", "asha", "schedule.epochs=4", "max_skipped_steps=9")
    ran = subprocess.run(
        sweep_lr(drawn, tmp_path, *arguments),
        env=ray_cluster.env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    records = json.loads((tmp_path / "asha" / "trials.json").read_text())
    assert {record["status"] for record in records} <= {"finished", "stopped"}
    assert any(record["status"] == "finished" for record in records)
    for record in records:
        if record["status"] == "stopped":
            assert "upper 1/3" in record["reason"]
            assert record["curve"][-1][0] < 64  # samples of a whole trial
    assert (tmp_path / "asha" / "report.html").exists()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("deta").experiment_id])
    parents = [run for run in runs if run.data.tags.get("deta.kind") == "sweep"]
    assert len(parents) == 1
    children = [run for run in runs if run not in parents]
    assert len(children) == 4
    for child in children:
        assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert child.info.status == "FINISHED"
        assert child.data.tags["deta.verified"] == "true"
    stopped = {run.data.tags["deta.trial"] for run in children
               if run.data.tags.get("deta.stopped_by") == "asha"}  # fmt: skip
    assert len(stopped) == sum(record["status"] == "stopped" for record in records)


def test_a_trial_that_can_never_be_scheduled_is_refused_at_once(
    drawn: ShapesDataset, ray_cluster, tmp_path: Path
):
    refused = subprocess.run(
        sweep_lr(drawn, tmp_path, "--name", "large", "cluster.cpus_per_worker=400"),
        env=ray_cluster.env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "400 CPUs (it has 2)" in refused.stderr
    assert not (tmp_path / "large").exists()


def test_a_mistyped_key_touches_no_cluster(drawn: ShapesDataset, tmp_path: Path):
    refused = subprocess.run(
        sweep_lr(drawn, tmp_path, "optim.lrr=3"), capture_output=True, text=True, timeout=100
    )
    assert refused.returncode == 2
    assert "did you mean optim.lr" in refused.stderr


def test_a_trial_that_trained_with_other_parameters_is_an_error(
    drawn: ShapesDataset, tmp_path: Path
):
    sweep, run = tiny_sweep(drawn, tmp_path)
    first, second = open_trials(sweep, sweep.trials())
    # As if a toolkit had lost what the sampler chose: the second trains as the first.
    for trial, used in ((first, first.config), (second, first.config)):
        trial.folder.mkdir(parents=True)
        train(replace(run, config=used, folder=trial.folder), Worker())
        trial.write_end()
    assert first.verify()
    assert first.tags == {"deta.verified": "true"}
    with pytest.raises(MismatchError, match="total_batch_size is 4, not 8"):
        second.verify()


def test_a_folder_tells_what_became_of_a_trial(drawn: ShapesDataset, tmp_path: Path):
    sweep, _ = tiny_sweep(drawn, tmp_path)
    (trial, other) = open_trials(sweep, sweep.trials())
    assert (trial.status, trial.is_done) == ("waiting", False)
    trial.folder.mkdir(parents=True)
    journal = Journal(trial.folder)
    journal.write("starting", step=0)
    journal.write("begin", step=0, num_steps=4, world_size=1)
    trial.poll()
    assert trial.status == "running"
    trial.write_end(killed="stopped from outside")
    assert (trial.status, trial.ended, trial.is_done) == ("waiting", "KILLED", False)
    journal.write("starting", step=0)
    trial.poll()
    assert trial.status == "running"
    trial.write_end(failed="ValueError: no")
    assert (trial.status, trial.reason, trial.is_done) == ("failed", "ValueError: no", True)
    trial.write_end(failed="once is enough")
    kinds = [event["kind"] for event, _ in read_events(trial.folder)]
    assert kinds.count("ended") == 2
    record = trial.record()
    assert record.observation().failure == "failed: ValueError: no"
    assert not other.folder.exists()


def test_a_sweep_goes_on_only_as_the_same_or_with_more(drawn: ShapesDataset, tmp_path: Path):
    sweep, run = tiny_sweep(drawn, tmp_path)
    before = json.loads(json.dumps(describe_sweep(sweep, run, sweep.trials(), None)))

    def goes_on(other: Sweep, base: RunConfig | None = None) -> None:
        base = base or run.config
        other = other.with_base(base)
        now = describe_sweep(other, replace(run, config=base), other.trials(), before)
        refuse_another(run.folder, before, now)

    goes_on(sweep)
    goes_on(replace(sweep, space={"total_batch_size": CategoricalDistribution((4, 8, 16))}))
    goes_on(sweep, override(run.config, {"cluster.cpus_per_worker": 2}))
    with pytest.raises(ValueError, match=r"total_batch_size.: .one of 4, 8.* -> "):
        goes_on(replace(sweep, space={"total_batch_size": CategoricalDistribution((4, 16))}))
    with pytest.raises(ValueError, match=r"optim.lr: 0.0015 -> 0.002"):
        goes_on(sweep, override(run.config, {"optim.lr": 0.002}))
