"""What the threads of this process do: how long they computed, or waited for a processor.

Linux shows both in /proc. A thread in state R computes or would like to; one that waits for a
message, a lock or a disk is in another state, on a busy machine as on a quiet one.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

THREADS = Path("/proc/self/task")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Activity:
    """A time in which at least one thread computed or was kept from it, in seconds."""

    computed_s: float
    starved_s: float


@dataclass
class ThreadActivity:
    """Measures between two calls of `measure`; the thread that calls it does not count."""

    _used_s: dict[str, float] = field(default_factory=dict)
    _process_s: float = 0.0
    _looked_s: float = float("-inf")

    def measure(self) -> Activity:
        """Return what the busiest thread has done since the last call.

        Takes about 15 µs for each thread. Where there is no /proc, the processor time of the whole
        process counts, and nobody starves.
        """
        now_s, process_s = time.monotonic(), time.process_time()
        passed_s = now_s - self._looked_s
        threads = _threads()
        busiest = Activity(0.0, 0.0)
        if not threads:
            busiest = Activity(min(process_s - self._process_s, passed_s), 0.0)
        threads.pop(str(threading.get_native_id()), None)
        for thread, (state, used_s) in threads.items():
            if thread in self._used_s:
                computed_s = min(used_s - self._used_s[thread], passed_s)
                # One look stands for the whole time, as in a profiler that samples.
                starved_s = passed_s - computed_s if state == "R" else 0.0
                one = Activity(computed_s, starved_s)
                busiest = max(busiest, one, key=lambda o: o.computed_s + o.starved_s)
        is_first = self._looked_s == float("-inf")
        self._looked_s, self._process_s = now_s, process_s
        self._used_s = {thread: used_s for thread, (_, used_s) in threads.items()}
        return Activity(0.0, 0.0) if is_first else busiest


def _threads() -> dict[str, tuple[str, float]]:
    """Return state and processor time of all threads, in seconds, by id; empty without /proc."""
    found = {}
    with contextlib.suppress(OSError):
        for folder in THREADS.iterdir():
            with contextlib.suppress(OSError):  # the thread has ended
                # The name of a thread may have spaces and brackets.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                ticks = int(fields[11]) + int(fields[12])
                found[folder.name] = fields[0], ticks / TICKS_PER_S
    return found
