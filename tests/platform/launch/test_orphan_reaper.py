"""The orphan reaper kills what a killed supervisor left, and nothing of a run that ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from deta.platform.launch.orphan_reaper import CLEAN_EXIT, start_orphan_reaper
from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import RUN_MARK, kill_marked, marked_processes, new_mark

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
# Its child goes into a session of its own, as Ray's processes do, and outlives it.
PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print("started", flush=True)
time.sleep(float(sys.argv[1]))
"""


def start(name: str, value: str, seconds: float) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(seconds)],
        env=child_environment({name: value}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    return process


def test_the_reaper_kills_what_a_killed_supervisor_left(tmp_path: Path):
    mark = new_mark()
    left = start(RUN_MARK, mark, 300)
    reaper = start_orphan_reaper(mark, tmp_path)
    assert reaper.stdin is not None
    time.sleep(0.5)
    assert len(marked_processes(RUN_MARK, mark)) == 2
    reaper.stdin.close()  # as when the supervisor was killed
    left.wait(60)
    reaper.wait(120)
    assert marked_processes(RUN_MARK, mark) == []


def test_the_reaper_of_a_run_that_ended_does_nothing(tmp_path: Path):
    mark = new_mark()
    left = start(RUN_MARK, mark, 300)
    reaper = start_orphan_reaper(mark, tmp_path)
    reaper.communicate(CLEAN_EXIT, timeout=60)
    assert len(marked_processes(RUN_MARK, mark)) == 2
    kill_marked(RUN_MARK, mark)
    left.wait(60)
