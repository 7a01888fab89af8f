"""A hung worker exits by itself and leaves the stacks of its threads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.learning.hang_watchdog import (
    BUSY_LIMIT,
    EXIT_CODE,
    HEARTBEATS,
    STACKS,
    Watchdog,
)
from tests.platform.learning.busy_processes import LAST_CPU, busy_processes

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")

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


# Does what it is told in a step, beside its watchdog: computes without Python's lock, or sleeps.
IN_A_STEP = f"""
import hashlib, os, sys, time
from pathlib import Path
from deta.platform.learning.hang_watchdog import Watchdog

folder, rank, timeout_s, seconds, what = sys.argv[1:]
os.sched_setaffinity(0, {{{LAST_CPU}}})
os.nice(10)
watchdog = Watchdog(Path(folder), int(rank), float(timeout_s), spins=what == "spins")
for _ in range(5):
    watchdog.heartbeat("data"); watchdog.heartbeat("step"); time.sleep(0.01)
print("works", flush=True)
until_s = time.monotonic() + float(seconds)
while time.monotonic() < until_s:
    time.sleep(0.01) if what == "sleeps" else hashlib.sha256(bytes(1 << 20))
"""


def start_in_a_step(
    folder: Path, what: str, seconds: float, *, timeout_s: float = 1, rank: int = 0
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_STEP]
        + [str(folder), str(rank), str(timeout_s), str(seconds), what],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"works\n"
    return process


@needs_proc
@pytest.mark.parametrize("what", ["computes", "spins"])
def test_a_worker_that_others_keep_from_the_processor_is_slow_and_not_hung(
    tmp_path: Path, what: str
):
    """It takes six times the timeout in one step, with a thirtieth of a processor."""
    with busy_processes(3):
        process = start_in_a_step(tmp_path, what, 6)
        assert process.wait(120) == 0
    assert not (tmp_path / STACKS).exists()


@needs_proc
def test_a_worker_that_sleeps_on_a_busy_machine_is_hung(tmp_path: Path):
    with busy_processes(3):
        process = start_in_a_step(tmp_path, "sleeps", 100, timeout_s=2)
        began_s = time.monotonic()
        assert process.wait(60) == EXIT_CODE
        assert time.monotonic() - began_s < 8
    (stacks,) = (tmp_path / STACKS).iterdir()
    assert "in phase 'step', load " in stacks.read_text()


def test_a_worker_that_computes_for_ever_is_given_up_at_last(tmp_path: Path):
    process = start_in_a_step(tmp_path, "computes", 100, timeout_s=0.5)
    began_s = time.monotonic()
    assert process.wait(60) == EXIT_CODE
    assert time.monotonic() - began_s > 0.9 * BUSY_LIMIT * 0.5
    (stacks,) = (tmp_path / STACKS).iterdir()
    assert "although it or a peer computes" in stacks.read_text()


@needs_proc
def test_who_spins_in_a_wait_for_the_device_gives_no_sign_of_life(tmp_path: Path):
    """A processor that only waits, as for a kernel that does not end, is no progress."""
    process = start_in_a_step(tmp_path, "spins", 100, timeout_s=2)
    began_s = time.monotonic()
    assert process.wait(60) == EXIT_CODE
    assert time.monotonic() - began_s < 0.8 * BUSY_LIMIT * 2


def test_who_waits_in_a_step_for_a_peer_that_computes_is_not_hung(tmp_path: Path):
    """Until the peer is frozen: then it is ended within its own timeout."""
    waiting = start_in_a_step(tmp_path, "sleeps", 100, timeout_s=2, rank=0)
    computing = start_in_a_step(tmp_path, "computes", 100, timeout_s=2, rank=1)
    try:
        time.sleep(8)  # four times the timeout
        assert waiting.poll() is None
        assert computing.poll() is None
        computing.send_signal(signal.SIGSTOP)
        frozen_s = time.monotonic()
        assert waiting.wait(30) == EXIT_CODE
        assert time.monotonic() - frozen_s < 6
    finally:
        for process in (waiting, computing):
            process.kill()
            process.wait()
    (stacks,) = (tmp_path / STACKS).glob("rank-0-*.txt")
    assert "no progress for" in stacks.read_text()


def test_a_worker_that_was_stopped_for_a_while_goes_on(tmp_path: Path):
    """As a machine does that is suspended, or a container that is frozen."""
    process = start_in_a_step(tmp_path, "computes", 8, timeout_s=1.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0


def test_a_heartbeat_file_tells_the_limit_and_the_work_of_its_worker(tmp_path: Path):
    process = start_in_a_step(tmp_path, "computes", 3, timeout_s=2)
    process.wait(60)
    heartbeat = json.loads((tmp_path / HEARTBEATS / "rank-0.json").read_text())
    assert heartbeat["limit_s"] == 2
    assert 0.5 < heartbeat["worked_s"] < 4
