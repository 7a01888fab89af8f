"""jobs/sync.py sends what is left of every run, ends the dead, and lets the living be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run_file import write_run_file
from deta.platform.run.run_lock import RunLock

ROOT = Path(__file__).resolve().parents[2]


def sync(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    unset = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "sync.py"), *map(str, arguments)],
        env=unset | env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


def new_run(folder: Path, *kinds: str) -> Path:
    folder.mkdir(parents=True)
    config = {"name": folder.name, "experiment": "deta"}
    write_run_file(folder, {"key": uuid.uuid4().hex, "config": config})
    journal = Journal(folder)
    for kind in kinds:
        if kind == "begin":
            journal.write("begin", step=0, num_steps=3)
        elif kind == "steps":
            for step in range(1, 4):
                journal.write("progress", step=step, metrics={"train/loss": 1.0, "train/epoch": 1})
        else:
            journal.write(kind, step=3, status="FAILED", reason="on purpose", metrics={})
    journal.close()
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    new_run(storage / "output", "begin", "steps", "end", "ended")
    new_run(storage / "died", "begin", "steps")
    new_run(storage / "sweep" / "died-at-the-end", "begin", "steps", "end")
    new_run(storage / "died-again", "begin", "steps", "ended", "begin")
    new_run(storage / "alive", "begin", "steps")
    return storage


def test_a_dry_run_changes_nothing(storage: Path):
    before = {p: p.read_bytes() for p in sorted(storage.rglob("*")) if p.is_file()}
    with RunLock.acquire(storage / "alive"):
        captured = sync("--dry-run", storage)
    assert captured.returncode == 1, captured.stderr
    assert "died: its process died; marked KILLED" in captured.stdout
    assert "alive: is running" in captured.stdout
    assert "output: 6 rows and 0 files are left" in captured.stdout
    after = {p: p.read_bytes() for p in sorted(storage.rglob("*")) if p.is_file()}
    assert {p: b for p, b in after.items() if ".lock" not in p.name} == before


def test_an_mlflow_that_is_away_leaves_all_for_the_next_time(tmp_path: Path):
    run = new_run(tmp_path / "run", "begin", "steps", "ended")
    captured = sync(run, "--patience", "1", MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert captured.returncode == 1, captured.stdout + captured.stderr
    assert "0 rows sent, 0 skipped, 6 left" in captured.stdout
    assert [event["kind"] for event, _ in read_events(run)][-1] == "ended"


def test_all_that_is_left_is_sent_and_the_dead_are_marked(storage: Path):
    with RunLock.acquire(storage / "alive"):
        captured = sync(storage)
        assert captured.returncode == 0, captured.stdout + captured.stderr
        again = sync(storage)
    assert again.returncode == 0
    assert "died: 6 rows sent, 0 skipped, 0 left" in again.stdout
    status = {}
    for path in ("output", "died", "sweep/died-at-the-end", "died-again"):
        record = json.loads((storage / path / "mlflow.json").read_text())
        client = MlflowClient(record["uri"])
        run = client.get_run(record["run_id"])
        status[path] = run.info.status
        steps = [m.step for m in client.get_metric_history(record["run_id"], "train/loss")]
        assert steps == [1, 2, 3]
    assert status == {
        "output": "FAILED",
        "died": "KILLED",
        "sweep/died-at-the-end": "FINISHED",
        "died-again": "KILLED",
    }
    assert not (storage / "alive" / "mlflow.json").exists()
    assert [e["kind"] for e, _ in read_events(storage / "alive")][-1] == "progress"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    refused = sync(tmp_path / "nothing")
    assert refused.returncode == 2
    assert "is no folder" in refused.stderr
