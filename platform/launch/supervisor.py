"""A run, supervised: started, shown, started again after whatever befalls it, and ended in order.

This process imports neither Ray nor MLflow, so nothing that happens to a cluster or a server can
end it. It starts three others: the Ray driver (`attempt.py`), one for each attempt; the uploader
(`tracking.py`), which follows the journal; and the guardian (`guardian.py`), in case this one is
killed. What they know of one another is in the run's folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from deta.platform.checkpoint.local import best_checkpoint, newest_checkpoint
from deta.platform.evaluation.evaluation_folder import best_evaluation, read_evaluation
from deta.platform.evaluation.paired_bootstrap import ap_interval
from deta.platform.launch.attempt_monitor import Vigil
from deta.platform.launch.claim_folder import (
    changes_since,
    claim_folder,
    refuse_changes,
    refuse_if_done,
    what_was,
)
from deta.platform.launch.console import Console
from deta.platform.launch.orphan_reaper import ALL_IS_WELL, start_guardian
from deta.platform.launch.prepare_run import prepare
from deta.platform.run.config import RunConfig
from deta.platform.run.dataset_snapshot import write_dataset_snapshot
from deta.platform.run.journal import Journal
from deta.platform.run.run import OUTCOME_FILE, STOP_FILE, AttemptOutcome, Run, RunResult
from deta.platform.run.run_file import RUN_FILE, describe_run, write_run_file
from deta.platform.run.run_lock import RunLock
from deta.platform.system.places import child_environment
from deta.platform.system.process_tree import (
    ATTEMPT_MARK,
    RUN_MARK,
    marked_processes,
    new_mark,
    terminate,
    working_in,
)
from deta.platform.tracking.upload_process import UploadState, finish_uploader, start_uploader

LOG_FILE = "attempt.log"  # what the Ray drivers print
LOOK_EVERY_S = 0.25
UPLOAD_S = 6.0  # from the end of a run to the exit, for an MLflow that does not answer well
GRACE_S = 20.0  # from a request to stop to the end, for a step and a checkpoint
RECONNECT_MINUTES = 30.0  # a cluster that was there once is waited for so long
LONGEST_BACKOFF_S = 60.0
READ_ONLY_S = 10.0  # so long a disk may be so
LEAVE_WITHIN_S = 2.0  # all workers, where the watchdog of one has ended it
REPLACED_WITHIN_S = 90.0  # workers that stood still, by Ray


def launch(
    config: RunConfig,
    *,
    resume: bool = False,
    force: bool = False,
    echo: Callable[[str], None] = print,
    tags: dict[str, str] | None = None,
) -> RunResult:
    """Train on the Ray cluster named by RAY_ADDRESS, or on one started here.

    Args:
        resume: go on with the run of this name; otherwise the name must be new.
        force: resume although data or configuration have changed.
        echo: where lines for people go.
        tags: further tags of the MLflow run, such as the recipe's name.

    Raises:
        ValueError: the input, the name, or a lock; before the cluster is touched.
        RuntimeError: the run failed on the cluster; says why.
    """
    run = prepare(config, resume=resume)
    return launch_prepared(run, resume=resume, force=force, echo=echo, tags=tags)


def launch_prepared(
    run: Run,
    *,
    resume: bool = False,
    force: bool = False,
    echo: Callable[[str], None] = print,
    first_look: Callable[[Run], None] | None = None,
    tags: dict[str, str] | None = None,
) -> RunResult:
    """`launch` for a run from `prepare`.

    Args:
        first_look: called in between, when a new run has its folder and nothing is taken of the
            cluster; may write pictures and journal. If it fails, the folder is taken back.
    """
    console = Console(run, echo)
    console.introduce()
    claim_folder(run, resume=resume)
    with RunLock.acquire(run.folder) as lock:
        before = None
        if resume:
            changes = changes_since(run)
            if not force:
                refuse_changes(run, changes)
            refuse_if_done(run)
            before = what_was(run)
            _note_changes(run, changes, str(before.get("code_commit", "")), echo)
        elif first_look is not None:
            try:
                first_look(run)
            except BaseException:  # also where somebody stops it: the name is free again
                lock.release()
                shutil.rmtree(run.folder)
                raise
        write_run_file(run.folder, describe_run(run, before, tags=tags))
        with working_in(run.folder):
            return _Supervisor(run, lock, console, echo).supervise()


def _note_changes(
    run: Run, changes: list[str], old_commit: str, echo: Callable[[str], None]
) -> None:
    if old_commit and run.code_commit and old_commit != run.code_commit:
        echo(f"the code has changed: {old_commit[:12]} -> {run.code_commit[:12]}")
    if changes:
        echo("forced, although the run began otherwise:\n  " + "\n  ".join(changes))
        journal = Journal(run.folder)
        journal.write("forced", changes=changes)
        journal.close()


class RunFailedError(RuntimeError):
    """The run cannot go on; says why."""


class _Supervisor:
    def __init__(
        self, run: Run, lock: RunLock, console: Console, echo: Callable[[str], None]
    ) -> None:
        self.run, self.lock, self.console, self.echo = run, lock, console, echo
        self.began_s = time.monotonic()
        self.last = newest_checkpoint(run.checkpoints)
        self.useful_s_before = self.last.state.useful_s if self.last is not None else 0.0
        self.mark = new_mark()
        os.environ[RUN_MARK] = self.mark  # inherited by all that is started from here
        self.vigil = Vigil(run, console)
        self.attempt: subprocess.Popen[bytes] | None = None
        self.attempt_mark = ""
        self.log_offset = 0  # of the present attempt, in bytes
        self.writable_s = self.began_s  # when the folder was so last
        # Of workers that stood still: their start, when it was noticed, whether all are ended.
        self._stood_start, self._stood_s, self._has_ended_workers = -1, 0.0, False

    def supervise(self) -> RunResult:
        run = self.run
        (run.folder / STOP_FILE).unlink(missing_ok=True)
        write_dataset_snapshot(run)
        guardian = start_guardian(self.mark, run.folder)
        uploader = start_uploader(run.folder)
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        reason = ""
        try:
            self._keep_going()
            status, reason = "FINISHED", self.vigil.end_reason
            self._tell_interval()
        except (KeyboardInterrupt, SystemExit):
            if status != "FINISHED":  # else it is only the interval that was not waited for
                status, reason = "KILLED", "stopped from outside"
                self._leave_in_order()
            raise
        except BaseException as error:
            reason = str(error)
            raise
        finally:
            self._end_attempt()
            with contextlib.suppress(OSError):  # a disk that is read-only by now
                (run.folder / STOP_FILE).unlink(missing_ok=True)
            self.vigil.look()
            self.last = newest_checkpoint(run.checkpoints)
            self._write_end(status, reason)
            uploaded = finish_uploader(uploader, run.folder, within_s=UPLOAD_S)
            self._tell_upload(uploaded)
            assert guardian.stdin is not None
            try:
                guardian.stdin.write(ALL_IS_WELL)
                guardian.stdin.close()
            except BrokenPipeError:  # somebody ended it; nothing is left for it to do
                pass
            guardian.wait()
        return self._conclude(uploaded)

    def _keep_going(self) -> None:
        """Attempt after attempt, until the run has reached its end.

        Raises:
            RunFailedError: it cannot go on.
        """
        unreachable_since_s: float | None = None
        failures_in_a_row = 0
        while True:
            step_before = self.vigil.step
            outcome = self._attempt_once()
            if outcome.kind == "ended":
                if self.vigil.ended:
                    return
                outcome = AttemptOutcome("lost", "Ray took the training for done; its journal has no end")
            if outcome.kind == "refused":
                raise RunFailedError(outcome.message)
            if outcome.kind == "unreachable":
                now_s = time.monotonic()
                unreachable_since_s = unreachable_since_s or now_s
                waited_s = now_s - unreachable_since_s
                if not self.vigil.num_starts or waited_s > 60 * RECONNECT_MINUTES:
                    raise RunFailedError(f"there is no Ray cluster: {outcome.message}")
            else:
                unreachable_since_s = None
                if not self.vigil.has_started:
                    failures_in_a_row += 1
                self._stop_if_fruitless(outcome, failures_in_a_row)
            if self.vigil.step > step_before:
                failures_in_a_row = 0
            fruitless = max(self.vigil.fruitless_starts - 1, failures_in_a_row - 1, 0)
            backoff_s = min(2.0**fruitless, LONGEST_BACKOFF_S) if fruitless else 0.0
            if outcome.kind == "unreachable":
                backoff_s = 10.0
            reason = self.vigil.last_failure() or outcome.message
            self._tell_restart(f"the attempt ended: {reason}", backoff_s)
            time.sleep(backoff_s)

    def _stop_if_fruitless(self, outcome: AttemptOutcome, failures_in_a_row: int) -> None:
        limit = self.run.config.cluster.max_fruitless_starts
        count = max(self.vigil.fruitless_starts, failures_in_a_row)
        if count >= limit:
            raise RunFailedError(
                f"{count} starts in a row got no further than step {self.vigil.start_step} "
                f"(cluster.max_fruitless_starts={limit}). The last time: "
                f"{self.vigil.last_failure() or outcome.message}"
            )

    def _attempt_once(self) -> AttemptOutcome:
        """Start the Ray driver and watch until it, or the run, has come to an end."""
        folder = self.run.folder
        while not is_writable(folder / RUN_FILE):
            self._require_a_disk()
            time.sleep(LOOK_EVERY_S)
        (folder / OUTCOME_FILE).unlink(missing_ok=True)
        self.vigil.begin_attempt()
        self._stood_start = -1
        self.attempt_mark = new_mark()
        marks = {ATTEMPT_MARK: self.attempt_mark}
        with (folder / LOG_FILE).open("ab") as log:
            self.log_offset = log.tell()
            self.attempt = subprocess.Popen(
                [sys.executable, "-m", "deta.platform.cluster.driver", str(folder)],
                env=child_environment(marks),
                stdin=subprocess.PIPE,  # see `end`
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for the supervisor, who then asks in order
            )
        outcome = self._watch(self.attempt)  # stopped from outside, it ends after it has saved
        self._end_attempt()
        return outcome

    def _watch(self, attempt: subprocess.Popen[bytes]) -> AttemptOutcome:
        said_cluster = False
        ended_s: float | None = None
        while True:
            time.sleep(LOOK_EVERY_S)
            self.vigil.look()
            said_cluster = said_cluster or self._tell_cluster()
            if self.lock.lost:
                raise RunFailedError(
                    f"{self.run.folder}: another process has taken this run over, since nothing "
                    "was heard of this one for too long"
                )
            self._require_a_disk()
            if self.vigil.ended:
                ended_s = ended_s or time.monotonic()
                # The rest is Ray's putting away; what counts is written.
                if attempt.poll() is not None or time.monotonic() - ended_s > 1:
                    return AttemptOutcome("ended")
            failure = self.vigil.failure_that_comes_again()
            if failure:
                raise RunFailedError(failure)
            if attempt.poll() is not None:
                return self._outcome(attempt)
            if silence := self.vigil.silence():
                return AttemptOutcome("lost", silence)
            if (standstill := self.vigil.standstill()) and not self._is_mending(standstill):
                return AttemptOutcome("lost", standstill)
            if self.vigil.failed_since_start:
                self._stop_if_fruitless(AttemptOutcome("lost", ""), 0)

    def _is_mending(self, standstill: str) -> bool:
        """Whether Ray may be left to replace workers that stand still.

        It replaces those that end, in half the time of another attempt. Their watchdogs end them;
        a process that does not run, none of it, is ended here if it is of the cluster that this
        run has started.
        """
        now_s, start = time.monotonic(), self.vigil.num_starts
        if self._stood_start != start:
            self._stood_start, self._stood_s, self._has_ended_workers = start, now_s, False
            self._stop_if_fruitless(AttemptOutcome("lost", standstill), 0)
        if now_s - self._stood_s < LEAVE_WITHIN_S:
            return True
        if not self._has_ended_workers:
            workers = self.vigil.local_workers()
            alive = {process for process in workers if Path(f"/proc/{process}").exists()}
            if not workers or alive - set(marked_processes(RUN_MARK, self.mark)):
                return False  # on another machine, or in a cluster of others
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._has_ended_workers = True
            self._tell_restart(standstill)
        return now_s - self._stood_s < REPLACED_WITHIN_S

    def _require_a_disk(self) -> None:
        """A disk that is full gets room again; one that turned read-only needs a person.

        Raises:
            RunFailedError: it has been so for a while.
        """
        if is_writable(self.run.folder / RUN_FILE):
            self.writable_s = time.monotonic()
        elif time.monotonic() - self.writable_s > READ_ONLY_S:
            newest = newest_checkpoint(self.run.checkpoints)
            origin = newest.path.name if newest is not None else "the beginning"
            raise RunFailedError(
                f"{self.run.folder}: cannot be written to any more (the file system is read-only), "
                f"so nothing that is learnt could be kept. Make it writable; --resume goes on from "
                f"{origin}"
            )

    def _outcome(self, attempt: subprocess.Popen[bytes]) -> AttemptOutcome:
        self.vigil.look()
        if not is_writable(self.run.folder / RUN_FILE):
            self.writable_s = -READ_ONLY_S
            self._require_a_disk()
        if self.vigil.ended:  # the cluster may be gone by then; the run is done
            return AttemptOutcome("ended")
        try:
            said = json.loads((self.run.folder / OUTCOME_FILE).read_text(encoding="utf-8"))
            return AttemptOutcome(**said)
        except (OSError, ValueError, TypeError):
            return AttemptOutcome("lost", f"the Ray driver died (exit code {attempt.returncode})")

    def _leave_in_order(self) -> None:
        """Somebody wants the run to end: let it save, and leave."""
        self.vigil.look()
        if self.attempt is None or self.vigil.ended or not self.vigil.has_begun:
            return
        self.echo("stopping: the state is being saved …")
        (self.run.folder / STOP_FILE).touch()
        deadline_s = time.monotonic() + GRACE_S
        while time.monotonic() < deadline_s and self.attempt.poll() is None:
            time.sleep(0.05)
            self.vigil.look()
            if self.vigil.stopped or self.vigil.ended or self.vigil.is_safe_to_kill:
                return

    def _end_attempt(self) -> None:
        if self.attempt is not None:
            terminate(self.attempt, self.attempt_mark)
            self.attempt = None

    # What people and the journal are told

    def _tell_cluster(self) -> bool:
        """The driver's first line: which cluster."""
        try:
            said = (self.run.folder / LOG_FILE).read_bytes()[self.log_offset :]
        except OSError:
            return False
        lines = said.decode(errors="replace").splitlines(keepends=True)
        found = [line for line in lines if line.startswith("Ray cluster ") and line.endswith("\n")]
        if found:
            self.echo(found[0].rstrip())
        return bool(found)

    def _tell_restart(self, reason: str, backoff_s: float = 0.0) -> None:
        newest = newest_checkpoint(self.run.checkpoints)
        origin = newest.path.name if newest is not None else "the beginning"
        first_line = reason.strip().partition("\n")[0]
        self.echo(
            f"{first_line}; going on from {origin}"
            + (f" in {backoff_s:.0f} s" if backoff_s else "")
        )
        journal = Journal(self.run.folder)
        journal.write("restart", reason=reason, backoff_s=backoff_s)
        journal.close()

    def _write_end(self, status: str, reason: str) -> None:
        if self.lock.lost:
            return  # the run is another process's
        journal = Journal(self.run.folder)
        journal.write("ended", status=status, reason=reason, goodput=self._goodput())
        journal.close()

    def _tell_interval(self) -> None:
        """How far the best AP can be believed; here, where no worker waits for it."""
        folder = best_evaluation(self.run.folder)
        if folder is None:
            return
        try:
            read = read_evaluation(folder)
            low, high = (100 * terminate for terminate in ap_interval(read.ground_truth, read.results))
        except Exception as error:  # the run is done, with or without
            self.echo(f"the interval of the best AP could not be worked out: {error}")
            return
        if math.isnan(low):
            return
        step, best = read.origin.step or 0, 100 * read.metrics.AP
        self.echo(f"best AP {best:.1f}, 95 % interval over images {low:.1f} to {high:.1f}")
        journal = Journal(self.run.folder)
        journal.write("interval", step=step, low=low, high=high)
        journal.close()

    def _tell_upload(self, uploaded: UploadState) -> None:
        if not uploaded.is_complete:
            self.echo(
                f"MLflow at {uploaded.uri} has not taken everything ({uploaded.left_rows} rows "
                f"are left{': ' + uploaded.error if uploaded.error else ''}). Nothing is lost: "
                f"python jobs/sync.py {self.run.folder}"
            )

    def _goodput(self) -> float:
        useful_s = self.last.state.useful_s if self.last is not None else 0.0
        return max(0.0, useful_s - self.useful_s_before) / (time.monotonic() - self.began_s)

    def _conclude(self, uploaded: UploadState) -> RunResult:
        result = RunResult(
            self.run.folder,
            dict(self.last.state.metrics) if self.last is not None else {},
            best_checkpoint(self.run.checkpoints),
            uploaded.uri,
            uploaded.run_id,
            self._goodput(),
            uploaded.left_rows,
        )
        self.console.conclude(result)
        return result


def is_writable(file: Path) -> bool:
    """Whether a file that is there may be changed. Nothing is written; a full disk counts as yes.

    Asked by opening it: where ext4 has met an error and refuses to write (Linux 6.15 and later),
    neither the mode nor the flags of the file system say so.
    """
    try:
        os.close(os.open(file, os.O_WRONLY))
    except OSError as error:
        return error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM)
    return True
