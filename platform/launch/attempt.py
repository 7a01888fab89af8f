"""One attempt at a run: gives it to a Ray driver, and watches that."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

from deta.platform.launch.attempt_monitor import AttemptMonitor, RunFailedError
from deta.platform.launch.console import Console
from deta.platform.launch.ray_driver import RayDriver
from deta.platform.run.run import ATTEMPT_LOG, OUTCOME_FILE, STOP_FILE, AttemptOutcome, Run
from deta.platform.run.run_lock import RunLock
from deta.platform.system.process_tree import RUN_MARK, marked_processes

POLL_EVERY_S = 0.25
GRACE_S = 20.0  # after a request to stop, for a step and a checkpoint
EXIT_WITHIN_S = 2.0  # for all workers, once the watchdog of one has ended it
REPLACED_WITHIN_S = 90.0  # for Ray to replace hung workers


class Attempt:
    """One Ray driver process, from its start to its outcome."""

    def __init__(
        self, run: Run, lock: RunLock, monitor: AttemptMonitor, console: Console, driver: RayDriver
    ) -> None:
        self.run, self.lock, self.monitor, self.console = run, lock, monitor, console
        self.driver = driver
        self._log_offset = 0  # where the log of this attempt begins, in bytes
        # Of hung workers: their start, when the hang was noticed, whether all of them were killed.
        self._hung_start, self._hung_s, self._are_killed = -1, 0.0, False

    def run_to_end(self) -> AttemptOutcome:
        """Let the driver train, and watch it until it ends or the run has ended.

        Raises:
            RunFailedError: the run cannot continue.
        """
        folder = self.run.folder
        while not self.monitor.require_writable():
            time.sleep(POLL_EVERY_S)
        (folder / OUTCOME_FILE).unlink(missing_ok=True)
        self.monitor.begin_attempt()
        log = folder / ATTEMPT_LOG
        self._log_offset = log.stat().st_size if log.exists() else 0
        if self.driver.cluster is None:
            self.driver.plan(self.run.config.cluster)
        self.driver.begin(folder)
        return self._watch()

    def request_stop(self) -> None:
        """Request a stop, and wait until the state is saved or `GRACE_S` have passed."""
        self.monitor.poll()
        if self.monitor.ended or not self.monitor.has_begun:
            return
        self.console.echo("stopping: saving the state …")
        (self.run.folder / STOP_FILE).touch()
        deadline_s = time.monotonic() + GRACE_S
        while time.monotonic() < deadline_s and self.driver.process.poll() is None:
            time.sleep(0.05)
            self.monitor.poll()
            if self.monitor.stopped or self.monitor.ended or self.monitor.is_safe_to_kill:
                return

    def _watch(self) -> AttemptOutcome:
        process = self.driver.process
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
                return self._outcome()
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
            if not workers or alive - set(marked_processes(RUN_MARK, self.driver.run_mark)):
                return False  # on another machine, or in somebody else's cluster
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._are_killed = True
            self.console.log_restart(hang)
        return now_s - self._hung_s < REPLACED_WITHIN_S

    def _outcome(self) -> AttemptOutcome:
        self.monitor.poll()
        self.monitor.require_writable(tolerance_s=0)
        if self.monitor.ended:  # the cluster may be gone by now, but the run is done
            return AttemptOutcome("ended")
        try:
            text = (self.run.folder / OUTCOME_FILE).read_text(encoding="utf-8")
            return AttemptOutcome(**json.loads(text))
        except (OSError, ValueError, TypeError):
            return AttemptOutcome(
                "lost", f"the Ray driver died (exit code {self.driver.process.returncode})"
            )

    def _print_cluster(self) -> bool:
        """Print the driver's line about the cluster; return whether it has written it yet."""
        try:
            output = (self.run.folder / ATTEMPT_LOG).read_bytes()[self._log_offset :]
        except OSError:
            return False
        lines = output.decode(errors="replace").splitlines(keepends=True)
        found = [line for line in lines if line.startswith("Ray cluster ") and line.endswith("\n")]
        if found:
            self.console.echo(found[0].rstrip())
        return bool(found)
