"""A worker that stands still is noticed from within, and leaves its stacks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.learning.hang_watchdog import EXIT_CODE, HEARTBEATS, STACKS, Watchdog

STANDS_STILL = """
import sys, time
from pathlib import Path
from deta.platform.learning.hang_watchdog import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), 3, 0.5)
for _ in range(5):
    watchdog.heartbeat("data"); watchdog.heartbeat("step"); time.sleep(0.01)

def where_it_hangs():
    time.sleep(300)

where_it_hangs()
"""


def test_a_worker_that_stands_still_ends_and_leaves_its_stacks(tmp_path: Path):
    ended = subprocess.run([sys.executable, "-c", STANDS_STILL, str(tmp_path)], timeout=60)
    assert ended.returncode == EXIT_CODE
    (stacks,) = (tmp_path / STACKS).iterdir()
    text = stacks.read_text()
    assert text.startswith("rank 3, process ")
    assert "while in phase 'step'" in text
    assert "where_it_hangs" in text


WAITS_FOR_DATA = """
import sys, time
from pathlib import Path
from deta.platform.learning.hang_watchdog import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), 1, 5)
watchdog.heartbeat("data")
print("waits", flush=True)

def where_it_hangs():
    time.sleep(300)

where_it_hangs()
"""


def test_a_peer_of_one_that_ended_leaves_its_stacks_too_and_ends(tmp_path: Path):
    # Old ones, of an earlier start, end nobody.
    (tmp_path / STACKS).mkdir()
    (tmp_path / STACKS / "rank-0-20260101-000000.txt").write_text("rank 0, process 1 on a: old")
    peer = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_DATA, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert peer.stdout is not None
    assert peer.stdout.readline() == b"waits\n"
    time.sleep(2.5)
    assert peer.poll() is None
    subprocess.run([sys.executable, "-c", STANDS_STILL, str(tmp_path)], timeout=60)
    assert peer.wait(60) == EXIT_CODE
    (stacks,) = (tmp_path / STACKS).glob("rank-1-*.txt")
    text = stacks.read_text()
    assert "a peer ended, and this one was in phase 'data'" in text
    assert "where_it_hangs" in text


def test_signs_of_life_are_written_and_no_step_is_taken_for_a_hang(tmp_path: Path):
    watchdog = Watchdog(tmp_path, 0, 0.5)
    for _ in range(10):
        watchdog.heartbeat("step")
        time.sleep(0.1)
    watchdog.close()
    said = json.loads((tmp_path / HEARTBEATS / "rank-0.json").read_text())
    assert said["phase"] == "step"
    assert abs(said["time_s"] - time.time()) < 30
    assert not (tmp_path / STACKS).exists()


@pytest.mark.parametrize(
    ("steps_s", "limit_s"),
    [
        ([0.1] * 5, 30),  # the time-out
        ([8.0] * 5, 80),  # ten times a usual step
        ([8.0] * 4 + [70.0], 80),  # one slow step makes no rule
        ([1.0], 300),  # the first ones may take long
    ],
)
def test_patience_follows_the_usual_step(tmp_path: Path, steps_s: list[float], limit_s: float):
    watchdog = Watchdog(tmp_path, 0, 30)
    watchdog.close()
    for seconds in steps_s:
        watchdog.heartbeat("step")
        watchdog._since_s -= seconds
        watchdog.heartbeat("data")
    watchdog.heartbeat("step")
    assert watchdog.limit_s == pytest.approx(limit_s, rel=0.01)
    watchdog.heartbeat("evaluating")
    assert watchdog.limit_s > 600
