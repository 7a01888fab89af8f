"""Supervises one run: starts it, restarts it after failures, and shuts it down cleanly.

This process imports neither Ray nor MLflow, so a failing cluster or server cannot end it. It starts
three others: the Ray driver (`cluster/driver.py`), one for each attempt; the uploader
(`tracking/uploader_main.py`), which follows the journal; and the orphan reaper, in case this one is
killed. They communicate through the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from typing import Literal

from deta.platform.checkpoint.local import best_checkpoint, newest_checkpoint
from deta.platform.launch.attempt import Attempt
from deta.platform.launch.attempt_monitor import AttemptMonitor, RunFailedError
from deta.platform.launch.console import Console
from deta.platform.launch.orphan_reaper import CLEAN_EXIT, start_orphan_reaper
from deta.platform.launch.ray_driver import RayDriver
from deta.platform.run.dataset_snapshot import write_dataset_snapshot
from deta.platform.run.run import STOP_FILE, AttemptOutcome, Run, RunResult
from deta.platform.run.run_lock import RunLock
from deta.platform.system.process_tree import RUN_MARK, new_mark
from deta.platform.tracking.upload_process import finish_uploader, start_uploader

UPLOAD_S = 6.0  # from the end of a run to the exit, if MLflow does not answer well
RECONNECT_MINUTES = 30.0  # how long to wait for a cluster that was reachable before
RECONNECT_EVERY_S = 10.0
MAX_BACKOFF_S = 60.0


class Supervisor:
    """Runs attempt after attempt until the run has ended or cannot continue."""

    def __init__(
        self, run: Run, lock: RunLock, console: Console, driver: RayDriver | None = None
    ) -> None:
        """
        Args:
            driver: for the first attempt, if it was started before the run.
        """
        self.run, self.lock, self.console = run, lock, console
        self.began_s = time.monotonic()
        self.last = newest_checkpoint(run.checkpoints)
        self.useful_s_before = self.last.state.useful_s if self.last is not None else 0.0
        self.mark = new_mark() if driver is None else driver.run_mark
        os.environ[RUN_MARK] = self.mark  # inherited by all processes that are started here
        self.monitor = AttemptMonitor(run, console.print_event)
        self.driver = driver
        self.attempt: Attempt | None = None

    def supervise(self) -> RunResult:
        """Train to the end, and return the result.

        Raises:
            RunFailedError: the run cannot continue.
        """
        run = self.run
        (run.folder / STOP_FILE).unlink(missing_ok=True)
        write_dataset_snapshot(run)
        reaper = start_orphan_reaper(self.mark, run.folder)
        uploader = start_uploader(run.folder)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        reason = ""
        try:
            self._retry_until_done()
            status, reason = "FINISHED", self.monitor.end_reason
            self.console.log_interval()
        except (KeyboardInterrupt, SystemExit):
            if status != "FINISHED":  # otherwise only the computation of the interval was stopped
                status, reason = "KILLED", "stopped from outside"
                if self.attempt is not None:
                    self.attempt.request_stop()
            raise
        except BaseException as error:
            reason = str(error)
            raise
        finally:
            self._end_attempt()
            with contextlib.suppress(OSError):  # the disk may be read-only by now
                (run.folder / STOP_FILE).unlink(missing_ok=True)
            self.monitor.poll()
            self.console.close()
            self.last = newest_checkpoint(run.checkpoints)
            if not self.lock.lost:  # otherwise another process writes the journal
                self.console.log_end(status, reason, self._goodput())
            uploaded = finish_uploader(uploader, run.folder, within_s=UPLOAD_S)
            self.console.print_upload(uploaded)
            _release(reaper)
        metrics = dict(self.last.state.metrics) if self.last is not None else {}
        best, goodput = best_checkpoint(run.checkpoints), self._goodput()
        result = RunResult(
            run.folder, metrics, best, uploaded.uri, uploaded.run_id, goodput, uploaded.left_rows
        )
        self.console.print_result(result)
        return result

    def _retry_until_done(self) -> None:
        """Start attempts, with backoff, until the run has ended.

        Raises:
            RunFailedError: the run cannot continue.
        """
        unreachable_since_s: float | None = None
        failed_attempts = 0  # in a row, whose workers did not start
        while True:
            step_before = self.monitor.step
            if self.driver is None:
                self.driver = RayDriver(self.mark)
            self.attempt = Attempt(self.run, self.lock, self.monitor, self.console, self.driver)
            outcome = self.attempt.run_to_end()
            self._end_attempt()
            if outcome.kind == "ended":
                if self.monitor.ended:
                    return
                message = "Ray reported the training as done, but its journal has no end"
                outcome = AttemptOutcome("lost", message)
            if outcome.kind == "refused":
                raise RunFailedError(outcome.message)
            if outcome.kind == "unreachable":
                now_s = time.monotonic()
                unreachable_since_s = unreachable_since_s or now_s
                waited_s = now_s - unreachable_since_s
                if not self.monitor.num_starts or waited_s > 60 * RECONNECT_MINUTES:
                    raise RunFailedError(f"there is no Ray cluster: {outcome.message}")
            else:
                unreachable_since_s = None
                if not self.monitor.has_started:
                    failed_attempts += 1
                self.monitor.require_progress(outcome.message, failed_attempts)
            if self.monitor.step > step_before:
                failed_attempts = 0
            fruitless = max(self.monitor.fruitless_starts - 1, failed_attempts - 1, 0)
            backoff_s = min(2.0**fruitless, MAX_BACKOFF_S) if fruitless else 0.0
            if outcome.kind == "unreachable":
                backoff_s = RECONNECT_EVERY_S
            reason = self.monitor.last_failure() or outcome.message
            self.console.log_restart(f"the attempt ended: {reason}", backoff_s)
            time.sleep(backoff_s)

    def _end_attempt(self) -> None:
        if self.driver is not None:
            self.driver.terminate()
        self.driver = self.attempt = None

    def _goodput(self) -> float:
        useful_s = self.last.state.useful_s if self.last is not None else 0.0
        return max(0.0, useful_s - self.useful_s_before) / (time.monotonic() - self.began_s)


def _release(reaper: subprocess.Popen[bytes]) -> None:
    """Let the orphan reaper exit: nothing is left for it to do."""
    assert reaper.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it was killed
        reaper.stdin.write(CLEAN_EXIT)
        reaper.stdin.close()
    reaper.wait()
