"""One attempt at a run: starts the Ray driver as a child process and watches it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deta.platform.launch.attempt_monitor import AttemptMonitor, RunFailedError
from deta.platform.launch.console import Console
from deta.platform.run.run import OUTCOME_FILE, STOP_FILE, AttemptOutcome, Run
from deta.platform.run.run_lock import RunLock
from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import (
    ATTEMPT_MARK,
    RUN_MARK,
    marked_processes,
    new_mark,
    terminate,
)

LOG_FILE = "attempt.log"  # the output of the Ray drivers
POLL_EVERY_S = 0.25
GRACE_S = 20.0  # after a request to stop, for a step and a checkpoint
EXIT_WITHIN_S = 2.0  # for all workers, once the watchdog of one has ended it
REPLACED_WITHIN_S = 90.0  # for Ray to replace hung workers


class Attempt:
    """One Ray driver process, from its start to its outcome."""

    def __init__(
        self, run: Run, lock: RunLock, monitor: AttemptMonitor, console: Console, run_mark: str
    ) -> None:
        """
        Args:
            run_mark: the mark of all processes of this run; see `process_tree.py`.
        """
        self.run, self.lock, self.monitor, self.console = run, lock, monitor, console
        self.run_mark = run_mark
        self.mark = new_mark()
        self.process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0  # where the log of this attempt begins, in bytes
        # Of hung workers: their start, when the hang was noticed, whether all of them were killed.
        self._hung_start, self._hung_s, self._are_killed = -1, 0.0, False

    def run_to_end(self) -> AttemptOutcome:
        """Start the Ray driver, and watch it until it ends or the run has ended.

        Raises:
            RunFailedError: the run cannot continue.
        """
        folder = self.run.folder
        while not self.monitor.require_writable():
            time.sleep(POLL_EVERY_S)
        (folder / OUTCOME_FILE).unlink(missing_ok=True)
        self.monitor.begin_attempt()
        with (folder / LOG_FILE).open("ab") as log:
            self._log_offset = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deta.platform.cluster.driver", str(folder)],
                env=child_environment({ATTEMPT_MARK: self.mark}),
                stdin=subprocess.PIPE,  # see `terminate`
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the supervisor, which stops the run
            )
        return self._watch(self.process)

    def request_stop(self) -> None:
        """Request a stop, and wait until the state is saved or `GRACE_S` have passed."""
        self.monitor.poll()
        if self.process is None or self.monitor.ended or not self.monitor.has_begun:
            return
        self.console.echo("stopping: saving the state …")
        (self.run.folder / STOP_FILE).touch()
        deadline_s = time.monotonic() + GRACE_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            time.sleep(0.05)
            self.monitor.poll()
            if self.monitor.stopped or self.monitor.ended or self.monitor.is_safe_to_kill:
                return

    def terminate(self) -> None:
        """End the driver and all its processes."""
        if self.process is not None:
            terminate(self.process, self.mark)
            self.process = None

    def _watch(self, process: subprocess.Popen[bytes]) -> AttemptOutcome:
        has_printed_cluster = False
        ended_s: float | None = None
        while True:
            time.sleep(POLL_EVERY_S)
            self.monitor.poll()
            has_printed_cluster = has_printed_cluster or self._print_cluster()
            if self.lock.lost:
                raise RunFailedError(
                    f"{self.run.folder}: another process has taken over this run, because this one "
                    "sent no heartbeat for too long"
                )
            self.monitor.require_writable()
            if self.monitor.ended:
                ended_s = ended_s or time.monotonic()
                # What remains is Ray's clean-up; all results are written.
                if process.poll() is not None or time.monotonic() - ended_s > 1:
                    return AttemptOutcome("ended")
            failure = self.monitor.permanent_failure()
            if failure:
                raise RunFailedError(failure)
            if process.poll() is not None:
                return self._outcome(process)
            if silence := self.monitor.missing_heartbeats():
                return AttemptOutcome("lost", silence)
            if (hang := self.monitor.hung_worker()) and not self._is_recovering(hang):
                return AttemptOutcome("lost", hang)
            if self.monitor.failed_since_start:
                self.monitor.require_progress()

    def _is_recovering(self, hang: str) -> bool:
        """Return whether to leave it to Ray to replace hung workers.

        Ray replaces workers that exit, in half the time of another attempt. Their watchdogs end
        them. A process that does not run at all is killed here, if it belongs to the cluster that
        this run has started.
        """
        now_s, start = time.monotonic(), self.monitor.num_starts
        if self._hung_start != start:
            self._hung_start, self._hung_s, self._are_killed = start, now_s, False
            self.monitor.require_progress(hang)
        if now_s - self._hung_s < EXIT_WITHIN_S:
            return True
        if not self._are_killed:
            workers = self.monitor.local_workers()
            alive = {process for process in workers if Path(f"/proc/{process}").exists()}
            if not workers or alive - set(marked_processes(RUN_MARK, self.run_mark)):
                return False  # on another machine, or in somebody else's cluster
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._are_killed = True
            self.console.log_restart(hang)
        return now_s - self._hung_s < REPLACED_WITHIN_S

    def _outcome(self, process: subprocess.Popen[bytes]) -> AttemptOutcome:
        self.monitor.poll()
        self.monitor.require_writable(tolerance_s=0)
        if self.monitor.ended:  # the cluster may be gone by now, but the run is done
            return AttemptOutcome("ended")
        try:
            text = (self.run.folder / OUTCOME_FILE).read_text(encoding="utf-8")
            return AttemptOutcome(**json.loads(text))
        except (OSError, ValueError, TypeError):
            return AttemptOutcome("lost", f"the Ray driver died (exit code {process.returncode})")

    def _print_cluster(self) -> bool:
        """Print the driver's line about the cluster; return whether it has written it yet."""
        try:
            output = (self.run.folder / LOG_FILE).read_bytes()[self._log_offset :]
        except OSError:
            return False
        lines = output.decode(errors="replace").splitlines(keepends=True)
        found = [line for line in lines if line.startswith("Ray cluster ") and line.endswith("\n")]
        if found:
            self.console.echo(found[0].rstrip())
        return bool(found)
