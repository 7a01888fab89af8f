"""S12: ten planted secrets, a real training with its run in MLflow, and a search for them."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from deta.model.config import BackboneConfig, ModelConfig
from deta.platform.data.image_sizes import AugmentationConfig, EvaluationSize
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.launch.prepare_run import prepare_run
from deta.platform.run.config import (
    ClusterConfig,
    DataConfig,
    RunConfig,
    ScheduleConfig,
    override,
    to_json,
)
from deta.platform.system.redaction import holds_secret

ROOT = Path(__file__).resolve().parents[2]
HUB_TOKEN = "hf_" + "Canary2" * 5
IN_ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "canary-1-of-the-object-store",
    "HF_TOKEN": HUB_TOKEN,
    "GITHUB_TOKEN": "ghp_" + "Canary3" * 5,
    "RAY_AUTH_TOKEN": "canary4" * 9,
    "MLFLOW_TRACKING_PASSWORD": "canary-5-of-mlflow",
    "https_proxy": "http://me:canary-6-of-the-proxy@127.0.0.1:9",
    "MY_API_KEY": "canary-7-of-mine",
}
IN_CONFIGURATION = {
    "checkpoint.store": "s3://AKIACANARY8CANARY8XX:canary-8@bucket/runs",
    "init_checkpoint": "https://me:canary-9@host.invalid/w.pth",
    "data.val_images": "s3://bucket/shards?secret_key=canary-10",
}
# The steps of a run in one process, without a cluster or supervisor.
TRAIN = """
import sys
from pathlib import Path
from deta.platform.launch.resume_check import open_run_folder
from deta.platform.run.config import RunConfig, from_json
from deta.platform.learning.distributed import Worker
from deta.platform.run.dataset_snapshot import write_dataset_snapshot
from deta.platform.launch.prepare_run import prepare_run
from deta.platform.run.run_file import describe_run, write_run_file
from deta.platform.training.loop import train

run = prepare_run(from_json(RunConfig, Path(sys.argv[1]).read_text()))
open_run_folder(run, resume=False)
write_run_file(run.folder, describe_run(run))
write_dataset_snapshot(run)
train(run, Worker())
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("canaries")
    drawn = write_shapes(folder / "data", num_train=8, num_val=4, size_px=64)
    return RunConfig(
        name="canaries",
        storage=str(folder / "runs"),
        model=ModelConfig(
            backbone=BackboneConfig(
                name="resnet10t", pretrained=False, norm="group", frozen_parts=(), width=0.25
            ),
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
            train_images=str(drawn.train_images),
            train_annotations=str(drawn.train_annotations),
            val_images=str(drawn.val_images),
            val_annotations=str(drawn.val_annotations),
            loader_workers=0,
            augmentation=AugmentationConfig(
                short_edges=(48,), max_long_edge=64, crop_pre_short_edges=(48,), crop_min=32,
                crop_max=48,
            ),
            evaluation_size=EvaluationSize(short_edge=64, max_long_edge=96),
        ),
        schedule=ScheduleConfig(epochs=1, lr_drop_epochs=()),
        cluster=ClusterConfig(num_workers=1, gpu=False, cpus_per_worker=1),
        total_batch_size=4,
        log_every_steps=1,
        num_pictures=2,
    )  # fmt: skip


def test_there_are_ten_of_them():
    assert len(IN_ENVIRONMENT) + len(IN_CONFIGURATION) == 10


def test_no_secret_of_the_environment_is_found_after_a_training(config: RunConfig):
    place = Path(config.storage).parent
    (place / "config.json").write_text(to_json(config))
    uri = f"sqlite:///{place / 'mlflow.db'}"
    folder = Path(config.storage) / config.name
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
    env |= IN_ENVIRONMENT | {"MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    for command in (
        ["-c", TRAIN, "config.json"],
        ["-m", "deta.platform.tracking.sync_run", str(folder)],
    ):
        ran = subprocess.run(
            [sys.executable, *command],
            cwd=place,
            env=env | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=False,
        )
        (place / f"printed-by-{len(command)}").write_bytes(ran.stdout + ran.stderr)
        assert ran.returncode == 0, ran.stderr.decode()[-3000:]

    with sqlite3.connect(place / "mlflow.db") as database:
        (num_params,) = database.execute("select count(*) from params").fetchone()
        (num_metrics,) = database.execute("select count(*) from metrics").fetchone()
    assert num_params > 50
    assert num_metrics > 10
    files = [path for path in place.rglob("*") if path.is_file()]
    assert {"mlflow.db", "run.json", "journal.jsonl", "model.safetensors"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        found = [name for name, secret in IN_ENVIRONMENT.items() if secret.encode() in content]
        assert not found, f"{path} contains the secret of {found}"


@pytest.mark.parametrize("key", IN_CONFIGURATION)
def test_a_secret_in_the_configuration_is_refused_and_not_shown(config: RunConfig, key: str):
    config = override(config, {key: IN_CONFIGURATION[key], "name": "refused"})
    if key == "data.val_images":
        config = override(config, {"data.val_annotations": ""})
    with pytest.raises(ValueError, match="password") as caught:
        prepare_run(config)
    assert "canary" not in str(caught.value).lower()
    assert not (Path(config.storage) / "refused").exists()


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs?region=eu-west-1&endpoint_override=host:9000",
        "/data/Team-A1/My_Images-2024/0a1b2c3d4e5f60718293a4b5c6d7e8f9/train2017",
        "https://host/w.pth#sha256=" + "a1" * 32,
        "s3://me@bucket/runs",
        "runs/keys/token-classification/secret=santa",
        "~/passwords/coco",
    ],
)
def test_a_text_without_a_secret_is_not_refused(text: str):
    assert not holds_secret(text)
