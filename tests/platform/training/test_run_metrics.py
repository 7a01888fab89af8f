"""Live metrics: a worker's steps, the state in the journal, and the backlog of MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.run.journal import JOURNAL_FILE, Journal
from deta.platform.run.run_file import RUN_FILE
from deta.platform.system.atomic_write import write_json
from deta.platform.tracking.upload_plan import RECORD_FILE, count_unsent
from deta.platform.tracking.upload_process import STATE_FILE
from deta.platform.training.run_metrics import (
    METRICS,
    Metric,
    RunMeter,
    RunStatus,
    StepTimes,
    WorkerMeter,
)

ROOT = Path(__file__).resolve().parents[3]


class Shown:
    """Stores what is exported: sums for counters, the last value for gauges."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = {}

    def __call__(self, metric: Metric, value: float, part: str = "", /) -> None:
        key = (metric.name, part)
        before = self.values.get(key, 0.0) if metric.kind != "gauge" else 0.0
        self.values[key] = before + value

    def __getitem__(self, name: str) -> float:
        return self.values["deta_" + name, ""]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / RUN_FILE).write_text("{}")
    return tmp_path


def write_events(folder: Path, *events: tuple[str, dict[str, object]]) -> None:
    journal = Journal(folder)
    for kind, values in events:
        journal.write(kind, **values)
    journal.close()


def progress(step: int, useful_s: float, **metrics: float) -> tuple[str, dict[str, object]]:
    named = {f"train/{name}": value for name, value in metrics.items()}
    values = {"step": step, "num_steps": 100, "losses": [1.0], "metrics": named}
    return "progress", {**values, "remaining_s": 12.0, "useful_s": useful_s}


def begin(step: int, useful_s: float, **more: float) -> tuple[str, dict[str, object]]:
    values = {"step": step, "num_steps": 100, "world_size": 2, "useful_s": useful_s}
    return "begin", {**values, **more}


def test_prometheus_accepts_every_name():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.replace("_", "").isalnum()
        assert metric.name.startswith("deta_")
        assert not metric.name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert metric.help
        assert bool(metric.bounds) == (metric.kind == "histogram")
        assert list(metric.bounds) == sorted(metric.bounds)


def test_reading_names_imports_neither_ray_nor_torch_nor_mlflow():
    code = (
        "import sys, deta.platform.training.run_metrics; "
        "import deta.platform.tracking.prometheus_grafana; "
        "assert not {'ray', 'torch', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_worker_counts_its_images_and_its_wait_for_data():
    shown = Shown()
    meter = WorkerMeter(shown, 3, on_gpu=False)
    meter(StepTimes(num_images=2, data_wait_s=0.25, update_s=1.0))
    meter(StepTimes(num_images=1, data_wait_s=0.0, update_s=0.5))
    assert shown.values == {
        ("deta_images", "3"): 3,
        ("deta_data_wait_seconds", "3"): 0.25,
        ("deta_step_seconds", "3"): 1.5,
    }


def test_the_journal_gives_the_state_of_a_run(folder: Path):
    write_events(
        folder,
        ("starting", {"step": 0}),
        begin(0, 0.0),
        progress(10, 8.0, loss=3.0, loss_0=9.0, grad_norm=0.5, lr=1e-4, images_per_s=7.5, epoch=0.5,
                 skipped_steps=0, broken_images=0, giou_encoder=0.25, giou_3=0.75),
        ("skipped", {"step": 11, "images": [1], "not_finite": ["loss"], "in_a_row": 1, "total": 1}),
        ("replaced", {"step": 11, "images": [{"image_id": 5}, {"image_id": 5}]}),
        ("checkpoint", {"step": 12, "path": "x", "blocked_s": 0.25, "seconds": 2.5}),
        ("checkpoint_failed", {"step": 13, "message": "no room"}),
        ("evaluation", {"step": 20, "metrics": {"val/AP": 12.5, "val/AP50": 30.0, "val/epoch": 1.0,
                        "val/seconds": 4.0, "AP_of_class/disc": 9.0}, "table": ""}),
    )  # fmt: skip
    shown = Shown()
    RunMeter(folder, shown).poll()
    assert shown["steps_done"] == 10
    assert shown["steps_in_all"] == 100
    assert shown["workers"] == 2
    assert shown["images_per_second"] == 7.5
    assert shown["learning_rate"] == 1e-4
    assert shown["skipped_steps"] == 1
    assert shown["replaced_images"] == 1
    assert shown["checkpoint_pause_seconds"] == 0.25
    assert shown["checkpoint_seconds"] == 2.5
    assert shown["checkpoint_failures"] == 1
    assert shown["evaluation_seconds"] == 4.0
    assert shown["best_ap"] == 12.5
    assert shown["starts"] == 1
    assert shown["restarts"] == 0
    parts = {part: value for (name, part), value in shown.values.items() if name == "deta_loss"}
    assert parts == {"loss": 3.0, "giou_encoder": 0.25}  # other layers only in MLflow
    kinds = {part: value for (name, part), value in shown.values.items() if name == "deta_ap"}
    assert kinds == {"AP": 12.5, "AP50": 30.0}
    assert abs(shown["event_time_seconds"] - time.time()) < 60


def test_a_restart_is_counted_and_lost_work_is_not_goodput(folder: Path):
    status = RunStatus()
    for kind, values in [
        begin(0, 0.0),
        progress(50, 40.0),
        ("restart", {"reason": "a worker was lost", "backoff_s": 0.0}),
        begin(30, 24.0, wasted_steps=20, restart_s=9.0),
    ]:
        status.add({"kind": kind, "time_s": 1.0, **values})
    found = {metric.name: value for metric, value, _ in status.values(100.0)}
    assert found["deta_starts"] == 2
    assert found["deta_restarts"] == 1
    assert found["deta_redone_steps"] == 20
    assert found["deta_steps_done"] == 30
    assert found["deta_goodput"] == pytest.approx(0.24)


def test_goodput_of_a_resumed_run_is_that_of_its_present_launch():
    status = RunStatus()
    for kind, values in [
        begin(0, 0.0),
        progress(50, 40.0),
        ("ended", {"status": "KILLED", "reason": "", "goodput": 0.5}),
        begin(50, 40.0),
        progress(60, 48.0),
    ]:
        status.add({"kind": kind, "time_s": 1.0, **values})
    found = {metric.name: value for metric, value, _ in status.values(16.0)}
    assert found["deta_goodput"] == pytest.approx(0.5)


def test_the_backlog_is_what_the_journal_has_and_mlflow_lacks(folder: Path):
    meter = RunMeter(folder, shown := Shown())
    write_events(
        folder, begin(0, 0.0), progress(2, 1.0, loss=3.0, lr=0.1), progress(4, 2.0, loss=2.0)
    )
    meter.poll()
    assert shown["mlflow_backlog_rows"] == count_unsent(folder)[0] == 3

    sent_bytes = (folder / JOURNAL_FILE).stat().st_size
    write_json(folder / RECORD_FILE, {"offset_bytes": sent_bytes})
    state = {"last_success_s": 1000.0, "call_s": 0.2, "error": "unreachable"}
    write_json(folder / STATE_FILE, state)
    write_events(folder, progress(6, 3.0, loss=1.0, lr=0.1, epoch=1.0))
    meter.poll()
    assert shown["mlflow_backlog_rows"] == 3
    assert shown["mlflow_failing"] == 1
    assert shown["mlflow_time_seconds"] == 1000
    assert shown["mlflow_call_seconds"] == 0.2

    sent_bytes = (folder / JOURNAL_FILE).stat().st_size
    write_json(folder / RECORD_FILE, {"offset_bytes": sent_bytes})
    meter.poll()
    assert shown["mlflow_backlog_rows"] == 0


def test_a_new_journal_is_read_from_its_start(folder: Path):
    meter = RunMeter(folder, shown := Shown())
    write_events(folder, begin(0, 0.0), progress(2, 1.0, loss=3.0), progress(40, 2.0, loss=2.0))
    meter.poll()
    (folder / JOURNAL_FILE).unlink()
    write_events(folder, begin(0, 0.0))
    meter.poll()
    assert shown["steps_done"] == 0
    assert shown["starts"] == 1


@pytest.mark.parametrize("content", [
    "", "nonsense", json.dumps({"kind": "progress", "time_s": 1}),
    json.dumps({"kind": "progress", "time_s": 1, "step": "x", "remaining_s": None, "metrics": 7}),
    json.dumps({"kind": "begin", "time_s": 1, "wasted_steps": "many"}),
    json.dumps({"kind": "replaced", "time_s": 1, "images": [3]}),
    json.dumps({"kind": "evaluation", "time_s": 1, "metrics": []}),
])  # fmt: skip
def test_malformed_events_raise_nothing(folder: Path, content: str):
    (folder / JOURNAL_FILE).write_text(content + "\n")
    (folder / RECORD_FILE).write_text("[]")
    (folder / STATE_FILE).write_text("{")
    RunMeter(folder, Shown()).poll()


def test_a_run_without_a_folder_exports_nothing(tmp_path: Path):
    shown = Shown()
    RunMeter(tmp_path / "none", shown).poll()
    assert not shown.values
