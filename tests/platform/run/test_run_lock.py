"""One supervisor to a run, one worker group that writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deta.platform.run.run_lock import HEARTBEAT_S, RunLock, RunLockedError, is_alive

ROOT = Path(__file__).resolve().parents[3]

HOLD = """
import sys
from pathlib import Path
from deta.platform.run.run_lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
lock.release()
"""

# Eight processes at once, released by the end of a pipe; each tells whether it got the lock.
RACE = """
import os, sys, time
from pathlib import Path
from deta.platform.run.run_lock import RunLock, RunLockedError
for folder in map(Path, sys.argv[1:]):
    go, start = os.pipe()
    verdicts, tell = os.pipe()
    go_home, end = os.pipe()
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(start), os.close(end)
            os.read(go, 1)
            try:
                lock = RunLock.acquire(folder)
            except RunLockedError:
                os.write(tell, b"-")
                os._exit(0)
            os.write(tell, b"+")
            os.read(go_home, 1)
            os.write(tell, b"l" if lock.lost else b"k")
            os._exit(0)  # without giving it back: the next folder's start would not differ
        children.append(pid)
    os.close(go), os.close(start)
    seen = b""
    while len(seen) < 8:
        seen += os.read(verdicts, 8)
    os.close(end), os.close(go_home)
    for pid in children:
        os.waitpid(pid, 0)
    os.close(tell)
    seen += os.read(verdicts, 100)
    os.close(verdicts)
    print("".join(sorted(seen.decode())), flush=True)
"""


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with start(HOLD, folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def edit(folder: Path, **changes: object) -> None:
    """Change what a lock says, in place."""
    path = folder / "run.lock"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def age(folder: Path, seconds: float) -> None:
    then_s = time.time() - seconds
    os.utime(folder / "run.lock", (then_s, then_s))


def test_a_second_process_is_refused_and_told_by_whom(tmp_path: Path):
    with holder(tmp_path) as process:
        assert is_alive(tmp_path)
        began_s = time.monotonic()
        with pytest.raises(RunLockedError, match=f"process {process.pid} on host .* since 20.*UTC"):
            RunLock.acquire(tmp_path)
        assert time.monotonic() - began_s < 5, "it need not watch a fresh heartbeat"
        process.communicate()  # it gives the lock back
    assert not is_alive(tmp_path)
    with RunLock.acquire(tmp_path) as lock:
        assert is_alive(tmp_path)
        assert not lock.lost
    assert not is_alive(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_eight_processes_at_once_one_gets_the_lock(tmp_path: Path):
    """20 times an unused folder, and 20 times one whose owner was killed."""
    folders = [tmp_path / str(number) for number in range(40)]
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
    for folder in folders[20:]:
        folder.mkdir()
        (folder / "run.lock").write_bytes((tmp_path / "run.lock").read_bytes())
    out, _ = start(RACE, *folders).communicate(timeout=120)
    assert out.split() == ["+-------k"] * 40


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        deadline_s = time.monotonic() + 10
        while (
            is_alive(tmp_path) and time.monotonic() < deadline_s
        ):  # still a zombie: not waited for
            time.sleep(0.01)
        with RunLock.acquire(tmp_path) as lock:
            assert not lock.lost


def test_a_number_that_another_process_has_now_is_not_the_owner(tmp_path: Path):
    with holder(tmp_path):
        edit(tmp_path, process_start="1")
        assert not is_alive(tmp_path)
        RunLock.acquire(tmp_path).release()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deta.platform.run.run_lock.HEARTBEAT_S", 0.2)


@pytest.mark.usefixtures("fast")
def test_the_owner_on_another_machine_counts_by_its_heartbeat(tmp_path: Path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
    edit(tmp_path, host="elsewhere", machine="elsewhere")
    age(tmp_path, 0)
    assert is_alive(tmp_path)
    with pytest.raises(RunLockedError, match=r"elsewhere.*again after 30 s"):
        RunLock.acquire(tmp_path)
    age(tmp_path, 25)
    assert is_alive(tmp_path)
    age(tmp_path, 31)
    assert not is_alive(tmp_path)
    RunLock.acquire(tmp_path).release()


@pytest.mark.usefixtures("fast")
def test_an_owner_whose_lock_was_taken_is_told(tmp_path: Path):
    told = threading.Event()
    sleeper = RunLock.acquire(tmp_path, on_lost=told.set)
    (tmp_path / ".run.lock-1").write_bytes((tmp_path / "run.lock").read_bytes())
    assert told.wait(10)
    assert sleeper.lost
    sleeper.release()
    assert (tmp_path / ".run.lock-1").exists(), "what is not ours is not given back"


@pytest.mark.usefixtures("fast")
def test_a_heartbeat_keeps_the_lock(tmp_path: Path):
    with RunLock.acquire(tmp_path):
        age(tmp_path, 100)
        deadline_s = time.monotonic() + 10
        while not is_alive(tmp_path) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert is_alive(tmp_path)


def test_a_clock_that_was_set_takes_the_lock_from_nobody(tmp_path: Path):
    """The heartbeat seems old, and the next one comes while the second process watches."""
    with holder(tmp_path) as process:
        edit(tmp_path, machine="elsewhere")
        for seconds in (3600, -3600):
            age(tmp_path, seconds)
            with pytest.raises(RunLockedError, match=f"process {process.pid}"):
                RunLock.acquire(tmp_path)


@pytest.mark.parametrize("seconds", [-7200, 45, 7200])
def test_a_living_process_of_this_machine_is_believed_before_any_clock(
    tmp_path: Path, seconds: float
):
    with holder(tmp_path) as process:
        age(tmp_path, seconds)
        began_s = time.monotonic()
        assert is_alive(tmp_path)
        with pytest.raises(RunLockedError, match=f"process {process.pid}"):
            RunLock.acquire(tmp_path)
        assert time.monotonic() - began_s < HEARTBEAT_S / 2, "nothing needs to be watched"


@pytest.mark.parametrize("seconds", [-7200, 7200])
def test_a_clock_that_was_set_makes_no_run_of_another_machine_dead_or_alive(
    tmp_path: Path, seconds: float
):
    with holder(tmp_path) as process:
        edit(tmp_path, machine="elsewhere")
        age(tmp_path, seconds)
        assert is_alive(tmp_path)
        process.kill()
        process.wait()
        age(tmp_path, seconds)
        assert not is_alive(tmp_path)


def test_a_frozen_owner_is_replaced(tmp_path: Path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
        age(tmp_path, 25)
        began_s = time.monotonic()
        with RunLock.acquire(tmp_path) as lock:
            assert time.monotonic() - began_s > 5, "a heartbeat must have been due"
            process.send_signal(signal.SIGCONT)
            process.communicate()  # it gives back what it no longer has
            assert not lock.lost
            assert is_alive(tmp_path)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("content", ["", '{"pid": 1}'])
def test_a_lock_that_says_nothing_counts_by_its_age(tmp_path: Path, content: str):
    """Its writer died between creating and writing it, or is about to write it."""
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(RunLockedError, match="try again"):
        RunLock.acquire(tmp_path)
    age(tmp_path, 31)
    RunLock.acquire(tmp_path).release()


def test_dying_while_taking_over_blocks_nobody(tmp_path: Path):
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
    (tmp_path / ".run.lock-1").write_bytes((tmp_path / "run.lock").read_bytes())
    with RunLock.acquire(tmp_path) as lock:
        assert lock.path.name == ".run.lock-2"
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_child_process_does_not_give_the_lock_back(tmp_path: Path):
    with RunLock.acquire(tmp_path) as lock:
        pid = os.fork()
        if pid == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        assert is_alive(tmp_path)
