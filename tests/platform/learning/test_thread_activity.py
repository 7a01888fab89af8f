"""Computing, waiting for a processor and sleeping are told apart."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.learning.thread_activity import Activity, ThreadActivity
from tests.platform.learning.busy_processes import LAST_CPU, busy_processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")

# Prints what a second thread sees of a main thread that computes or sleeps, second by second.
PROGRAM = f"""
import hashlib, json, os, sys, threading, time
from deta.platform.learning.thread_activity import ThreadActivity

def look():
    activity = ThreadActivity()
    activity.measure()
    for _ in range(6):
        began_s = time.monotonic()
        time.sleep(0.5)
        one = activity.measure()
        row = [time.monotonic() - began_s, one.computed_s, one.starved_s]
        print(json.dumps(row), flush=True)
    os._exit(0)

os.sched_setaffinity(0, {{{LAST_CPU}}})
os.nice(int(sys.argv[2]))
block = bytes(1 << 24)
threading.Thread(target=look).start()
while sys.argv[1] == "computes":
    hashlib.sha256(block)  # without the lock of the interpreter
time.sleep(100)
"""


def shares(what: str, nice: int) -> tuple[float, float]:
    """Return which part of the time the process computed, and was kept from it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, str(nice)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    passed_s = sum(row[0] for row in rows)
    return sum(row[1] for row in rows) / passed_s, sum(row[2] for row in rows) / passed_s


def test_a_thread_that_computes_works_whatever_else_runs():
    computed, starved = shares("computes", 0)
    assert computed + starved > 0.8


def test_a_thread_that_sleeps_does_not_work_whatever_else_runs():
    with busy_processes(3):
        computed, starved = shares("sleeps", 5)
    assert computed + starved < 0.3


def test_a_thread_that_others_keep_from_the_processor_starves():
    with busy_processes(3):
        computed, starved = shares("computes", 10)
    assert computed < 0.3
    assert starved > 0.5


def test_the_first_look_and_the_thread_that_looks_count_for_nothing():
    activity = ThreadActivity()
    assert activity.measure() == Activity(0.0, 0.0)
    until_s = time.thread_time() + 0.3
    while time.thread_time() < until_s:
        pass
    assert activity.measure().computed_s < 0.1


def test_without_proc_the_time_of_the_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deta.platform.learning.thread_activity.THREADS", tmp_path / "none")
    activity = ThreadActivity()
    assert activity.measure() == Activity(0.0, 0.0)
    until_s = time.process_time() + 0.3
    while time.process_time() < until_s:
        pass
    measured = activity.measure()
    assert 0.29 < measured.computed_s < 0.6
    assert measured.starved_s == 0
    time.sleep(0.2)
    assert activity.measure().computed_s < 0.1
