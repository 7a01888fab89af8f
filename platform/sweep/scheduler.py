"""All trials of a sweep: which one is next, what has become of each, and how all of it ended.

Whoever carries the trials out asks for the next one and says which has ended; the rest is read from
the trials' folders. Knows no cluster.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from deta.model.architectures import make_criterion
from deta.platform.run.attempt_outcome import STOP_FILE
from deta.platform.run.config import to_json
from deta.platform.run.journal import Journal
from deta.platform.run.run import Run
from deta.platform.run.run_file import read_run_file
from deta.platform.run.run_lock import RunLock
from deta.platform.study.cost import Price
from deta.platform.study.design import Trial
from deta.platform.study_report.content import StudyReport
from deta.platform.sweep.live_table import Footing, LiveTable, aligned, rows, summary_line
from deta.platform.sweep.optuna_search import Proposer
from deta.platform.sweep.results import (
    TABLE_NAME,
    files_to_send,
    open_trials,
    proposed_trials,
    records_of,
    write_results,
)
from deta.platform.sweep.search_space import Optuna, Sweep
from deta.platform.sweep.speed_probe import Speed
from deta.platform.sweep.sweep_folder import write_parent_file, write_trial_files
from deta.platform.sweep.trial_folder import MismatchError, TrialFolder, last_failure
from deta.platform.tracking.upload_plan import read_record

GRACE_S = 20.0  # from a request to stop to the end, for a step and a checkpoint
LOOK_EVERY_S = 1.0
MAX_PROPOSALS = 50  # in a row that are there already or that the configuration refuses


def check_trials(sweep: Sweep, trials: list[Trial]) -> None:
    """What `prepare` checks of a single run's model, for each trial.

    Raises:
        ValueError: names the trial.
    """
    for trial in trials:
        config = sweep.trial_config(trial)
        try:
            make_criterion(config.criterion, config.model)
        except ValueError as error:
            raise ValueError(f"{sweep.trial_name(trial)}: {error}") from error


class SweepState:
    """Gives out the trials, and sees to it that each one's end is written down."""

    def __init__(
        self,
        sweep: Sweep,
        run: Run,
        planned: list[Trial],
        at_once: int,
        table: LiveTable,
        price: Price | None,
        content: dict[str, Any],
        lock: RunLock,
        retry_failed: bool,
    ) -> None:
        self.sweep, self.run, self.table, self.price = sweep, run, table, price
        self.content, self.lock, self.at_once = content, lock, at_once
        self.folder = run.folder
        self.num_trials = sweep.num_trials
        self.parent_key = write_parent_file(self.folder, sweep, run)
        self.trials = open_trials(sweep, planned or proposed_trials(sweep))
        for trial in self.trials:
            self._take_up(trial, retry_failed)
        self.by_id = {trial.trial.id: trial for trial in self.trials}
        self.waiting = deque(trial for trial in self.trials if not trial.is_done)
        self.proposer: Proposer | None = None
        if isinstance(sweep.search, Optuna):
            self.proposer = Proposer(sweep.space, sweep.search, len(self.trials))
            for trial in self.trials:
                if trial.is_done:
                    self.proposer.tell(trial.trial.id, trial.trial.changes, trial.record(price))
        self.locks: dict[str, RunLock] = {}
        self.launched_s: dict[str, float] = {}
        self.took_s: list[float] = []  # trials that began and ended in this start
        self.looked_s = self.next_page_s = 0.0
        self.num_done_before = sum(trial.is_done for trial in self.trials)
        (self.folder / STOP_FILE).unlink(missing_ok=True)
        self.journal = Journal(self.folder)

    def _take_up(self, trial: TrialFolder, retry_failed: bool) -> None:
        """A trial of an earlier start."""
        if trial.has_end and not trial.ended:
            trial.settle()
        if trial.ended == "FAILED" and retry_failed:
            trial.ended = ""
        trial.is_active = False
        if trial.is_done and trial.ended == "FINISHED":
            trial.verify()

    def begin(self) -> None:
        """Before the first trial; the uploader runs by then."""
        if self.num_done_before:
            self.table.say(f"{self.num_done_before} trials have ended before and stay as they are")
        self.journal.write("begin", step=self.num_done_before, num_trials=self.num_trials)
        self.send_files()

    # The next trial

    def next_trial(self) -> dict[str, Any] | None:
        """What the process of the next trial is given; none if there are no more."""
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
        return {
            "trial": trial.trial.id,
            "config": to_json(trial.config),
            "folder": str(trial.folder),
        }

    @property
    def has_more(self) -> bool:
        """Whether trials are still to be proposed."""
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
                    self.proposer.expect(trial.id, asked)
                    (opened,) = open_trials(self.sweep, [trial])
                    self.trials.append(opened)
                    self.by_id[trial.id] = opened
                    return opened
                problem = "all that it proposes has been tried"
            self.proposer.discard(asked)
        raise ValueError(f"Optuna finds no further trial: {problem}")

    # What has become of them

    def look(self) -> None:
        """Read what is new, show it, and see whether to go on; call it as often as you like.

        Raises:
            RuntimeError: another process has taken the sweep over.
            SystemExit: somebody asked it to stop, by the file of that name.
        """
        now_s = time.monotonic()
        if now_s - self.looked_s < LOOK_EVERY_S:
            return
        self.looked_s = now_s
        for trial_id in self.locks:
            self.by_id[trial_id].look()
        self.draw()
        if self.lock.lost:
            raise RuntimeError(
                f"{self.folder}: another process has taken this sweep over, since nothing was "
                "heard of this one for too long"
            )
        if (self.folder / STOP_FILE).exists():
            raise SystemExit(143)

    def has_ended(self, trial_id: str) -> None:
        """A trial's process is gone, and it did not fail; its folder says the rest.

        Raises:
            MismatchError: it trained with other parameters than it was given.
        """
        trial = self.by_id[trial_id]
        trial.look()
        if trial.has_end:
            trial.settle()
        elif failure := trial.lasting_failure():
            trial.settle(failed=failure)
        elif trial.was_asked:
            trial.settle(stopped_by=f"person: asked to stop after {trial.samples:,} samples")
        elif self.sweep.stopping is not None and trial.curve:
            samples, ap = max(trial.curve.items())
            part = f"1/{self.sweep.stopping.reduction:g}"
            trial.settle(
                stopped_by=f"asha: AP {ap:.1f} after {samples:,} samples was not in the upper "
                f"{part} of the trials that came there before"
            )
        else:
            trial.settle(failed="Ray ended it before it had a result; see its folder")
        self._take_leave(trial)

    def has_failed(self, trial_id: str, message: str) -> None:
        """A trial was lost as often as it may be.

        Args:
            message: what the cluster says of it, where its workers left no word.
        """
        trial = self.by_id[trial_id]
        tries = self.sweep.max_failures + 1
        trial.settle(failed=f"{last_failure(trial.folder) or message} (lost {tries} times)")
        self._take_leave(trial)

    def verify(self, trial_id: str) -> bool:
        """Whether a trial is known to train with the parameters that it was given.

        Raises:
            MismatchError: it does not.
        """
        return self.by_id[trial_id].verify()

    def _take_leave(self, trial: TrialFolder) -> None:
        trial_id = trial.trial.id
        if trial.status in ("finished", "stopped") and not trial.verify():
            raise MismatchError(f"{trial.name}: left no checkpoint to verify it by")
        if trial_id in self.launched_s and trial.status == "finished":
            self.took_s.append(time.monotonic() - self.launched_s[trial_id])
        if lock := self.locks.pop(trial_id, None):
            lock.release()
        if self.proposer is not None:
            self.proposer.tell(trial_id, trial.trial.changes, trial.record(self.price))
        self.draw()
        self.report(is_over=False)
        done = [one for one in self.trials if one.is_done]
        aps = [one.ap for one in done if one.ap is not None]
        values = {
            "sweep/ended": float(len(done)),
            "sweep/hours": sum(one.total_s for one in done) / 3600,
        }
        if aps:
            values["sweep/best_AP"] = max(aps)
        self.journal.write("progress", step=len(done), metrics=values)
        self.send_files()

    # At the end

    def settle_the_rest(self, failed: str, *, killed: bool = False) -> None:
        for trial in self.trials:
            if trial.trial.id in self.locks and not trial.is_done:
                trial.settle(failed=failed, killed="the sweep ended" if killed else "")
                self.locks.pop(trial.trial.id).release()

    def leave_in_order(self) -> None:
        """Somebody wants the sweep to end: let the trials save, and leave."""
        active = [self.by_id[trial_id] for trial_id in self.locks]
        if active:
            self.table.say("stopping: the trials are saving their state …")
        for trial in active:
            (trial.folder / STOP_FILE).touch()
        deadline_s = time.monotonic() + GRACE_S
        while time.monotonic() < deadline_s:
            for trial in active:
                trial.look()
            if all(t.was_asked or t.has_end or not t.is_active for t in active):
                break
            time.sleep(0.1)
        self.settle_the_rest("", killed=True)

    def write_end(self, status: str, reason: str, report: StudyReport) -> None:
        if self.lock.lost:
            return
        self.send_files()
        verdict = " ".join(report.verdicts)
        self.journal.write("tags", tags={"deta.verdict": verdict})
        self.journal.write("ended", status=status, reason=reason)
        self.journal.close()

    def report(self, *, is_over: bool) -> StudyReport:
        """Write trials.json and the report; while trials run, its page now and then only."""
        began_s = time.monotonic()
        with_page = is_over or began_s >= self.next_page_s
        tracking = read_record(self.folder).uri
        report = write_results(
            self.folder,
            self.sweep,
            records_of(self.trials, self.price, tracking),
            base_run=read_run_file(self.folder),
            hardware=str(self.content.get("hardware") or ""),
            is_over=is_over,
            with_page=with_page,
        )
        if with_page:  # a twentieth of the time at most
            now_s = time.monotonic()
            self.next_page_s = now_s + 20 * (now_s - began_s)
        return report

    def send_files(self) -> None:
        """Let the sweep's MLflow run have the table and the report as they are now."""
        keys = self.sweep.varied_keys()
        lines = [*aligned(rows(self.trials, keys))]
        lines.append(summary_line(self.trials, self.num_trials, self._footing()))
        (self.folder / TABLE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for path, to in files_to_send(self.folder):
            self.journal.write("file", path=path, to=to)

    def draw(self, *, last: bool = False) -> None:
        keys = self.sweep.varied_keys()
        self.table.show(self.trials, keys, self.num_trials, self._footing, last=last)

    def _footing(self) -> Footing:
        cluster = self.sweep.config.cluster
        costs = [trial.record(self.price).cost for trial in self.trials]
        unit = "gpu_hours" if cluster.gpu else "cpu_hours"
        held = sum(getattr(cost, unit) or 0.0 for cost in costs)
        text = f"{held:.2f} {'GPU' if cluster.gpu else 'CPU'}-hours"
        money = [cost.price for cost in costs if cost.price is not None]
        if money:
            text += f", {sum(money):.2f} {costs[0].currency}"
        return Footing(text, self._remaining_s())

    def _remaining_s(self) -> float | None:
        """By the trials that have ended in this start, or by the probe."""
        estimate = self.content.get("estimate")
        if self.took_s:
            each_s = sum(self.took_s) / len(self.took_s)
        elif estimate is not None:
            speed = Speed(**estimate)
            each_s = 3600 * speed.hours(self.run, self.sweep.config)
        else:
            return None
        left_s = each_s * (self.num_trials - sum(one.is_done for one in self.trials))
        for trial_id in self.locks:
            began_s = self.launched_s.get(trial_id, time.monotonic())
            left_s -= min(each_s, time.monotonic() - began_s)
        return max(0.0, left_s) / self.at_once or None

    def first_failure(self) -> str:
        return next((trial.reason for trial in self.trials if trial.reason), "")
