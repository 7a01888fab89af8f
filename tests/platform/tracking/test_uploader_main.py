"""The uploader process: sends a run until it has ended, and its exit code."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

import deta.platform.tracking.uploader_main as uploader_main
from deta.platform.run.journal import Journal
from deta.platform.run.run_file import write_run_file
from deta.platform.system.places import child_environment
from deta.platform.tracking.upload_process import read_upload_state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run_file(
        folder, {"key": "k", "config": {"name": "run", "experiment": "deta"}, "tags": {}}
    )
    journal = Journal(folder)
    journal.write("begin", step=0, num_steps=2, world_size=1)
    journal.write("progress", step=2, metrics={"train/loss": 3.0, "train/epoch": 1.0})
    journal.write("ended", status="FINISHED", reason="", goodput=0.5)
    journal.close()
    return folder


def run_uploader(folder: Path, uri: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", uploader_main.__name__, str(folder)],
        env=child_environment({"MLFLOW_TRACKING_URI": uri}),
    )


def test_a_finished_run_is_sent(folder: Path):
    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    assert run_uploader(folder, uri).wait(300) == 0
    state = read_upload_state(folder)
    assert state.is_complete
    client = MlflowClient(uri)
    history = client.get_metric_history(state.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(2, 3.0)]
    assert client.get_run(state.run_id).info.status == "FINISHED"


def test_an_unreachable_server_is_exit_code_1(folder: Path):
    process = run_uploader(folder, "http://127.0.0.1:9")
    while not read_upload_state(folder).error:
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 1
    assert read_upload_state(folder).state == "stopped"
