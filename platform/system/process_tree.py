"""Ending all processes of a run, also those that Ray started and that belong to no family any more.

Every process that a run starts inherits a mark in its environment, whoever its parent is by then.
A mark names the session it was made in: that one, a person's shell perhaps, is never the run's own.
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

RUN_MARK = "DETA_RUN_MARK"  # of all that a supervisor starts
ATTEMPT_MARK = "DETA_ATTEMPT_MARK"  # of the Ray driver, and of a cluster that it started
EXIT_GRACE_S = 2.0  # a Ray driver whose supervisor let go of it, or is gone


def new_mark() -> str:
    """A value for `RUN_MARK` or `ATTEMPT_MARK`, different each time."""
    return f"{uuid.uuid4().hex}@{os.getsid(0)}"


def marked_processes(name: str, value: str) -> list[int]:
    """Ids of the processes that carry a mark, and of all in sessions that such a process began.

    A process that changes its title, as Ray's agents do, overwrites its environment; then only its
    session tells whose it is. Those that have ended are left out, and this process.
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
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    # Began by a marked process: its leader is one, or is gone and left the session to its children.
    began = {
        sessions[pid] for pid in found if sessions[pid] in found or sessions[pid] not in sessions
    } - {home, os.getsid(0)}
    return sorted(
        pid
        for pid, session in sessions.items()
        if (pid in found or session in began) and pid != os.getpid()
    )


def kill_marked(name: str, value: str, within_s: float = 10.0) -> int:
    """Kill all that carry a mark, and what they start meanwhile; returns how many are left."""
    deadline_s = time.monotonic() + within_s
    while (alive := marked_processes(name, value)) and time.monotonic() < deadline_s:
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return len(alive)


def terminate(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a process that was started with `ATTEMPT_MARK`, and all that came of it.

    It is asked first, by the end of its input, and killed if it does not go.
    """
    assert process.stdin is not None
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(EXIT_GRACE_S)
    if process.poll() is None:
        process.kill()
    kill_marked(ATTEMPT_MARK, mark)
    process.wait()


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work from a folder that stays, and so do the processes that are started from here.

    A job's own may go: two Ray nodes on one machine unpack it to one place, the second over the
    first.
    """
    try:
        before = os.getcwd()
    except FileNotFoundError:
        before = None
    os.chdir(folder)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError):
                os.chdir(before)
