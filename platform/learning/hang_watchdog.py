"""Hang watchdog: a thread that detects when its worker makes no progress.

A worker that waits for a hung peer cannot report that itself. This thread writes the stacks of all
threads to the folder of the run and exits the process. The watchdogs of its peers see the file and
do the same, so the stacks of the hung peer are recorded too. The group then restarts from the last
checkpoint. A heartbeat file shows the supervisor that a worker is alive.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from deta.platform.system.atomic_write import write_json

Phase = Literal["starting", "data", "peers", "step", "evaluating", "saving"]
# Time limit of a phase, in multiples of the hang timeout. Steps have a rule of their own. A wait
# for data may be due to a slow disk, which a restart would not make faster; who waits for peers
# waits as long as their phases may take, as long as they show that they live.
PHASE_LIMITS: dict[Phase, float] = {
    "starting": 20, "data": 10, "peers": 1, "step": 1, "evaluating": 40, "saving": 40,
}  # fmt: skip
USUAL_STEPS_LIMIT = 10  # a step may take this many times the median
WRITE_EVERY_S = 5.0  # the heartbeat file; a file that stays the same for three times that is old
EXIT_CODE = 70  # of a process that its watchdog exited
STACKS, HEARTBEATS = "stacks", "heartbeats"


class Watchdog:
    """Watches the thread that calls `heartbeat`."""

    def __init__(self, run_folder: Path, rank: int, hang_timeout_s: float) -> None:
        self._folder, self._rank, self._timeout_s = run_folder, rank, hang_timeout_s
        self._phase: Phase = "starting"
        self._since_s = time.monotonic()
        self._steps_s: deque[float] = deque(maxlen=20)
        self._old_stacks = stack_files(run_folder)
        self._write_every_s = min(WRITE_EVERY_S, hang_timeout_s / 2)
        # By file of a peer: its last content, and when this process saw it change. Clocks of other
        # machines, and those of file servers, may differ.
        self._peers: dict[Path, tuple[str, float]] = {}
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
        """Return the time limit of the current phase."""
        limit_s = PHASE_LIMITS[self._phase] * self._timeout_s
        if self._phase == "peers":
            longest = max((PHASE_LIMITS[phase] for phase in self._phases_of_peers()), default=1)
            # A peer that reaches its own limit ends itself, with better stacks.
            return 1.1 * longest * self._timeout_s
        if self._phase != "step":
            return limit_s
        if len(self._steps_s) < 3:  # kernels are selected and memory is allocated
            return limit_s * 10
        return max(limit_s, USUAL_STEPS_LIMIT * statistics.median(self._steps_s))

    def _phases_of_peers(self) -> Iterator[Phase]:
        """Yield the phases of the peers whose heartbeat files still change."""
        now_s = time.monotonic()
        for path in (self._folder / HEARTBEATS).glob("rank-*.json"):
            if path.name == f"rank-{self._rank}.json":
                continue
            try:
                content = path.read_text(encoding="utf-8")
                phase = json.loads(content)["phase"]
            except (OSError, ValueError, KeyError, TypeError):  # it is being replaced
                continue
            before, changed_s = self._peers.get(path, ("", now_s))
            if content != before:
                changed_s = now_s
                self._peers[path] = content, now_s
            if now_s - changed_s < 3 * self._write_every_s and phase in PHASE_LIMITS:
                yield phase

    def _watch(self) -> None:
        (self._folder / HEARTBEATS).mkdir(exist_ok=True)
        path = self._folder / HEARTBEATS / f"rank-{self._rank}.json"
        written_s = -float("inf")
        while not self._ended.wait(min(1.0, self._timeout_s / 5)):
            now_s = time.monotonic()
            idle_s, limit_s, phase = now_s - self._since_s, self.limit_s, self._phase
            if now_s - written_s > self._write_every_s:
                written_s = now_s
                content = {"phase": phase, "time_s": time.time(), "pid": os.getpid()}
                with contextlib.suppress(OSError):  # a full disk must not stop the training
                    write_json(path, content | {"host": host()})
            if idle_s > limit_s:
                self._exit(f"no progress for {idle_s:.0f} s in phase {phase!r}")
            if stack_files(self._folder) - self._old_stacks:
                self._exit(
                    f"a peer exited; this rank had been in phase {phase!r} for {idle_s:.0f} s"
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


def host() -> str:
    return socket.gethostname()
