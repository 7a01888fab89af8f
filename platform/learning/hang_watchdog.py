"""Hang watchdog: a thread that detects when its worker makes no progress.

A worker that waits for a hung peer cannot report that itself. This thread writes the stacks of all
threads to the folder of the run and exits the process. The watchdogs of its peers see the file and
do the same, so the stacks of the hung peer are recorded too. The group then restarts from the last
checkpoint. A heartbeat file shows the supervisor that a worker is alive.

Slow is not hung: the clock of a phase stands while a thread of the worker computes or is kept from
it by other processes, and goes back by the time that a peer worked. Steps, phases and the load of
the machine so decide together how long a step may take.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deta.platform.learning.thread_activity import Activity, ThreadActivity
from deta.platform.system.atomic_write import write_json

Phase = Literal["starting", "data", "peers", "step", "evaluating", "saving"]
# Time limit of a phase, in multiples of the hang timeout. Steps have a rule of their own. A wait
# for data may be due to a slow disk, which a restart would not make faster; who waits for peers
# waits as long as their phases may take, as long as they show that they live.
PHASE_LIMITS: dict[Phase, float] = {
    "starting": 20, "data": 10, "peers": 1, "step": 1, "evaluating": 40, "saving": 40,
}  # fmt: skip
USUAL_STEPS_LIMIT = 10  # a step may take this many times the median
# Who computes without an end, or always waits for a processor, is given up after this many times
# the limit.
BUSY_LIMIT = 10
WRITE_EVERY_S = 5.0  # the heartbeat file; a file that stays the same for three times that is old
EXIT_CODE = 70  # of a process that its watchdog exited
STACKS, HEARTBEATS = "stacks", "heartbeats"


@dataclass(frozen=True)
class _Peer:
    """What the heartbeat file of a peer says."""

    content: str
    # When this process saw the content change. Clocks of other machines, and those of file servers,
    # may differ.
    changed_s: float
    limit_s: float
    worked_s: float


class Watchdog:
    """Watches the thread that calls `heartbeat`."""

    def __init__(
        self, run_folder: Path, rank: int, hang_timeout_s: float, *, spins: bool = False
    ) -> None:
        """
        Args:
            spins: whether a wait for the device uses a processor, as CUDA's waits do. Processor
                time is no sign of life then; being kept from a processor still is.
        """
        self._folder, self._rank, self._timeout_s = run_folder, rank, hang_timeout_s
        self._spins = spins
        self._phase: Phase = "starting"
        self._since_s = time.monotonic()
        self._steps_s: deque[float] = deque(maxlen=20)
        self._old_stacks = stack_files(run_folder)
        self._write_every_s = min(WRITE_EVERY_S, hang_timeout_s / 2)
        self._activity = ThreadActivity()
        self._ticked_s = self._since_s  # when the watchdog last looked
        self._seen_s = -float("inf")  # the heartbeat that it then knew
        self._passed_s = 0.0  # since the last heartbeat, as far as the watchdog itself could run
        self._idle_s = 0.0  # of that, the time in which neither this worker nor a peer worked
        self._worked_s = 0.0  # in all; tells the peers
        self._peers: dict[Path, _Peer] = {}
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self, phase: Phase) -> None:
        """Record progress and the phase that begins now. Costs less than a microsecond."""
        now_s = time.monotonic()
        if self._phase == "step":
            self._steps_s.append(now_s - self._since_s)
        self._phase, self._since_s = phase, now_s

    def close(self) -> None:
        self._ended.set()

    @property
    def limit_s(self) -> float:
        """Return the time limit of the current phase, for time in which nobody works."""
        if self._phase == "peers":
            # A peer that reaches its own limit ends itself, with better stacks.
            return 1.1 * max(
                (peer.limit_s for peer in self._living_peers()), default=self._timeout_s
            )
        return self._own_limit_s

    @property
    def _own_limit_s(self) -> float:
        """Return the limit of the current phase, whatever the peers do."""
        limit_s = PHASE_LIMITS[self._phase] * self._timeout_s
        if self._phase != "step":
            return limit_s
        if len(self._steps_s) < 3:  # kernels are selected and memory is allocated
            return limit_s * 10
        return max(limit_s, USUAL_STEPS_LIMIT * statistics.median(self._steps_s))

    def _living_peers(self) -> list[_Peer]:
        now_s, old_s = time.monotonic(), 3 * self._write_every_s
        return [peer for peer in self._peers.values() if now_s - peer.changed_s < old_s]

    def _read_peers(self) -> float:
        """Read the heartbeat files that changed; return how long a peer worked meanwhile."""
        now_s, worked_s = time.monotonic(), 0.0
        for path in (self._folder / HEARTBEATS).glob("rank-*.json"):
            if path.name == f"rank-{self._rank}.json":
                continue
            try:
                content = path.read_text(encoding="utf-8")
                values = json.loads(content)
                new = _Peer(content, now_s, float(values["limit_s"]), float(values["worked_s"]))
            except (OSError, ValueError, KeyError, TypeError):  # it is being replaced
                continue
            old = self._peers.get(path)
            if old is not None and old.content == content:
                continue
            self._peers[path] = new
            if old is not None:  # a frozen peer writes no more, so what it writes is true
                more_s = min(new.worked_s - old.worked_s, now_s - old.changed_s)
                worked_s = max(worked_s, more_s)
        return worked_s

    def _tick(self, every_s: float) -> None:
        """Advance the clock of the phase by the time in which nobody worked."""
        now_s, since_s = time.monotonic(), self._since_s
        # If this thread could not run, either, the process was stopped or the machine stood.
        passed_s = min(now_s - self._ticked_s, 2 * every_s)
        self._ticked_s = now_s
        if since_s != self._seen_s:
            self._seen_s = since_s
            self._passed_s = self._idle_s = min(now_s - since_s, passed_s)
            self._worked_s += passed_s
            self._activity = ThreadActivity()  # counts from the next look on
            self._activity.measure()
            self._read_peers()
            return
        worked_s = min(self._work(self._activity.measure()), passed_s)
        self._worked_s += worked_s
        self._passed_s += passed_s
        self._idle_s = max(0.0, self._idle_s + passed_s - worked_s - self._read_peers())

    def _work(self, activity: Activity) -> float:
        return activity.starved_s + (0.0 if self._spins else activity.computed_s)

    def _watch(self) -> None:
        (self._folder / HEARTBEATS).mkdir(exist_ok=True)
        path = self._folder / HEARTBEATS / f"rank-{self._rank}.json"
        written_s = -float("inf")
        every_s = min(1.0, self._timeout_s / 5)
        while not self._ended.wait(every_s):
            self._tick(every_s)
            limit_s, phase = self.limit_s, self._phase
            if time.monotonic() - written_s > self._write_every_s:
                written_s = time.monotonic()
                content = {
                    "phase": phase, "time_s": time.time(), "pid": os.getpid(), "host": host(),
                    "limit_s": self._own_limit_s, "worked_s": self._worked_s,
                }  # fmt: skip
                with contextlib.suppress(OSError):  # a full disk must not stop the training
                    write_json(path, content)
            if self._seen_s == self._since_s:  # else a heartbeat came while this thread looked
                self._exit_if_hung(phase, limit_s)
            if stack_files(self._folder) - self._old_stacks:
                self._exit(
                    f"a peer exited; this rank had been in phase {phase!r} for "
                    f"{self._passed_s:.0f} s"
                )

    def _exit_if_hung(self, phase: Phase, limit_s: float) -> None:
        if self._idle_s > limit_s:
            self._exit(f"no progress for {self._idle_s:.0f} s in phase {phase!r}, {_load()}")
        if self._passed_s > BUSY_LIMIT * limit_s:
            self._exit(
                f"no progress for {self._passed_s:.0f} s in phase {phase!r}, although it or a peer "
                f"computes, {_load()}"
            )

    def _exit(self, what: str) -> None:
        try:
            folder = self._folder / STACKS
            folder.mkdir(exist_ok=True)
            name = f"rank-{self._rank}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
            with (folder / name).open("w", encoding="utf-8") as file:
                file.write(
                    f"rank {self._rank}, process {os.getpid()} on {host()}: {what}. "
                    "Stacks of its threads:\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file)
        finally:
            os._exit(EXIT_CODE)


def stack_files(run_folder: Path) -> frozenset[Path]:
    """Return the stack files that watchdogs of this run wrote, also in earlier attempts."""
    return frozenset((run_folder / STACKS).glob("rank-*.txt"))


def _load() -> str:
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"


def host() -> str:
    return socket.gethostname()
