"""The rest of a run is sent, and its end marked, by a process of its own."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deta.platform.run.journal import Journal, read_events
from deta.platform.run.run_file import write_run_file
from deta.platform.run.run_lock import RunLock
from deta.platform.system.places import child_environment
from deta.platform.tracking.sync_run import missing_end, sync_runs


def new_run(folder: Path, *kinds: str) -> Path:
    folder.mkdir(parents=True)
    config = {"name": folder.name, "experiment": "deta"}
    write_run_file(folder, {"key": uuid.uuid4().hex, "config": config})
    journal = Journal(folder)
    for kind in kinds:
        if kind == "progress":
            journal.write(kind, step=1, metrics={"train/loss": 1.0, "train/epoch": 1})
        else:
            journal.write(kind, step=1, num_steps=1, status="FAILED", reason="", metrics={})
    journal.close()
    return folder


@pytest.mark.parametrize(
    ("kinds", "status"),
    [
        ([], "KILLED"),
        (["begin", "progress"], "KILLED"),
        (["begin", "progress", "end"], "FINISHED"),
        (["begin", "ended"], None),
        (["begin", "end", "ended", "begin"], "KILLED"),
    ],
)
def test_a_run_without_an_end_is_killed_or_finished(tmp_path, kinds, status):
    assert missing_end(new_run(tmp_path / "run", *kinds)) == status


def test_the_module_marks_the_end_of_a_dead_run_and_sends_it(tmp_path):
    run = new_run(tmp_path / "run", "begin", "progress")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    subprocess.run(
        [sys.executable, "-m", "deta.platform.tracking.sync_run", str(run)],
        env=child_environment({"MLFLOW_TRACKING_URI": uri}), cwd=tmp_path, check=True, timeout=200,
    )  # fmt: skip

    assert [event["kind"] for event, _ in read_events(run)] == ["begin", "progress", "ended"]
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("deta")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "KILLED"
    assert found.data.metrics["train/loss"] == 1.0


def test_a_run_that_is_alive_is_left_alone(tmp_path):
    run = new_run(tmp_path / "run", "begin")
    lines: list[str] = []
    with RunLock.acquire(run):
        assert sync_runs([run], {}, echo=lines.append)
    assert "is running" in lines[0]
    assert [event["kind"] for event, _ in read_events(run)] == ["begin"]
