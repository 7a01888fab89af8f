"""The processes of one run, found in /proc, and signals to these processes only.

A run's processes start new sessions, change their titles (which overwrites their environment in
/proc) and outlive their parents. So a `Family` scans the process table regularly. It remembers, by
process id and start time, every process that carries the marker or has a known parent.
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
SCAN_EVERY_S = 0.2

# Parts of a command line that show a process's role in a run.
ROLES = {
    "worker": ("ray::RayTrainWorker", "ray::_RayTrainWorker", "RayTrainWorker."),
    "controller": ("ray::TrainController",),
    "raylet": ("raylet/raylet",),
    "gcs": ("gcs_server",),
    "attempt": ("-m deta.platform.cluster.driver",),
    "uploader": ("-m deta.platform.tracking.uploader_main",),
}
CLEANUP = ("deta.platform.launch.orphan_reaper", "deta.platform.tracking.sync_run")


@dataclass(frozen=True)
class Process:
    """A process; `start` distinguishes it from a later one with the same id."""

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
        """Return the CPU time that it has used, in seconds of one core."""
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
    """All processes with a marker in their environment, and all their descendants."""

    def __init__(self, mark: str) -> None:
        self.mark = mark.encode()
        self._known: dict[int, Process] = {}
        self._used_s: dict[Process, float] = {}  # processor time, as far as it was seen
        self._began_s, self._busy_before_s = time.monotonic(), _busy_s()
        self._foreign: dict[int, int] = {}  # pid -> start of others, so that each is read once
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._scan_regularly, daemon=True)
        self._thread.start()

    def alive(self, role: str | None = None) -> list[Process]:
        """Return the running processes, of one role if given."""
        self.scan()
        with self._lock:
            everyone = list(self._known.values())
        return [
            process
            for process in everyone
            if process.alive and (role is None or _has_role(process.command, role))
        ]

    def scan(self) -> None:
        own = os.getpid()
        with self._lock:
            table = {}
            for entry in os.listdir("/proc"):
                if entry.isdigit() and int(entry) != own:
                    stat = _stat(int(entry))
                    if stat is not None:
                        table[int(entry)] = stat
            fresh = True
            while fresh:  # also children of children started since the last scan
                fresh = False
                for pid, (parent, _, start) in table.items():
                    known = self._known.get(pid)
                    if known is not None and known.start == start:
                        continue
                    mother, above = self._known.get(parent), table.get(parent)
                    # Process ids are reused: the parent must be the same process.
                    inherits = mother is not None and above is not None and above[2] == mother.start
                    if inherits or self._has_mark(pid, start):
                        self._known[pid] = Process(pid, start)
                        fresh = True
            for process in self._known.values():
                used_s = process.cpu_s()
                if used_s > 0:  # else it has ended
                    self._used_s[process] = used_s

    def _has_mark(self, pid: int, start: int) -> bool:
        if self._foreign.get(pid) == start:
            return False
        try:
            found = self.mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False
        # A fork before its exec still shows its parent's environment.
        ticks = _uptime_ticks() - start
        if not found and ticks > 300:
            self._foreign[pid] = start
        return found

    def _scan_regularly(self) -> None:
        while not self._closed.wait(SCAN_EVERY_S):
            self.scan()

    def slowdown(self) -> float:
        """Return how much longer work takes because of other processes, on average so far.

        1.0 on a machine that has nothing else to do; 2.0 if others take half of its processors.
        """
        self.scan()
        passed_s = time.monotonic() - self._began_s
        with self._lock:
            own_s = sum(self._used_s.values())
        others_s = _busy_s() - self._busy_before_s - own_s
        share = others_s / (passed_s * (os.cpu_count() or 1)) if passed_s > 0 else 0.0
        # This process, the kernel and what starts meanwhile take a tenth on a quiet machine, too.
        return 1 / (1 - min(0.95, max(0.0, share - 0.1)))

    def wait_until_gone(self, timeout_s: float) -> tuple[float, list[Process]]:
        """Return the seconds until all were gone, and the processes still alive after the time-out.

        Processes that clean up after a killed run do not count.
        """
        began_s = time.monotonic()
        while True:
            left = [p for p in self.alive() if not any(n in p.command for n in CLEANUP)]
            waited_s = time.monotonic() - began_s
            if not left or waited_s > timeout_s:
                return waited_s, left
            time.sleep(0.2)

    def kill(self) -> int:
        """Kill all remaining processes and return their number."""
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
    """Return the parent, state and start of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), fields[0], int(fields[19])


def _busy_s() -> float:
    """Return the processor time of all processes of the machine since it was started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, soft_irq = fields[:7]
    return (user + nice + system + irq + soft_irq) / os.sysconf("SC_CLK_TCK")


def _uptime_ticks() -> int:
    seconds = float(Path("/proc/uptime").read_text().split()[0])
    return int(seconds * os.sysconf("SC_CLK_TCK"))
