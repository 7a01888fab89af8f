"""A hung worker exits by itself and leaves the stacks of its threads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.learning.hang_watchdog import EXIT_CODE, HEARTBEATS, STACKS, Watchdog

HANGS = """
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


def test_a_hung_worker_exits_and_leaves_its_stacks(tmp_path: Path):
    ended = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], timeout=60)
    assert ended.returncode == EXIT_CODE
    (stacks,) = (tmp_path / STACKS).iterdir()
    text = stacks.read_text()
    assert text.startswith("rank 3, process ")
    assert "no progress for" in text
    assert "in phase 'step'" in text
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


def test_the_peer_of_a_hung_worker_leaves_its_stacks_and_exits(tmp_path: Path):
    # Stacks of an earlier attempt must not make anybody exit.
    (tmp_path / STACKS).mkdir()
    (tmp_path / STACKS / "rank-0-20260101-000000.txt").write_text("rank 0, process 1 on a: old")
    peer = subprocess.Popen(
        [sys.executable, "-c", WAITS_FOR_DATA, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert peer.stdout is not None
    assert peer.stdout.readline() == b"waits\n"
    time.sleep(2.5)
    assert peer.poll() is None
    subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], timeout=60)
    assert peer.wait(60) == EXIT_CODE
    (stacks,) = (tmp_path / STACKS).glob("rank-1-*.txt")
    text = stacks.read_text()
    assert "a peer exited; this rank had been in phase 'data'" in text
    assert "where_it_hangs" in text


def test_heartbeats_are_written_and_a_normal_step_is_not_a_hang(tmp_path: Path):
    watchdog = Watchdog(tmp_path, 0, 0.5)
    for _ in range(10):
        watchdog.heartbeat("step")
        time.sleep(0.1)
    watchdog.close()
    heartbeat = json.loads((tmp_path / HEARTBEATS / "rank-0.json").read_text())
    assert heartbeat["phase"] == "step"
    assert abs(heartbeat["time_s"] - time.time()) < 30
    assert not (tmp_path / STACKS).exists()


@pytest.mark.parametrize(
    ("steps_s", "limit_s"),
    [
        ([0.1] * 5, 30),  # the timeout
        ([8.0] * 5, 80),  # ten times the median step
        ([8.0] * 4 + [70.0], 80),  # one slow step does not count
        ([1.0], 300),  # the first ones may take long
    ],
)
def test_the_limit_follows_the_median_step(tmp_path: Path, steps_s: list[float], limit_s: float):
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


IN_PHASE = """
import sys, time
from pathlib import Path
from deta.platform.learning.hang_watchdog import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), int(sys.argv[2]), 2)
watchdog.heartbeat(sys.argv[3])
print("waits", flush=True)
time.sleep(300)
"""


def test_who_waits_for_a_peer_is_as_patient_as_the_peer_may_be_slow(tmp_path: Path):
    """A slow disk of one worker ends none; a peer that is frozen or gone does."""
    slow, waiting = (
        subprocess.Popen(
            [sys.executable, "-c", IN_PHASE, str(tmp_path), rank, phase], stdout=subprocess.PIPE
        )
        for rank, phase in (("0", "data"), ("1", "peers"))
    )
    for one in (slow, waiting):
        assert one.stdout is not None
        assert one.stdout.readline() == b"waits\n"
    time.sleep(8)  # four times the limit of a step; a wait for data may take 20 s
    assert waiting.poll() is None
    assert slow.poll() is None
    slow.send_signal(signal.SIGSTOP)
    try:
        assert waiting.wait(10) == EXIT_CODE
    finally:
        slow.kill()
        slow.wait()
    (stacks,) = (tmp_path / STACKS).glob("rank-1-*.txt")
    assert "in phase 'peers'" in stacks.read_text()
