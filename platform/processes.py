"""Ending all processes of a run, also those that Ray started and that belong to no family any more.

Every process that a run starts inherits a mark in its environment, whoever its parent is by then.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

RUN_MARK = "DETA_RUN_MARK"  # of all that a supervisor starts
ATTEMPT_MARK = "DETA_ATTEMPT_MARK"  # of the Ray driver, and of a cluster that it started


def marked(name: str, value: str) -> list[int]:
    """Ids of the processes that carry a mark, and of all that descend from them.

    A process that changes its title, as Ray's agents do, overwrites its environment; then only its
    parent tells whose it is. Those that have ended are left out, and this process.
    """
    wanted = f"{name}={value}".encode()
    children: dict[int, list[int]] = {}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state in "ZX":
                continue
            children.setdefault(int(parent), []).append(int(folder.name))
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    family = set(found) - {os.getpid()}
    unvisited = list(family)
    while unvisited:
        new = set(children.get(unvisited.pop(), ())) - family - {os.getpid()}
        family |= new
        unvisited += new
    return sorted(family)


def end_marked(name: str, value: str, within_s: float = 10.0) -> int:
    """Kill all that carry a mark, and what they start meanwhile; returns how many are left."""
    deadline_s = time.monotonic() + within_s
    while (alive := marked(name, value)) and time.monotonic() < deadline_s:
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return len(alive)


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a process that was started with `ATTEMPT_MARK`, and all that came of it."""
    if process.poll() is None:
        process.kill()
    end_marked(ATTEMPT_MARK, mark)
    process.wait()


def environment(marks: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with marks, for one that imports the same code."""
    root = str(Path(__file__).absolute().parents[2])  # not resolved: above deta/, which has links
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **marks}
