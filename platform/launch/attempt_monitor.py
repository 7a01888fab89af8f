"""What a supervisor sees of an attempt: its journal, its failures, its signs of life."""

from __future__ import annotations

import json
import time
from typing import Any

from deta.platform.launch.console import Console
from deta.platform.learning.hang_watchdog import HEARTBEATS, host, stack_files
from deta.platform.run.journal import JOURNAL_FILE, read_events
from deta.platform.run.run import FAILURES, Run

# Watchdogs write every 5 s. Where none has for so long, not even they run any more; and Ray, which
# replaces what it sees die, has not either.
SILENCE_S = 120.0


class Vigil:
    """Follows a run's folder; `look` brings it up to date and shows what is new."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console
        journal = run.folder / JOURNAL_FILE
        # A resumed run shows what is new.
        self._offset = journal.stat().st_size if journal.exists() else 0
        self.step = 0  # the last one heard of
        self.start_step = 0  # where the last start began
        self.num_starts = 0
        self.fruitless_starts = 0  # in a row, that began where another had
        self.ended = self.stopped = False
        self.end_reason = ""
        self.begin_attempt()

    def begin_attempt(self) -> None:
        self._attempt_began_s = self._started_s = time.time()
        self._old_stacks = stack_files(self.run.folder)
        self.has_started = self.has_begun = False
        self.num_workers = 0
        self._evaluating_step: int | None = None
        self._saved_step = -1

    def look(self) -> None:
        for event, offset in read_events(self.run.folder, self._offset):
            self._offset = offset
            self._take(event)
            self.console.show(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "starting":
            self.has_started, self.num_workers = True, 0
            self._started_s = event["time_s"]
            self._old_stacks = stack_files(self.run.folder)
            is_further = self.num_starts == 0 or event["step"] > self.start_step
            self.fruitless_starts = 1 if is_further else self.fruitless_starts + 1
            self.num_starts += 1
            self.start_step = event["step"]
            self._evaluating_step, self._saved_step = None, event["step"]
        elif kind == "begin":
            self.has_begun, self.num_workers = True, event["world_size"]
        elif kind == "evaluating":
            self._evaluating_step = event["step"]
        elif kind == "checkpoint":
            self._saved_step = event["step"]
        elif kind == "stopping":
            self.stopped = True
        elif kind == "end":
            self.ended, self.end_reason = True, event.get("reason", "")
        if kind in ("progress", "evaluating", "evaluation"):
            self.step = event["step"]
            if kind != "evaluating":
                self._evaluating_step = None

    @property
    def is_safe_to_kill(self) -> bool:
        """An evaluation is under way, and the state before it is saved."""
        return self._evaluating_step is not None and self._saved_step >= self._evaluating_step

    @property
    def failed_since_start(self) -> bool:
        return bool(self._failures(self._started_s))

    def failure_that_comes_again(self) -> str:
        """What went wrong on a worker, where another try would end alike; nothing otherwise."""
        for failure in self._failures(self._attempt_began_s):
            if failure["comes_again"]:
                return str(failure["message"])
        return ""

    def last_failure(self) -> str:
        """What went wrong on a worker in this attempt; its own fault rather than its peers'."""
        found = [f"{f['type']}: {f['message']}" for f in self._failures(self._attempt_began_s)]
        # Workers whose peer is gone complain of the connection.
        own = [text for text in found if "onnection" not in text and "peer" not in text]
        return (own or (["a worker was lost"] if found else [""]))[0]

    def hang(self) -> str:
        """That the training stands still; nothing while it gets on."""
        return self.standstill() or self.silence()

    def standstill(self) -> str:
        """A worker's watchdog has ended it; says why, and where the stacks are."""
        new = stack_files(self.run.folder) - self._old_stacks
        if not new:
            return ""
        # Not a peer's, which ended because this one did.
        path = min(new, key=lambda one: (one.stat().st_mtime, one.name))
        first_line = path.read_text(errors="replace").partition("\n")[0]
        return f"the training stood still ({first_line} {path})"

    def silence(self) -> str:
        """Not even the watchdogs of the workers are heard of."""
        if not self.has_begun:
            return ""
        beats = list((self.run.folder / HEARTBEATS).glob("rank-*.json"))
        newest_s = max((path.stat().st_mtime for path in beats), default=self._started_s)
        silent_s = time.time() - max(newest_s, self._started_s)
        if silent_s > max(SILENCE_S, 2 * self.run.config.cluster.hang_timeout_s):
            return f"no sign of life from any worker for {silent_s:.0f} s"
        return ""

    def local_workers(self) -> list[int]:
        """Ids of the processes of this start's workers; none where one is on another machine."""
        processes = []
        for rank in range(self.num_workers):
            try:
                path = self.run.folder / HEARTBEATS / f"rank-{rank}.json"
                said = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # not heard of yet
                return []
            if said["host"] != host():
                return []
            processes.append(int(said["pid"]))
        return processes

    def _failures(self, since_s: float) -> list[dict[str, Any]]:
        found = []
        folder = self.run.folder / FAILURES
        for path in sorted(folder.glob("rank-*.json")) if folder.is_dir() else ():
            try:
                if path.stat().st_mtime > since_s:
                    found.append(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):  # being replaced
                continue
        return found
