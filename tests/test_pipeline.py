"""The complete flow on a tiny drawn data set, with a real Ray cluster and MLflow server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from deta.platform.checkpoint.format import read_checkpoint
from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.run.journal import read_events

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *("model.backbone.width=0.25", "model.dim=32", "model.num_heads=4", "model.ffn_dim=32"),
    *("model.encoder_layers=1", "model.decoder_layers=1", "model.num_queries=20"),
    *("data.augmentation.short_edges=48,64", "data.augmentation.max_long_edge=96"),
    *("data.evaluation_size.short_edge=64", "data.evaluation_size.max_long_edge=96"),
    *("total_batch_size=4", "micro_batch_size=2"),
    *("log_every_steps=2", "evaluate_every_epochs=1", "num_pictures=2"),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=16, num_val=20, size_px=64)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
         "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
         "--artifacts-destination", str(folder / "artifacts")],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=(folder / "log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def command(drawn: ShapesDataset, storage: Path, *arguments: str) -> list[str]:
    return [
        str(ROOT / "jobs" / "deta_r50.py"), "--variant", "demo",
        "--train-images", str(drawn.train_images),
        "--train-annotations", str(drawn.train_annotations),
        "--val-images", str(drawn.val_images), "--val-annotations", str(drawn.val_annotations),
        f"storage={storage}", *TINY, *arguments,
    ]  # fmt: skip


def only_run(uri: str, experiment: str) -> Run:
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len(found) == 1
    return found[0]


def test_a_submitted_job_trains_evaluates_and_is_tracked(
    drawn: ShapesDataset, mlflow_server: str, ray_cluster, tmp_path: Path
):
    arguments = command(
        drawn, tmp_path, "--name", "submitted", "experiment=submitted", "schedule.epochs=2"
    )
    arguments[0] = "jobs/deta_r50.py"
    submitted = subprocess.run(
        [str(Path(sys.executable).parent / "deta"), "submit", *arguments],
        cwd=ROOT,
        env=ray_cluster.env | {"MLFLOW_TRACKING_URI": mlflow_server},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "images/s" in submitted.stdout
    assert "best checkpoint" in submitted.stdout

    run = only_run(mlflow_server, "submitted")
    client = MlflowClient(mlflow_server)
    assert run.info.status == "FINISHED"
    assert run.data.params["total_batch_size"] == "4"
    assert run.data.params["cluster.num_workers"] == "2"
    assert run.data.params["model.backbone.width"] == "0.25"
    assert {
        "val/AP",
        "val/AP50",
        "AP_of_class/disc",
        "train/loss",
        "train/lr",
        "best/AP",
        "best/AP_low",
        "best/AP_high",
    } <= set(run.data.metrics)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [
        2,
        4,
        6,
        8,
    ]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/AP")] == [4, 8]
    assert {i.tags[0].value for i in run.inputs.dataset_inputs} == {"training", "validation"}
    files = {f.path for d in ("pictures", "best_checkpoint", "") for f in
             client.list_artifacts(run.info.run_id, d)}  # fmt: skip
    assert "pictures/validation-step-00000008.png" in files
    assert "best_checkpoint/model.safetensors" in files
    assert "environment.json" in files
    # The commit is recorded although a job is submitted without the repository's history.
    if (ROOT / ".git").exists():
        assert run.data.tags["mlflow.source.git.commit"]
    written = read_checkpoint(tmp_path / "submitted" / "checkpoints" / "step-00000008")
    assert written.state.metrics["AP"] == pytest.approx(
        client.get_metric_history(run.info.run_id, "val/AP")[-1].value
    )


def test_a_stopped_run_is_marked_and_resumes_as_the_same_run(drawn: ShapesDataset, tmp_path: Path):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    }
    arguments = command(
        drawn, tmp_path, "--name", "stopped", "schedule.epochs=12", "cluster.num_workers=1"
    )
    running = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("validation after step"):
            break
    running.send_signal(signal.SIGTERM)
    running.stdout.read()
    assert running.wait(120) == 128 + signal.SIGTERM
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert only_run(uri, "deta").info.status == "KILLED"

    again = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=100
    )
    assert again.returncode == 2
    assert "--resume" in again.stderr
    changed = subprocess.run(
        [sys.executable, *arguments, "--resume", "optim.lr=1e-5"],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert changed.returncode == 2
    assert "optim.lr: 0.0015 -> 1e-05" in changed.stderr

    resumed = subprocess.run(
        [sys.executable, *arguments, "--resume"],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "continuing from step" in resumed.stdout
    run = only_run(uri, "deta")
    assert run.info.status == "FINISHED"
    steps = [m.step for m in MlflowClient(uri).get_metric_history(run.info.run_id, "val/AP")]
    assert sorted(set(steps)) == [4 * epoch for epoch in range(1, 13)]
    begins = [e["step"] for e, _ in read_events(tmp_path / "stopped") if e["kind"] == "begin"]
    assert begins[0] == 0
    assert begins[-1] >= 4


def test_refused_input_touches_no_cluster(drawn: ShapesDataset, tmp_path: Path):
    annotations = json.loads(drawn.train_annotations.read_text())
    annotations["annotations"][3]["category_id"] = 99
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(annotations))
    refused = subprocess.run(
        [sys.executable, *command(drawn, tmp_path, "--train-annotations", str(bad))],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "bad.json" in refused.stderr
    assert "99" in refused.stderr
    assert not (tmp_path / "demo").exists()


def test_more_workers_than_the_cluster_has_is_an_error_at_once(
    drawn: ShapesDataset, tmp_path: Path
):
    refused = subprocess.run(
        [sys.executable, *command(drawn, tmp_path, "cluster.num_workers=4",
                                  "cluster.cpus_per_worker=400")],
        env=os.environ | {"RAY_ADDRESS": "local"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "1600 CPUs" in refused.stderr
    assert only_run(f"sqlite:///{tmp_path / 'mlflow.db'}", "deta").info.status == "FAILED"
