"""The processes of one run, found in /proc, and signals to them and to no others.

A run's processes end in new sessions, change their titles (and with them, what /proc shows of
their environment) and outlive their parents. So a `Family` looks at the process table again and
again and remembers, by number and start time, every process that carries the mark or whose parent
it knows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

MARK = "DETA_CHAOS_MARK"  # environment variable of everything that a scenario starts
LOOK_EVERY_S = 0.2

# What a process's command line says of its part in a run.
ROLES = {
    "worker": ("ray::RayTrainWorker", "ray::_RayTrainWorker", "RayTrainWorker."),
    "controller": ("ray::TrainController",),
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs_server",),
    "attempt": ("-m deta.platform.cluster.driver",),
    "uploader": ("-m deta.platform.tracking.uploader_main",),
}
TIDYING = ("deta.platform.launch.orphan_reaper", "deta.platform.tracking.sync_run")


@dataclass(frozen=True)
class Process:
    """A process that was seen; `start` tells it from a later one of the same number."""

    pid: int
    start: int  # clock ticks since boot

    @property
    def alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[2] == self.start and found[1] not in "ZX"

    @property
    def command(self) -> str:
        try:
            raw = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return ""
        return raw.replace(b"\0", b" ").decode(errors="replace").strip()

    def send(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def cpu_s(self) -> float:
        """Seconds of a core that it has used."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self) -> int:
        try:
            text = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        lines = [line for line in text.splitlines() if line.startswith("VmRSS")]
        return int(lines[0].split()[1]) if lines else 0


class Family:
    """All processes with a mark in their environment, and all that descend from them."""

    def __init__(self, mark: str) -> None:
        self.mark = mark.encode()
        self._known: dict[int, Process] = {}
        self._foreign: dict[int, int] = {}  # of others, by number: start, so as to read once
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, daemon=True)
        self._thread.start()

    def alive(self, role: str | None = None) -> list[Process]:
        """Those that run now; of one role only if given."""
        self.look()
        with self._lock:
            everyone = list(self._known.values())
        return [
            process
            for process in everyone
            if process.alive and (role is None or _has_role(process.command, role))
        ]

    def look(self) -> None:
        own = os.getpid()
        with self._lock:
            table = {}
            for entry in os.listdir("/proc"):
                if entry.isdigit() and int(entry) != own:
                    stat = _stat(int(entry))
                    if stat is not None:
                        table[int(entry)] = stat
            fresh = True
            while fresh:  # children of children that came since the last look
                fresh = False
                for pid, (parent, _, start) in table.items():
                    known = self._known.get(pid)
                    if known is not None and known.start == start:
                        continue
                    mother, above = self._known.get(parent), table.get(parent)
                    # Numbers are given anew: it must be the same process, not one of that number.
                    inherits = mother is not None and above is not None and above[2] == mother.start
                    if inherits or self._has_mark(pid, start):
                        self._known[pid] = Process(pid, start)
                        fresh = True

    def _has_mark(self, pid: int, start: int) -> bool:
        if self._foreign.get(pid) == start:
            return False
        try:
            found = self.mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        # A fork that has not yet been replaced by its program shows its parent's environment.
        ticks = _uptime_ticks() - start
        if not found and ticks > 300:
            self._foreign[pid] = start
        return found

    def _keep_looking(self) -> None:
        while not self._closed.wait(LOOK_EVERY_S):
            self.look()

    def wait_until_gone(self, timeout_s: float) -> tuple[float, list[Process]]:
        """Seconds until none was left, and who was still there at the end of the time.

        What tidies up behind a run that was killed does not count.
        """
        began_s = time.monotonic()
        while True:
            left = [p for p in self.alive() if not any(n in p.command for n in TIDYING)]
            waited_s = time.monotonic() - began_s
            if not left or waited_s > timeout_s:
                return waited_s, left
            time.sleep(0.2)

    def end(self) -> int:
        """Kill all that is left; the number of them."""
        total = 0
        for _ in range(5):
            left = self.alive()
            if not left:
                break
            total += len(left)
            for process in left:
                process.send(signal.SIGCONT)
                process.send(signal.SIGKILL)
            time.sleep(0.3)
        self._closed.set()
        return total


def _has_role(command: str, role: str) -> bool:
    return any(part in command for part in ROLES[role])


def _stat(pid: int) -> tuple[int, str, int] | None:
    """Parent, state and start of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), fields[0], int(fields[19])


def _uptime_ticks() -> int:
    seconds = float(Path("/proc/uptime").read_text().split()[0])
    return int(seconds * os.sysconf("SC_CLK_TCK"))
