"""Schedule the trials of a sweep, follow them, and record how each one ended.

The caller runs the trials: it requests the next one and reports which has ended. Everything else
is read from the trials' folders. Nothing here knows the cluster.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from typing import Any

from deta.model.architectures import make_criterion
from deta.platform.run.config import to_json
from deta.platform.run.journal import Journal
from deta.platform.run.run import STOP_FILE, Run
from deta.platform.run.run_lock import RunLock
from deta.platform.study.design import Trial
from deta.platform.study_report.content import StudyReport
from deta.platform.sweep.live_table import LiveTable, summary_line, table_text
from deta.platform.sweep.optuna_search import Proposer
from deta.platform.sweep.results import (
    FILES_TO_SEND,
    TABLE_NAME,
    open_trials,
    proposed_trials,
    records_of,
    write_results,
)
from deta.platform.sweep.search_space import Optuna, Sweep
from deta.platform.sweep.speed_probe import TrialSpeed
from deta.platform.sweep.sweep_folder import write_parent_file, write_trial_files
from deta.platform.sweep.trial_folder import MismatchError, TrialFolder, last_failure
from deta.platform.tracking.upload_plan import read_record

GRACE_S = 20.0  # after a request to stop, for a step and a checkpoint
POLL_INTERVAL_S = 1.0
MAX_PROPOSALS = 50  # in a row that are duplicates or that the configuration refuses


def check_trials(sweep: Sweep, trials: list[Trial]) -> None:
    """Check the model of each trial as `prepare` checks that of a single run.

    Raises:
        ValueError: the model of a trial is invalid; names the trial.
    """
    for trial in trials:
        config = sweep.trial_config(trial)
        try:
            make_criterion(config.criterion, config.model)
        except ValueError as error:
            raise ValueError(f"{sweep.trial_name(trial)}: {error}") from error


class SweepScheduler:
    """Hands out the trials, follows their folders, and records how each one ended."""

    def __init__(
        self,
        sweep: Sweep,
        run: Run,
        planned: list[Trial],
        at_once: int,
        table: LiveTable,
        content: dict[str, Any],
        lock: RunLock,
        retry_failed: bool,
    ) -> None:
        self.sweep, self.run, self.table = sweep, run, table
        self.content, self.lock, self.at_once = content, lock, at_once
        self.folder = run.folder
        self.num_trials = sweep.num_trials
        self.parent_key = write_parent_file(self.folder, sweep, run)
        self.trials = open_trials(sweep, planned or proposed_trials(sweep))
        for trial in self.trials:  # bring those of an earlier start up to date
            if trial.has_end and not trial.ended:
                trial.write_end()
            if trial.ended == "FAILED" and retry_failed:
                trial.ended = ""
            trial.is_active = False
            if trial.ended == "FINISHED":
                trial.verify()
        self.by_id = {trial.trial.id: trial for trial in self.trials}
        self.waiting = deque(trial for trial in self.trials if not trial.is_done)
        self.proposer: Proposer | None = None
        if isinstance(sweep.search, Optuna):
            self.proposer = Proposer(sweep.space, sweep.search, len(self.trials))
            for trial in self.trials:
                if trial.is_done:
                    self.proposer.tell(trial.trial.id, trial.trial.changes, trial.record())
        self.locks: dict[str, RunLock] = {}
        self.launched_s: dict[str, float] = {}
        self.durations_s: list[float] = []  # of trials that began and ended in this start
        self.polled_s = self.next_page_s = 0.0
        self.num_done_before = sum(trial.is_done for trial in self.trials)
        (self.folder / STOP_FILE).unlink(missing_ok=True)
        self.journal = Journal(self.folder)

    def begin(self) -> None:
        """Record the start of the sweep. The uploader must be running."""
        if self.num_done_before:
            self.table.print_line(
                f"{self.num_done_before} trials have ended already and are not run again"
            )
        self.journal.write("begin", step=self.num_done_before, num_trials=self.num_trials)
        self.send_files()

    # The next trial

    def next_trial(self) -> dict[str, Any] | None:
        """Return the arguments for the process of the next trial; None if there are no more."""
        if not self.waiting:
            if not self.has_more:
                return None
            self.waiting.append(self._propose())
        trial = self.waiting.popleft()
        write_trial_files(
            self.sweep, trial.trial, self.run, trial.config, trial.folder, self.parent_key
        )
        self.locks[trial.trial.id] = RunLock.acquire(trial.folder)
        (trial.folder / STOP_FILE).unlink(missing_ok=True)
        self.launched_s[trial.trial.id] = time.monotonic()
        config, folder = to_json(trial.config), str(trial.folder)
        return {"trial": trial.trial.id, "config": config, "folder": folder}

    @property
    def has_more(self) -> bool:
        """Return whether the search will propose more trials."""
        return self.proposer is not None and len(self.trials) < self.num_trials

    def _propose(self) -> TrialFolder:
        assert self.proposer is not None
        problem = ""
        for _ in range(MAX_PROPOSALS):
            changes, asked = self.proposer.ask()
            try:
                trial = self.sweep.trial(changes, len(self.trials) + 1)
                check_trials(self.sweep, [trial])
            except ValueError as error:
                problem = str(error)
            else:
                if trial.id not in self.by_id:
                    self.proposer.assign(trial.id, asked)
                    (opened,) = open_trials(self.sweep, [trial])
                    self.trials.append(opened)
                    self.by_id[trial.id] = opened
                    return opened
                problem = "all of its proposals have been tried"
            self.proposer.discard(asked)
        raise ValueError(f"Optuna finds no further trial: {problem}")

    # While trials run

    def poll(self) -> None:
        """Read new events, update the table, and check for requests to stop. Rate-limited.

        Raises:
            RuntimeError: another process has taken the sweep over.
            SystemExit: the stop file exists.
        """
        now_s = time.monotonic()
        if now_s - self.polled_s < POLL_INTERVAL_S:
            return
        self.polled_s = now_s
        for trial_id in self.locks:
            self.by_id[trial_id].poll()
        self.draw()
        if self.lock.lost:
            raise RuntimeError(
                f"{self.folder}: another process has taken over this sweep, because this one "
                "sent no heartbeat for too long"
            )
        if (self.folder / STOP_FILE).exists():
            raise SystemExit(143)

    def on_trial_ended(self, trial_id: str) -> None:
        """Record the end of a trial whose process ended without an error.

        Raises:
            MismatchError: it was trained with parameters other than its own.
        """
        trial = self.by_id[trial_id]
        trial.poll()
        failed = stopped_by = ""
        if trial.stop_requested:
            stopped_by = f"person: stopped on request after {trial.samples:,} samples"
        elif self.sweep.stopping is not None and trial.curve:
            samples, ap = max(trial.curve.items())
            part = f"1/{self.sweep.stopping.reduction:g}"
            stopped_by = f"asha: AP {ap:.1f} after {samples:,} samples was not in the upper "
            stopped_by += f"{part} of the trials that had reached this point"
        else:
            failed = "Ray ended it before it had a result; see its folder"
        if failure := trial.lasting_failure():
            failed, stopped_by = failure, ""
        trial.write_end(failed=failed, stopped_by=stopped_by)  # unless it reached its end
        self._finish(trial)

    def on_trial_failed(self, trial_id: str, message: str) -> None:
        """Record a trial that has used up its retries.

        Args:
            message: the cluster's error, used if the workers left none.
        """
        trial = self.by_id[trial_id]
        tries = self.sweep.max_failures + 1
        trial.write_end(failed=f"{last_failure(trial.folder) or message} (lost {tries} times)")
        self._finish(trial)

    def _finish(self, trial: TrialFolder) -> None:
        trial_id = trial.trial.id
        if trial.status in ("finished", "stopped") and not trial.verify():
            raise MismatchError(f"{trial.name}: left no checkpoint to verify it by")
        if trial.status == "finished":
            self.durations_s.append(time.monotonic() - self.launched_s[trial_id])
        self.locks.pop(trial_id).release()
        if self.proposer is not None:
            self.proposer.tell(trial_id, trial.trial.changes, trial.record())
        self.draw()
        self.report(is_over=False)
        done = [one for one in self.trials if one.is_done]
        values = {
            "sweep/ended": float(len(done)),
            "sweep/hours": sum(one.total_s for one in done) / 3600,
        }
        if aps := [one.ap for one in done if one.ap is not None]:
            values["sweep/best_AP"] = max(aps)
        self.journal.write("progress", step=len(done), metrics=values)
        self.send_files()

    # At the end

    def end_remaining(self, failed: str, *, killed: bool = False) -> None:
        for trial in self.trials:
            if trial.trial.id in self.locks and not trial.is_done:
                trial.write_end(failed=failed, killed="the sweep ended" if killed else "")
                self.locks.pop(trial.trial.id).release()

    def stop_gracefully(self) -> None:
        """Stop the sweep: let the running trials save their state, then end them."""
        active = [self.by_id[trial_id] for trial_id in self.locks]
        if active:
            self.table.print_line("stopping: the trials are saving their state …")
        for trial in active:
            (trial.folder / STOP_FILE).touch()
        deadline_s = time.monotonic() + GRACE_S
        while active and time.monotonic() < deadline_s:
            for trial in active:
                trial.poll()
            active = [t for t in active if t.is_active and not (t.stop_requested or t.has_end)]
            time.sleep(0.1)
        self.end_remaining("", killed=True)

    def write_end(self, status: str, reason: str, report: StudyReport) -> None:
        if self.lock.lost:
            return
        self.send_files()
        self.journal.write("tags", tags={"deta.verdict": " ".join(report.verdicts)})
        self.journal.write("ended", status=status, reason=reason)
        self.journal.close()

    def report(self, *, is_over: bool) -> StudyReport:
        """Write trials.json and the report. While trials run, render its page only occasionally."""
        began_s = time.monotonic()
        with_page = is_over or began_s >= self.next_page_s
        records = records_of(self.trials, read_record(self.folder).uri)
        report = write_results(
            self.folder, self.sweep, records, self.content, is_over=is_over, with_page=with_page
        )
        if with_page:  # at most a twentieth of the time
            now_s = time.monotonic()
            self.next_page_s = now_s + 20 * (now_s - began_s)
        return report

    def send_files(self) -> None:
        """Queue the current table and report for the sweep's MLflow run."""
        text = table_text(self.trials, self.sweep.varied_keys(), self._summary())
        (self.folder / TABLE_NAME).write_text(text, encoding="utf-8")
        for name in FILES_TO_SEND:
            if (self.folder / name).is_file():
                self.journal.write("file", path=name, to="")

    def draw(self, *, last: bool = False) -> None:
        self.table.update(self.trials, self.sweep.varied_keys(), self._summary, last=last)

    def _summary(self) -> str:
        kind = "GPU" if self.sweep.config.cluster.gpu else "CPU"
        costs = [vars(trial.record().cost)[f"{kind.lower()}_hours"] or 0.0 for trial in self.trials]
        cost = f"{sum(costs):.2f} {kind}-hours"
        return summary_line(self.trials, self.num_trials, cost, self._remaining_s())

    def _remaining_s(self) -> float | None:
        """Estimate by the trials that ended in this start, or by the probe."""
        estimate = self.content.get("estimate")
        if self.durations_s:
            each_s = statistics.mean(self.durations_s)
        elif estimate is not None:
            each_s = 3600 * TrialSpeed(**estimate).hours(self.run, self.sweep.config)
        else:
            return None
        left_s = each_s * (self.num_trials - sum(one.is_done for one in self.trials))
        now_s = time.monotonic()
        left_s -= sum(min(each_s, now_s - self.launched_s[trial_id]) for trial_id in self.locks)
        return max(0.0, left_s) / self.at_once or None
