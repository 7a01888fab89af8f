"""Marked processes are found and killed, whatever their parent is now."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import (
    ATTEMPT_MARK,
    RUN_MARK,
    kill_marked,
    marked_processes,
    new_mark,
    terminate,
    working_in,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
# Its child starts a session of its own, as Ray's processes do, and outlives it.
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


def test_all_processes_of_a_mark_are_killed_and_no_others():
    mark, other = new_mark(), new_mark()
    ours, theirs = start(ATTEMPT_MARK, mark, 300), start(ATTEMPT_MARK, other, 300)
    orphan = start(ATTEMPT_MARK, mark, 0)
    orphan.wait()
    assert len(marked_processes(ATTEMPT_MARK, mark)) == 3
    terminate(ours, mark)
    assert marked_processes(ATTEMPT_MARK, mark) == []
    assert len(marked_processes(ATTEMPT_MARK, other)) == 2
    assert kill_marked(ATTEMPT_MARK, other) == 0
    theirs.wait()


def test_a_process_that_exits_when_its_input_closes_is_not_killed():
    mark = new_mark()
    polite = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(7)"],
        env=child_environment({ATTEMPT_MARK: mark}), stdin=subprocess.PIPE,
    )  # fmt: skip
    terminate(polite, mark)
    assert polite.returncode == 7


# As the Ray driver does at its end: it leads a session, in which agents have hidden their mark.
DRIVER = """
import os, subprocess, sys
from deta.platform.system.process_tree import ATTEMPT_MARK, kill_marked
mark = os.environ.pop(ATTEMPT_MARK)
hidden = subprocess.Popen(["sleep", "300"])
os.environ[ATTEMPT_MARK] = mark
print(hidden.pid, kill_marked(ATTEMPT_MARK, mark), hidden.wait(10), flush=True)
"""


def test_a_session_leader_kills_processes_of_its_session_that_hide_their_mark():
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=child_environment({ATTEMPT_MARK: new_mark()}),
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    _, left, code = done.stdout.split()
    assert (left, code) == ("0", str(-signal.SIGKILL))


LEADER = """
import os, subprocess, sys
if os.fork():
    os._exit(0)  # the session leader exits: the session has none now
mark = subprocess.run([sys.executable, "-c", MAKE], stdout=subprocess.PIPE, text=True).stdout
run = subprocess.Popen(["sleep", "300"], env={**os.environ, "DETA_RUN_MARK": mark})
print(mark, os.getpid(), run.pid, flush=True)
sys.stdin.read()
"""


def test_a_session_without_a_leader_survives_a_run_started_in_it():
    # As for processes that a closed shell left running, and under some job schedulers.
    make = "from deta.platform.system.process_tree import new_mark; print(new_mark(), end='')"
    leader = subprocess.Popen(
        [sys.executable, "-c", f"MAKE = {make!r}\n{LEADER}"],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert leader.stdin is not None
    assert leader.stdout is not None
    mark, bystander, run = leader.stdout.readline().split()
    leader.wait(60)
    assert marked_processes(RUN_MARK, mark) == [int(run)]
    assert kill_marked(RUN_MARK, mark) == 0
    assert Path("/proc", bystander).exists()
    leader.stdin.close()


def test_work_continues_when_its_first_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    began, stays = tmp_path / "began", tmp_path / "stays"
    began.mkdir()
    stays.mkdir()
    monkeypatch.chdir(began)
    with working_in(stays):
        began.rmdir()
        began.mkdir()  # another folder of the same name: the first is gone
        done = subprocess.run(
            [sys.executable, "-c", "import os; print(os.getcwd())"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(stays)
    assert Path.cwd() == began
    monkeypatch.chdir(tmp_path)
