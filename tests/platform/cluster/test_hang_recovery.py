"""A hung worker is killed and replaced within the attempt, on a real cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.learning.hang_watchdog import HEARTBEATS, STACKS
from deta.platform.run.journal import read_events
from deta.platform.run.run import ATTEMPT_LOG

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]

ROOT = Path(__file__).resolve().parents[3]
STARTS_WITHIN_S = 300  # it takes 20 s, or minutes if all cores are busy


def test_a_worker_that_does_not_run_is_replaced_without_another_attempt(tmp_path: Path):
    drawn = write_shapes(tmp_path / "shapes", num_train=16, num_val=6, size_px=64)
    folder = tmp_path / "still"
    command = [
        sys.executable, str(ROOT / "jobs" / "deta_r50.py"), "--variant", "demo", "--name", "still",
        "--train-images", str(drawn.train_images),
        "--train-annotations", str(drawn.train_annotations),
        "--val-images", str(drawn.val_images), "--val-annotations", str(drawn.val_annotations),
        f"storage={tmp_path}", "schedule.epochs=200", "evaluate_every_epochs=200",
        "num_pictures=0", "total_batch_size=4", "micro_batch_size=2", "data.loader_workers=0",
        "log_every_steps=1", "checkpoint.every_steps=20", "cluster.hang_timeout_s=5",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {"HOME": str(tmp_path)}
    with (tmp_path / "run.log").open("wb") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        heartbeat = folder / HEARTBEATS / "rank-1.json"
        wait_for(lambda: steps(folder) >= 10 and heartbeat.exists(), run)
        victim = json.loads(heartbeat.read_text())["pid"]
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: count(folder, "begin") == 2, run)
        reached = steps(folder)
        wait_for(lambda: steps(folder) > reached, run)
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(120)
    printed = (tmp_path / "run.log").read_text(errors="replace")
    assert run.returncode == 143, printed[-3000:]
    restarts = [e["reason"] for e, _ in read_events(folder) if e["kind"] == "restart"]
    assert len(restarts) == 1
    assert restarts[0].startswith("the training hung (rank 0, process ")
    assert f"{restarts[0]}; continuing from " in printed
    assert len(list((folder / STACKS).glob("rank-0-*.txt"))) == 1
    assert (folder / ATTEMPT_LOG).read_text().count("Ray cluster on this machine") == 1
    assert not Path(f"/proc/{victim}").exists()


def wait_for(condition, run: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + STARTS_WITHIN_S
    while not condition():
        assert run.poll() is None, "the run ended"
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def steps(folder: Path) -> int:
    """Return the last step of this start, or 0."""
    last = 0
    for event, _ in events(folder):
        if event["kind"] == "progress":
            last = event["step"]
    return last


def count(folder: Path, kind: str) -> int:
    return sum(event["kind"] == kind for event, _ in events(folder))


def events(folder: Path):
    return read_events(folder) if (folder / "journal.jsonl").exists() else []
