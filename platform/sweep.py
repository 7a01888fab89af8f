"""A search space or a design to many runs, on Ray Tune.

Every trial is a training of its own, with its own workers and its own run folder, through the same
`fit` as a single run. Ray Tune says when which trial begins and, with ASHA, which one ends early.
What has happened is in the trials' folders and nowhere else: a sweep that was killed reads them and
makes a new Tuner for what is left, since Tune's own snapshots can be torn by the kill.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

from deta.model.architectures import make_criterion
from deta.platform.attempt import check_resources, connect, fit  # before Ray: it sets its variables

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # ours are the journals
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is answered here
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose verbose=0 is not silent
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from deta.platform.attempt import ClusterTooSmallError
from deta.platform.attempt_outcome import OUTCOME_FILE, Outcome
from deta.platform.config import ClusterConfig, RunConfig, from_json, to_json
from deta.platform.console import Console
from deta.platform.cost import PRICES, Price, price_of
from deta.platform.guardian import ALL_IS_WELL, start_guardian
from deta.platform.journal import Journal
from deta.platform.lock import RunLock
from deta.platform.optuna_search import Proposer
from deta.platform.prepare import prepare
from deta.platform.processes import RUN_MARK, end_marked
from deta.platform.run import Run
from deta.platform.run_file import read_run_file, write_json
from deta.platform.search_space import Asha, Optuna, Sweep
from deta.platform.study_design import Trial
from deta.platform.study_tables import StudyReport
from deta.platform.sweep_folder import (
    describe_sweep,
    read_sweep,
    refuse_another,
    write_parent_file,
    write_sweep,
    write_trial_files,
)
from deta.platform.sweep_probe import Speed, measure, whole_estimate
from deta.platform.sweep_report import (
    TABLE_NAME,
    files_to_send,
    open_trials,
    proposed_trials,
    records_of,
    write_results,
)
from deta.platform.sweep_table import Footing, LiveTable, aligned, rows, summary_line
from deta.platform.training import STOP_FILE
from deta.platform.trial import TrialRecord
from deta.platform.trial_folder import MismatchError, TrialFolder
from deta.platform.upload_record import read_record
from deta.platform.uploading import finish_uploader, start_uploader
from deta.platform.vigil import Vigil

logger = logging.getLogger(__name__)

DRIVER_MEMORY_BYTES = 100 * 2**20  # Tune wants a trial's own process to cost something
GRACE_S = 20.0  # from a request to stop to the end, for a step and a checkpoint
LOOK_EVERY_S = 1.0
MAX_PROPOSALS = 50  # in a row that are there already or that the configuration refuses


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    folder: Path
    records: tuple[TrialRecord, ...]
    report: StudyReport
    mlflow_uri: str
    mlflow_run_id: str


def launch_sweep(
    sweep: Sweep,
    *,
    probe: bool = True,
    estimate_only: bool = False,
    confirm: Callable[[str], bool] | None = None,
    retry_failed: bool = False,
    price: Price | None = None,
    echo: Callable[[str], None] | None = None,
) -> SweepResult | None:
    """Run a sweep on the Ray cluster named by RAY_ADDRESS, or on one started here.

    The same call again goes on with it: trials that have ended stay, others resume.

    Args:
        probe: measure the speed before anything is trained, and tell what all of it will cost.
        confirm: asked, with that estimate, whether to go on.
        retry_failed: trials that failed are tried once more.
        price: of an hour of a GPU, or of a worker without one; default: the table's.

    Returns:
        None where only the estimate was asked for, or it was declined.

    Raises:
        ValueError: the input, the name, or a lock; before the cluster is touched.
        ClusterTooSmallError: some trial can never be scheduled; says which, and what it lacks.
        MismatchError: a trial trained with other parameters than it was given.
        RuntimeError: no trial came to its end.
    """
    table = LiveTable(echo)
    run = prepare(sweep.config)
    sweep = sweep.with_base(run.config)
    trials = sweep.trials()
    _check_trials(sweep, trials)
    folder = run.folder
    before = read_sweep(folder) if folder.exists() else None
    is_new = before is None
    now = describe_sweep(sweep, run, trials, before)
    if before is not None:
        refuse_another(folder, before, now)
    mark = f"{folder.name}-{uuid.uuid4().hex}"
    os.environ[RUN_MARK] = mark  # inherited by all that is started from here
    with RunLock.acquire(folder) as lock, _guarded(mark, folder):
        try:
            table.say(connect())
            at_once = _room(sweep, trials, table.say)
            now["hardware"], device = _hardware()
            price = price or price_of(device, PRICES)
            if probe and is_new:
                first = sweep.trial_config(trials[0]) if trials else sweep.config
                speed = measure(run, first, folder / "probe", table.say)
                now["estimate"] = asdict(speed)
            whole = _tell_estimate(sweep, run, now, trials, at_once, price, table.say)
            declined = confirm is not None and is_new and not confirm(whole)
            if estimate_only or declined:
                if is_new:
                    lock.release()
                    shutil.rmtree(folder)
                return None
        except BaseException:
            if is_new:
                lock.release()
                shutil.rmtree(folder, ignore_errors=True)
            raise
        now["command"] = shlex.join(["python", *sys.argv])
        write_sweep(folder, now)
        driver = _Driver(sweep, run, trials, at_once, table, price, now, lock, retry_failed)
        return driver.run_to_end()


@contextmanager
def _guarded(mark: str, folder: Path) -> Iterator[None]:
    """Whatever happens to this process, what it started ends too."""
    guardian = start_guardian(mark, folder)
    try:
        yield
    finally:
        ray.shutdown()
        end_marked(RUN_MARK, mark)
        assert guardian.stdin is not None
        try:
            guardian.stdin.write(ALL_IS_WELL)
            guardian.stdin.close()
        except BrokenPipeError:
            pass
        guardian.wait()


def _check_trials(sweep: Sweep, trials: list[Trial]) -> None:
    """What `prepare` checks of a single run's model, for each trial."""
    for trial in trials:
        config = sweep.trial_config(trial)
        try:
            make_criterion(config.criterion, config.model)
        except ValueError as error:
            raise ValueError(f"{sweep.trial_name(trial)}: {error}") from error


# What the cluster has


def _room(sweep: Sweep, trials: list[Trial], say: Callable[[str], None]) -> int:
    """How many trials run at once.

    Raises:
        ClusterTooSmallError: a trial would wait for ever.
    """
    least = 10**6
    clusters: dict[ClusterConfig, str] = {}
    for trial in trials:
        clusters.setdefault(sweep.trial_config(trial).cluster, sweep.trial_name(trial))
    for cluster, name in (clusters or {sweep.config.cluster: "a trial"}).items():
        try:
            check_resources(replace(sweep.config, cluster=cluster))
        except ClusterTooSmallError as error:
            raise ClusterTooSmallError(f"{name}: {error}") from None
        num_workers = cluster.min_workers or cluster.num_workers
        num_places = sum(_places(node["Resources"], cluster) for node in ray.nodes()
                         if node["Alive"])  # fmt: skip
        if num_places < num_workers:
            wanted = f"{cluster.cpus_per_worker:g} CPUs" + (" and a GPU" if cluster.gpu else "")
            raise ClusterTooSmallError(
                f"{name} wants {num_workers} workers with {wanted} each on one node; the cluster's "
                f"nodes have room for {num_places}. Lower cluster.cpus_per_worker or "
                "cluster.num_workers"
            )
        least = min(least, max(1, num_places // cluster.num_workers))
    at_once = min(least, sweep.max_concurrent or least)
    say(f"{sweep.num_trials} trials, {at_once} at once")
    return at_once


def _places(resources: dict[str, float], cluster: ClusterConfig) -> int:
    """How many workers fit on a node."""
    places = int(resources.get("CPU", 0) / cluster.cpus_per_worker + 1e-6)
    return min(places, int(resources.get("GPU", 0))) if cluster.gpu else places


def _hardware() -> tuple[str, str]:
    """The cluster in words, and the name of its accelerator; "CPU" where there is none."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = sorted(
        {key.partition(":")[2] for node in nodes for key in node if key.startswith("accelerator_")}
    )
    cpus, gpus = (sum(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU"))
    words = f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {cpus:.0f} CPU cores"
    if gpus:
        words += f", {gpus:.0f} × {' / '.join(kinds) or 'GPU'}"
    return words, kinds[0] if gpus and kinds else "CPU"


def _tell_estimate(
    sweep: Sweep,
    run: Run,
    content: dict[str, Any],
    trials: list[Trial],
    at_once: int,
    price: Price | None,
    say: Callable[[str], None],
) -> str:
    """What is still to be trained, in words; empty where no speed is known."""
    if not content.get("estimate"):
        return ""
    configs = [sweep.trial_config(trial) for trial in trials] or [sweep.config] * sweep.num_trials
    each, whole = whole_estimate(Speed(**content["estimate"]), run, configs, at_once, price)
    text = (
        f"estimate: a trial {each}\n"
        f"estimate: all {len(configs)}, {at_once} at once: {whole}; until {whole.eta():%a %H:%M}"
    )
    if sweep.stopping is not None:
        text += ", less what ASHA stops"
    say(text)
    return text


# In the process of a trial, somewhere on the cluster


def _train_trial(given: dict[str, Any], base: Run) -> None:
    """Train one trial from its last checkpoint on; Tune calls it again if it raises."""
    config, folder = from_json(RunConfig, given["config"]), Path(given["folder"])
    run = replace(base, config=config, folder=folder)
    (folder / OUTCOME_FILE).unlink(missing_ok=True)
    vigil = Vigil(run, Console(run, lambda _: None))
    threading.Thread(target=_end_if_silent, args=(vigil,), daemon=True).start()
    began = Vigil(run, Console(run, lambda _: None))
    try:
        # A worker that is lost ends the attempt; the next one is Tune's, which counts them.
        fit(run, max_failures=0, callbacks=[TuneReportCallback()])
    except Exception:
        failure = began.failure_that_comes_again()
        if not failure:
            raise
        write_json(folder / OUTCOME_FILE, asdict(Outcome("refused", failure)))


def _end_if_silent(vigil: Vigil) -> None:
    while True:
        time.sleep(LOOK_EVERY_S)
        vigil.look()
        if vigil.ended or vigil.stopped:
            return
        if reason := vigil.hang():
            logger.error("%s: %s; the trial starts again", vigil.run.folder, reason)
            os._exit(1)


# In this process


class _Driver(tune.Callback):
    """Gives Tune the trials, and sees to it that each one's end is written down."""

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
        self.error: Exception | None = None
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
        self.looked_s = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of its callbacks that nobody reads

    def _take_up(self, trial: TrialFolder, retry_failed: bool) -> None:
        """A trial of an earlier start."""
        if trial.has_end and not trial.ended:
            trial.settle()
        if trial.ended == "FAILED" and retry_failed:
            trial.ended = ""
        trial.is_active = False
        if trial.is_done and trial.ended == "FINISHED":
            trial.verify()

    def run_to_end(self) -> SweepResult:
        num_done = sum(trial.is_done for trial in self.trials)
        if num_done:
            self.table.say(f"{num_done} trials have ended before and stay as they are")
        (self.folder / STOP_FILE).unlink(missing_ok=True)
        uploader = start_uploader(self.folder, sweep=True)
        self.journal = Journal(self.folder)
        self.journal.write("begin", step=num_done, num_trials=self.num_trials)
        self._send_files()
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
        reason, report = "", None
        try:
            if self.waiting or self._has_more():
                self._tune()
            self._settle_the_rest("it ended without a word; see its folder")
            if all(trial.status == "failed" for trial in self.trials):
                raise RuntimeError(f"no trial came to its end; the first: {self._first_failure()}")
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status, reason = "KILLED", "stopped from outside"
            self._leave_in_order()
            raise
        except BaseException as error:
            reason = str(error)
            self._settle_the_rest("", killed=True)
            raise
        finally:
            report = self._report(is_over=status == "FINISHED")
            self._draw(last=True)
            self._write_end(status, reason, report)
            uploaded = finish_uploader(uploader, self.folder)
            if not uploaded.is_complete:
                self.table.say(
                    f"MLflow at {uploaded.uri} has not taken everything. Nothing is lost: "
                    f"python jobs/sync.py {self.folder}"
                )
        for sentence in report.verdicts:
            self.table.say(sentence)
        self.table.say(f"report: {self.folder / 'report.html'}")
        return SweepResult(self.folder, tuple(report.trials), report, uploaded.uri, uploaded.run_id)

    def _tune(self) -> None:
        logging.getLogger("ray.tune").setLevel(logging.ERROR)
        trainable = tune.with_resources(
            tune.with_parameters(_train_trial, base=self.run),
            {"CPU": 0, "memory": DRIVER_MEMORY_BYTES},
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=_Supply(self),
                scheduler=self._scheduler(),
                num_samples=-1,  # until there are no more
                max_concurrent_trials=self.at_once,
                trial_dirname_creator=lambda trial: str(trial.config["trial"]),
            ),
            run_config=tune.RunConfig(
                name=f"tune-{time.time_ns()}",
                storage_path=str(self.folder / "ray"),
                failure_config=tune.FailureConfig(max_failures=self.sweep.max_failures),
                callbacks=[self],
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception:
            if self.error is not None:
                raise self.error from None
            raise

    def _scheduler(self) -> TrialScheduler:
        asha = self.sweep.stopping
        if asha is None:
            return FIFOScheduler()
        scheduler, nobody = _asha(asha, self.run), cast(Any, None)
        for trial in self.trials:
            if trial.is_done and trial.curve:  # what it decided by before this start
                stub: Any = SimpleNamespace(trial_id=trial.trial.id)
                scheduler.on_trial_add(nobody, stub)
                for samples, ap in sorted(trial.curve.items()):
                    scheduler.on_trial_result(nobody, stub, {"samples_seen": samples, "AP": ap})
                scheduler.on_trial_remove(nobody, stub)
        return scheduler

    # The next trial

    def next_trial(self) -> dict[str, Any] | None:
        """What the process of the next trial is given; none if there are no more."""
        if not self.waiting:
            if not self._has_more():
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

    def _has_more(self) -> bool:
        return self.proposer is not None and len(self.trials) < self.num_trials

    def _propose(self) -> TrialFolder:
        assert self.proposer is not None
        problem = ""
        for _ in range(MAX_PROPOSALS):
            changes, asked = self.proposer.ask()
            try:
                trial = self.sweep.trial(changes, len(self.trials) + 1)
                _check_trials(self.sweep, [trial])
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

    # What Tune tells

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._verify(self.by_id[trial.config["trial"]])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self.by_id[trial.config["trial"]]
        mine.look()
        if mine.has_end:
            mine.settle()
        elif failure := mine.lasting_failure():
            mine.settle(failed=failure)
        elif mine.was_asked:
            mine.settle(stopped_by=f"person: asked to stop after {mine.samples:,} samples")
        elif self.sweep.stopping is not None and mine.curve:
            samples, ap = max(mine.curve.items())
            part = f"1/{self.sweep.stopping.reduction:g}"
            mine.settle(
                stopped_by=f"asha: AP {ap:.1f} after {samples:,} samples was not in the upper "
                f"{part} of the trials that came there before"
            )
        else:
            mine.settle(failed="Ray ended it before it had a result; see its folder")
        self._has_ended(mine)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self.by_id[trial.config["trial"]]
        why = Vigil(_run_of(self.run, mine), Console(self.run, lambda _: None))
        why._attempt_began_s = 0.0
        message = why.last_failure() or _last_line(trial)
        mine.settle(failed=f"{message} (and so {self.sweep.max_failures + 1} times)")
        self._has_ended(mine)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now_s = time.monotonic()
        if now_s - self.looked_s < LOOK_EVERY_S:
            return
        self.looked_s = now_s
        for trial_id in self.locks:
            self.by_id[trial_id].look()
        self._draw()
        if self.lock.lost:
            self.error = RuntimeError(
                f"{self.folder}: another process has taken this sweep over, since nothing was "
                "heard of this one for too long"
            )
            raise self.error
        if (self.folder / STOP_FILE).exists():
            raise SystemExit(143)

    def _verify(self, trial: TrialFolder) -> bool:
        try:
            return trial.verify()
        except MismatchError as error:
            self.error = error
            raise

    def _has_ended(self, trial: TrialFolder) -> None:
        trial_id = trial.trial.id
        if trial.status in ("finished", "stopped") and not self._verify(trial):
            self.error = MismatchError(f"{trial.name}: left no checkpoint to verify it by")
            raise self.error
        if trial_id in self.launched_s and trial.status == "finished":
            self.took_s.append(time.monotonic() - self.launched_s[trial_id])
        if lock := self.locks.pop(trial_id, None):
            lock.release()
        if self.proposer is not None:
            self.proposer.tell(trial_id, trial.trial.changes, trial.record(self.price))
        self._draw()
        self._report(is_over=False)
        done = [one for one in self.trials if one.is_done]
        aps = [one.ap for one in done if one.ap is not None]
        values = {
            "sweep/ended": float(len(done)),
            "sweep/hours": sum(one.total_s for one in done) / 3600,
        }
        if aps:
            values["sweep/best_AP"] = max(aps)
        self.journal.write("progress", step=len(done), metrics=values)
        self._send_files()

    # At the end

    def _settle_the_rest(self, failed: str, *, killed: bool = False) -> None:
        for trial in self.trials:
            if trial.trial.id in self.locks and not trial.is_done:
                trial.settle(failed=failed, killed="the sweep ended" if killed else "")
                self.locks.pop(trial.trial.id).release()

    def _leave_in_order(self) -> None:
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
        self._settle_the_rest("", killed=True)

    def _write_end(self, status: str, reason: str, report: StudyReport) -> None:
        if self.lock.lost:
            return
        self._send_files()
        verdict = " ".join(report.verdicts)
        self.journal.write("tags", tags={"deta.verdict": verdict})
        self.journal.write("ended", status=status, reason=reason)
        self.journal.close()

    def _report(self, *, is_over: bool) -> StudyReport:
        tracking = read_record(self.folder).uri
        return write_results(
            self.folder,
            self.sweep,
            records_of(self.trials, self.price, tracking),
            base_run=read_run_file(self.folder),
            hardware=str(self.content.get("hardware") or ""),
            is_over=is_over,
        )

    def _send_files(self) -> None:
        keys = self.sweep.varied_keys()
        lines = [*aligned(rows(self.trials, keys))]
        lines.append(summary_line(self.trials, self.num_trials, self._footing()))
        (self.folder / TABLE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
        for path, to in files_to_send(self.folder):
            self.journal.write("file", path=path, to=to)

    def _draw(self, *, last: bool = False) -> None:
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
        return left_s / self.at_once

    def _first_failure(self) -> str:
        return next((trial.reason for trial in self.trials if trial.reason), "")


class _Supply(Searcher):
    """Tune asks it for trials; what it answers is the driver's business."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__()
        self.driver = driver

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        try:
            return self.driver.next_trial() or cast(Any, Searcher.FINISHED)
        except Exception as error:
            self.driver.error = error
            raise

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None: ...

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None: ...


def _asha(asha: Asha, run: Run) -> ASHAScheduler:
    samples = run.num_steps * run.config.total_batch_size
    return ASHAScheduler(
        time_attr="samples_seen",
        metric="AP",
        mode="max",
        grace_period=asha.grace_samples,
        reduction_factor=asha.reduction,
        max_t=max(asha.max_samples or samples, asha.grace_samples),
        stop_last_trials=False,  # a trial knows its own end
    )


def _run_of(base: Run, trial: TrialFolder) -> Run:
    return replace(base, config=trial.config, folder=trial.folder)


def _last_line(trial: Any) -> str:
    try:
        error = trial.get_pickled_error() or trial.get_error()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    except Exception:
        return "its workers were lost"
