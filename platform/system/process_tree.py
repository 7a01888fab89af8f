"""Kill every process of a run, including orphans that Ray started.

Every process that a run starts inherits a mark in its environment and keeps it when its parent
exits. A mark contains the id of the session that created it, often a user's shell, so that this
session is never killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RUN_MARK = "DETA_RUN_MARK"  # on everything that a supervisor starts
ATTEMPT_MARK = "DETA_ATTEMPT_MARK"  # on the Ray driver and a cluster that it started
EXIT_GRACE_S = 2.0  # for a Ray driver to exit after its supervisor closed its input or died


def new_mark() -> str:
    """Return a new unique value for `RUN_MARK` or `ATTEMPT_MARK`."""
    return f"{uuid.uuid4().hex}@{os.getsid(0)}"


def marked_processes(name: str, value: str) -> list[int]:
    """Return ids of processes that carry a mark, or whose session a marked process started.

    A process that changes its title, as Ray's agents do, overwrites its environment; only its
    session then shows which run it belongs to. Excludes exited processes and this process.
    """
    home = int(value.rpartition("@")[2])
    wanted = f"{name}={value}".encode()
    sessions: dict[int, int] = {}
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if fields[0] in "ZX":
                continue
            sessions[int(folder.name)] = int(fields[3])
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except OSError:  # it exited meanwhile, or belongs to another user
            continue
    # Sessions started by a marked process: their leader carries the mark, or has exited.
    began = {
        sessions[pid] for pid in found if sessions[pid] in found or sessions[pid] not in sessions
    } - {home}
    if os.getsid(0) != os.getpid():  # a leader's session holds only what it started
        began.discard(os.getsid(0))
    found |= {pid for pid, session in sessions.items() if session in began}
    return sorted(found - {os.getpid()})


def kill_marked(name: str, value: str, within_s: float = 10.0) -> int:
    """Kill marked processes and those that they start meanwhile; return how many are left."""
    deadline_s = time.monotonic() + within_s
    while (alive := marked_processes(name, value)) and time.monotonic() < deadline_s:
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return len(alive)


def terminate(process: subprocess.Popen[bytes], mark: str) -> None:
    """Terminate a process that was started with `ATTEMPT_MARK`, and all its descendants.

    Closing its input asks it to exit. It is killed if it does not.
    """
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died before it read all
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(EXIT_GRACE_S)
    if process.poll() is None:
        process.kill()
    kill_marked(ATTEMPT_MARK, mark)
    process.wait()


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Change to a folder that will not be removed, also for processes started in the block.

    The working directory of a Ray job can disappear: two nodes on one machine unpack it to the
    same place, and the second replaces the files of the first.
    """
    before = None
    with suppress(FileNotFoundError):
        before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            os.chdir(before or folder)
