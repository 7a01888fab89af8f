"""The command line of the uploader: one pass over a run, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from deta.platform.run.journal import Journal
from deta.platform.run.run_file import write_run_file
from deta.platform.tracking.upload_process import read_upload_state
from deta.platform.tracking.uploader_main import main


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


def test_a_finished_run_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch):
    uri = f"sqlite:///{folder.parent / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main([str(folder)]) == 0
    state = read_upload_state(folder)
    assert state.is_complete
    client = MlflowClient(uri)
    history = client.get_metric_history(state.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(2, 3.0)]
    assert client.get_run(state.run_id).info.status == "FINISHED"


def test_an_unreachable_server_is_exit_code_1(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main([str(folder)]) == 1
    assert read_upload_state(folder).error
