"""The study as a person runs it, killed in the middle and started again by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deta.platform.data.synthetic_shapes import ShapesDataset, write_shapes
from deta.platform.run.journal import read_events

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("model.backbone.width=0.25", "model.dim=32", "model.num_heads=4", "model.ffn_dim=32"),
    *("model.encoder_layers=1", "model.decoder_layers=1", "model.num_queries=20"),
    *("data.augmentation.short_edges=48,64", "data.augmentation.max_long_edge=96"),
    *("data.evaluation_size.short_edge=64", "data.evaluation_size.max_long_edge=96"),
    *("data.train_first=16", "log_every_steps=2", "num_pictures=0", "schedule.epochs=12"),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> ShapesDataset:
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=16, num_val=6, size_px=64)


def command(drawn: ShapesDataset, storage: Path, *arguments: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "jobs" / "study_batch_lr.py"), "--variant", "demo",
        "--train-images", str(drawn.train_images),
        "--train-annotations", str(drawn.train_annotations),
        "--val-images", str(drawn.val_images), "--val-annotations", str(drawn.val_annotations),
        "--storage", str(storage), "--name", "study", "--no-probe", *TINY, *arguments,
    ]  # fmt: skip


def kinds_of(folder: Path) -> list[str]:
    return [event["kind"] for event, _ in read_events(folder)]


def test_a_study_killed_in_the_middle_goes_on_by_the_same_command(
    drawn: ShapesDataset, ray_cluster, tmp_path: Path
):
    study = tmp_path / "study"
    with (tmp_path / "first.log").open("w") as log:
        driver = subprocess.Popen(
            command(drawn, tmp_path, "--seeds", "1"), env=ray_cluster.env, stdout=log, stderr=log
        )
    deadline_s = time.monotonic() + 600
    while time.monotonic() < deadline_s:
        journals = {path.name: kinds_of(path) for path in (study / "trials").glob("*")}
        ended = [name for name, kinds in journals.items() if "ended" in kinds]
        midway = [n for n, kinds in journals.items() if n not in ended and "evaluation" in kinds]
        if ended and midway:
            break
        assert driver.poll() is None, (tmp_path / "first.log").read_text()
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    first_done = {path.name for path in (study / "trials").glob("*") if "ended" in kinds_of(path)}
    assert first_done
    wait_until_marked(study)

    again = subprocess.run(
        command(drawn, tmp_path, "--seeds", "1"),
        env=ray_cluster.env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    records = json.loads((study / "trials.json").read_text())
    assert [record["status"] for record in records] == ["finished"] * 4
    assert len({record["cell"] for record in records}) == 4
    for name in first_done:
        assert kinds_of(study / "trials" / name).count("starting") == 1  # not trained again
    for name in midway:  # from a checkpoint; or it was at its end when Ray had ended it
        events = [event for event, _ in read_events(study / "trials" / name)]
        begins = [event["step"] for event in events if event["kind"] == "begin"]
        assert begins[0] == 0
        assert 0 not in begins[1:]
    for path in (study / "trials").glob("*"):  # every step of every trial, to the same place
        steps = [e for e, _ in read_events(path) if e["kind"] == "evaluation"]
        assert max(e["metrics"]["val/samples_seen"] for e in steps) == 192
    assert "batch=16, rate=2×" in (study / "report.md").read_text()

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("deta").experiment_id])
    parents = [run for run in runs if run.data.tags.get("deta.kind") == "study"]
    assert len(parents) == 1
    assert len(runs) == 5
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.data.tags["deta.trial"] for run in runs if run not in parents}) == 4
    files = {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert {"sweep.json", "trials.json", "report.html", "report.md"} <= files

    changed = subprocess.run(
        command(drawn, tmp_path, "--seeds", "1", "optim.weight_decay=0.5"),
        env=ray_cluster.env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert changed.returncode == 2
    assert "optim.weight_decay: 0.0001 -> 0.5" in changed.stderr
    written = subprocess.run(
        command(drawn, tmp_path, "--seeds", "1", "--report-only"),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert written.returncode == 0, written.stderr
    assert "16 vs 8" in written.stdout


def wait_until_marked(study: Path) -> None:
    """The orphan reaper ends the processes of the killed driver and records it in the journals."""
    deadline_s = time.monotonic() + 200
    while "ended" not in kinds_of(study) and time.monotonic() < deadline_s:
        time.sleep(0.2)


def test_the_plan_prints_what_the_study_needs_and_trains_nothing(tmp_path: Path):
    captured = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "study_batch_lr.py"), "--plan", "--sd", "0.15"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True,
    ).stdout  # fmt: skip
    assert "5 cells × 3 seeds = 15 trials" in captured
    assert "trains exactly as" in captured
    assert not list(tmp_path.iterdir())


def test_what_the_study_varies_cannot_be_changed_beside_it(tmp_path: Path):
    refused = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "study_batch_lr.py"), "--plan", "optim.lr=3e-4"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "optim.lr cannot be set: the study varies it" in refused.stderr
