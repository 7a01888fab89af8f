"""Monitors an attempt through the run's folder: journal, failures and heartbeats."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.learning.hang_watchdog import HEARTBEATS, host, stack_files
from deta.platform.run.journal import JOURNAL_FILE, read_events
from deta.platform.run.run import FAILURES, Run
from deta.platform.run.run_file import RUN_FILE

# Watchdogs write a heartbeat every 5 s. After this time without any, not even the watchdogs run,
# and Ray, which replaces workers that exit, has not replaced them.
SILENCE_S = 120.0
LONGEST_LOOK_S = 5.0  # a longer time between two looks is a stop of this process, not silence
READ_ONLY_S = 10.0  # how long a read-only disk is tolerated


_Version = tuple[int, int, int]  # of a file: inode, modification time, bytes


class RunFailedError(RuntimeError):
    """The run cannot continue; the message has the reason."""


class AttemptMonitor:
    """The state of a run and of its current attempt; `poll` reads what is new.

    It compares no times of files: the clocks of workers and file servers differ from the one here,
    and any of them may be set. What counts is whether a file changes while this process looks.
    """

    def __init__(
        self, run: Run, on_event: Callable[[dict[str, Any]], None] = lambda event: None
    ) -> None:
        """
        Args:
            on_event: receives every new event of the journal.
        """
        self.run, self.on_event = run, on_event
        journal = run.folder / JOURNAL_FILE
        # For a resumed run, print new events only.
        self._offset = journal.stat().st_size if journal.exists() else 0
        self.step = 0  # the last one that was reported
        self.start_step = 0  # where the last start began
        self.num_starts = 0
        self.fruitless_starts = 0  # in a row, that began at the same step as another
        self.ended = self.stopped = False
        self.end_reason = ""
        self._writable_s = time.monotonic()  # when the folder was last writable
        self.begin_attempt()

    def begin_attempt(self) -> None:
        self._failures_before_attempt = _versions(self.run.folder / FAILURES)
        self._expect_start()
        self.has_started = self.has_begun = False
        self.num_workers = 0
        self._evaluating_step: int | None = None
        self._saved_step = -1

    def _expect_start(self) -> None:
        """Regard what the folder has now as left over from earlier starts."""
        self._failures_before_start = _versions(self.run.folder / FAILURES)
        self._old_stacks = stack_files(self.run.folder)
        self._heartbeats = _versions(self.run.folder / HEARTBEATS)
        self._looked_s, self._silent_s = time.monotonic(), 0.0

    def poll(self) -> None:
        """Read new events of the journal."""
        for event, offset in read_events(self.run.folder, self._offset):
            self._offset = offset
            self._update(event)
            self.on_event(event)

    def _update(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "starting":
            self.has_started, self.num_workers = True, 0
            self._expect_start()
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
        """Return whether an evaluation is running and the state before it is saved."""
        return self._evaluating_step is not None and self._saved_step >= self._evaluating_step

    @property
    def failed_since_start(self) -> bool:
        return bool(self._failures(self._failures_before_start))

    def permanent_failure(self) -> str:
        """Return the failure of a worker that a retry would repeat; empty if there is none."""
        for failure in self._failures(self._failures_before_attempt):
            if failure["comes_again"]:
                return str(failure["message"])
        return ""

    def last_failure(self) -> str:
        """Return a failure of this attempt; rather a cause than a lost connection to a peer."""
        found = [
            f"{f['type']}: {f['message']}" for f in self._failures(self._failures_before_attempt)
        ]
        # Workers whose peer has died report a lost connection.
        own = [text for text in found if "onnection" not in text and "peer" not in text]
        return (own or (["a worker was lost"] if found else [""]))[0]

    def require_progress(self, message: str = "", failed_attempts: int = 0) -> None:
        """Fail a run that restarts again and again without progress.

        Args:
            message: why the last attempt ended, unless a worker has reported a failure.
            failed_attempts: attempts in a row whose workers did not start.

        Raises:
            RunFailedError: `cluster.max_fruitless_starts` starts in a row made no progress.
        """
        limit = self.run.config.cluster.max_fruitless_starts
        count = max(self.fruitless_starts, failed_attempts)
        if count >= limit:
            raise RunFailedError(
                f"{count} starts in a row made no progress beyond step {self.start_step} "
                f"(cluster.max_fruitless_starts={limit}). The last failure: "
                f"{self.last_failure() or message}"
            )

    def require_writable(self, tolerance_s: float = READ_ONLY_S) -> bool:
        """Return whether the folder is writable now.

        A full disk may get space again; a read-only one needs a person.

        Raises:
            RunFailedError: it has not been writable for `tolerance_s`.
        """
        if is_writable(self.run.folder / RUN_FILE):
            self._writable_s = time.monotonic()
            return True
        if tolerance_s == 0 or time.monotonic() - self._writable_s > tolerance_s:
            raise RunFailedError(
                f"{self.run.folder}: cannot be written to any more (the file system is read-only), "
                "so no progress could be saved. Make it writable; then --resume continues from "
                f"{resume_point(self.run)}"
            )
        return False

    def hang(self) -> str:
        """Return why the training hangs; empty while it makes progress."""
        return self.hung_worker() or self.missing_heartbeats()

    def hung_worker(self) -> str:
        """Return what a watchdog reported that ended its worker, with the path of the stacks."""
        new = stack_files(self.run.folder) - self._old_stacks
        if not new:
            return ""
        # The first one; its peers ended because it did.
        path = min(new, key=lambda one: (one.stat().st_mtime, one.name))
        first_line = path.read_text(errors="replace").partition("\n")[0]
        return f"the training hung ({first_line} {path})"

    def missing_heartbeats(self) -> str:
        """Return how long not even the watchdogs sent heartbeats, if that is too long."""
        if not self.has_begun:
            return ""
        now_s, heartbeats = time.monotonic(), _versions(self.run.folder / HEARTBEATS)
        if heartbeats != self._heartbeats:
            self._heartbeats, self._silent_s = heartbeats, 0.0
        else:
            self._silent_s += min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        if self._silent_s > max(SILENCE_S, 2 * self.run.config.cluster.hang_timeout_s):
            return f"no heartbeat from any worker for {self._silent_s:.0f} s"
        return ""

    def local_workers(self) -> list[int]:
        """Return the process ids of this start's workers; empty if one is on another machine."""
        processes = []
        for rank in range(self.num_workers):
            try:
                path = self.run.folder / HEARTBEATS / f"rank-{rank}.json"
                heartbeat = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):  # no heartbeat yet
                return []
            if heartbeat["host"] != host():
                return []
            processes.append(int(heartbeat["pid"]))
        return processes

    def _failures(self, before: dict[str, _Version]) -> list[dict[str, Any]]:
        """Return the failures that workers have reported since."""
        found = []
        for name, version in sorted(_versions(self.run.folder / FAILURES).items()):
            if version != before.get(name):
                with contextlib.suppress(OSError, ValueError):  # being replaced
                    path = self.run.folder / FAILURES / name
                    found.append(json.loads(path.read_text(encoding="utf-8")))
        return found


def _versions(folder: Path) -> dict[str, _Version]:
    """Return what changes whenever a worker writes its file in a folder, by file."""
    found = {}
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # network disks look again
            status = os.fstat(file.fileno())
            found[path.name] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def resume_point(run: Run) -> str:
    """Return the name of the checkpoint that the run continues from."""
    newest = newest_checkpoint(run.checkpoints)
    return newest.path.name if newest is not None else "the beginning"


def is_writable(file: Path) -> bool:
    """Return whether an existing file may be changed. Nothing is written; a full disk counts.

    The file is opened for writing: after an error, ext4 refuses to write (Linux 6.15 and later)
    although neither the mode nor the flags of the file system show it.
    """
    try:
        os.close(os.open(file, os.O_WRONLY))
    except OSError as error:
        return error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
    return True
