"""The monitor derives the state of an attempt from the files of the run."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from deta.platform.launch import attempt_monitor
from deta.platform.launch.attempt_monitor import SILENCE_S, AttemptMonitor, RunFailedError
from deta.platform.learning.hang_watchdog import HEARTBEATS, STACKS, host
from deta.platform.run.journal import Journal
from deta.platform.run.run import FAILURES, Run
from deta.platform.system.atomic_write import write_json
from tests.platform.launch.tiny_splits import DATA, make_run, write_split


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "run"
    folder.mkdir()
    return make_run(write_split(tmp_path / "train", [[], []]), folder, DATA)


@pytest.fixture
def monitor(run: Run) -> AttemptMonitor:
    return AttemptMonitor(run)


def write(run: Run, *events: tuple[str, dict[str, object]]) -> None:
    journal = Journal(run.folder)
    for kind, values in events:
        journal.write(kind, **values)
    journal.close()


def starting(step: int) -> tuple[str, dict[str, object]]:
    return "starting", {"step": step}


def begin(step: int) -> tuple[str, dict[str, object]]:
    return "begin", {"step": step, "num_steps": 9, "world_size": 2}


def test_starts_without_progress_are_counted(run: Run, monitor: AttemptMonitor):
    for step, expected in ((0, 1), (0, 2), (0, 3), (4, 1), (4, 2), (2, 3)):
        write(run, starting(step))
        monitor.poll()
        assert monitor.fruitless_starts == expected
    assert monitor.num_starts == 6


def test_events_of_an_earlier_launch_are_not_read_again(run: Run):
    write(run, starting(0), begin(0), ("end", {"step": 9, "reason": ""}))
    monitor = AttemptMonitor(run)
    monitor.poll()
    assert not monitor.ended
    assert monitor.num_starts == 0


def test_an_evaluation_is_safe_to_kill_once_its_state_is_saved(run: Run, monitor: AttemptMonitor):
    write(run, starting(0), begin(0), ("evaluating", {"step": 4}))
    monitor.poll()
    assert not monitor.is_safe_to_kill
    write(run, ("checkpoint", {"step": 4, "path": "x"}))
    monitor.poll()
    assert monitor.is_safe_to_kill
    write(run, ("evaluation", {"step": 4, "metrics": {}, "table": ""}))
    monitor.poll()
    assert not monitor.is_safe_to_kill


def fail(run: Run, rank: int, **values: object) -> None:
    folder = run.folder / FAILURES
    folder.mkdir(exist_ok=True)
    content = {"rank": rank, "type": "ValueError", "traceback": "", "comes_again": False}
    write_json(folder / f"rank-{rank}.json", content | values)


def test_a_cause_is_reported_rather_than_a_lost_connection(run: Run, monitor: AttemptMonitor):
    assert monitor.last_failure() == ""
    fail(run, 0, type="RuntimeError", message="Connection closed by peer")
    assert monitor.last_failure() == "a worker was lost"
    fail(run, 1, message="no such column")
    assert monitor.last_failure() == "ValueError: no such column"
    assert monitor.permanent_failure() == ""
    fail(run, 1, message="no such column", comes_again=True)
    assert monitor.permanent_failure() == "no such column"


def test_a_new_stack_file_is_a_hung_worker(run: Run, monitor: AttemptMonitor):
    assert monitor.hang() == ""
    (run.folder / STACKS).mkdir()
    path = run.folder / STACKS / "rank-1-20260101-000000.txt"
    path.write_text("rank 1, process 7 on here: no step for 23 s. The stacks:\n\n")
    assert monitor.hang() == (
        f"the training hung (rank 1, process 7 on here: no step for 23 s. The stacks: {path})"
    )
    monitor.begin_attempt()
    assert monitor.hang() == ""


def beat(run: Run, rank: int, clock_s: float = 0.0) -> None:
    """Write a heartbeat as a watchdog does; the file's time is `clock_s` from the one here."""
    (run.folder / HEARTBEATS).mkdir(exist_ok=True)
    heartbeat = {"phase": "step", "time_s": time.time(), "pid": os.getpid(), "host": host()}
    path = run.folder / HEARTBEATS / f"rank-{rank}.json"
    write_json(path, heartbeat)
    os.utime(path, (time.time() + clock_s,) * 2)


class Clock:
    """The monotonic clock of the monitor, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(attempt_monitor.time, "monotonic", lambda: self.now_s)

    def silence(self, monitor: AttemptMonitor, seconds: float) -> str:
        """Look once a second for a while; return the last answer."""
        answer = ""
        for _ in range(round(seconds)):
            self.now_s += 1
            answer = monitor.missing_heartbeats()
        return answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_heartbeats_that_stand_still_are_missing(clock: Clock, run: Run):
    monitor = AttemptMonitor(run)
    beat(run, 0)
    beat(run, 1)
    write(run, starting(0))
    monitor.poll()
    assert clock.silence(monitor, 1000) == ""  # the training has not begun
    write(run, begin(0))
    monitor.poll()
    assert monitor.local_workers() == [os.getpid()] * 2
    assert clock.silence(monitor, SILENCE_S - 10) == ""
    assert "no heartbeat from any worker for 1" in clock.silence(monitor, 20)
    (run.folder / HEARTBEATS / "rank-1.json").write_text(json.dumps({"host": "x", "pid": 1}))
    assert monitor.local_workers() == []
    assert clock.silence(monitor, 1) == ""


@pytest.mark.parametrize("off_s", [-3600, -130, 0, 130, 3600])
def test_the_clock_of_a_file_server_ends_no_living_run_and_hides_no_dead_one(
    clock: Clock, run: Run, off_s: float
):
    monitor = AttemptMonitor(run)
    write(run, starting(0), begin(0))
    monitor.poll()
    for _ in range(100):
        beat(run, 0, off_s)
        assert clock.silence(monitor, 5) == ""
    assert "no heartbeat from any worker for" in clock.silence(monitor, SILENCE_S + 10)


def test_a_stop_of_the_supervisor_is_no_silence_of_the_workers(clock: Clock, run: Run):
    """The machine slept: neither process ran, and the first look comes before their first beat."""
    monitor = AttemptMonitor(run)
    write(run, starting(0), begin(0))
    monitor.poll()
    beat(run, 0)
    assert clock.silence(monitor, 5) == ""
    clock.now_s += 10_000
    assert clock.silence(monitor, 5) == ""


@pytest.mark.parametrize("off_s", [-3600, -60, 0, 3600])
def test_a_failure_counts_once_whatever_the_clock_says(run: Run, off_s: float):
    fail(run, 0, message="of an earlier attempt", comes_again=True)
    monitor = AttemptMonitor(run)
    assert monitor.permanent_failure() == ""
    fail(run, 0, message="5 of 400 images are broken", comes_again=True)
    os.utime(run.folder / FAILURES / "rank-0.json", (time.time() + off_s,) * 2)
    assert monitor.permanent_failure() == "5 of 400 images are broken"
    assert monitor.failed_since_start
    write(run, starting(0))
    monitor.poll()
    assert not monitor.failed_since_start
    monitor.begin_attempt()
    assert monitor.permanent_failure() == ""


def test_a_folder_that_stays_read_only_fails_the_run(run: Run, monkeypatch):
    monitor = AttemptMonitor(run)
    assert monitor.require_writable(tolerance_s=0)
    monkeypatch.setattr(attempt_monitor, "is_writable", lambda path: False)
    assert not monitor.require_writable()  # not for long enough
    with pytest.raises(RunFailedError, match=r"read-only.*--resume continues from the beginning"):
        monitor.require_writable(tolerance_s=0)


def test_writability_is_what_the_file_system_says(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("kept")
    assert attempt_monitor.is_writable(file)
    assert attempt_monitor.is_writable(tmp_path / "missing")  # not read-only
    assert file.read_text() == "kept"


@pytest.mark.parametrize(("starts", "attempts"), [(0, -1), (-1, 0)])
def test_starts_without_progress_fail_the_run(run: Run, starts: int, attempts: int):
    limit = run.config.cluster.max_fruitless_starts
    monitor = AttemptMonitor(run)
    monitor.fruitless_starts = limit - 1
    monitor.require_progress("why", limit - 1)
    monitor.fruitless_starts = limit + starts
    with pytest.raises(RunFailedError, match=r"no progress beyond step 0 .*: why"):
        monitor.require_progress("why", limit + attempts)
