"""Train the trials of a search space or a study design on Ray Tune.

Every trial is a separate training with its own workers and run folder, through the same
`fit_on_cluster` as a single run. Ray Tune decides when a trial begins and, with ASHA, which one
stops early. All state is in the trials' folders and nowhere else (`scheduler.py`): a sweep that was
killed reads them and creates a new Tuner for the rest, since a kill can corrupt Tune's own
snapshots.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

# First: they set variables that Ray reads when it is imported.
from deta.platform.cluster.connection import ClusterTooSmallError, join_cluster
from deta.platform.cluster.cpu_share import fit_cpus, num_places
from deta.platform.cluster.driver import check_resources
from deta.platform.cluster.trainer import fit_on_cluster

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # journals replace them
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is handled here
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose verbose=0 is not silent

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from deta.platform.cluster.reservations import release_reservations
from deta.platform.launch.attempt_monitor import AttemptMonitor
from deta.platform.launch.orphan_reaper import CLEAN_EXIT, start_orphan_reaper
from deta.platform.launch.prepare_run import prepare_run
from deta.platform.run.config import ClusterConfig, RunConfig, from_json
from deta.platform.run.run import OUTCOME_FILE, AttemptOutcome, Run
from deta.platform.run.run_lock import RunLock
from deta.platform.study.design import Trial
from deta.platform.study_report.content import StudyReport
from deta.platform.sweep.live_table import LiveTable
from deta.platform.sweep.scheduler import POLL_INTERVAL_S, SweepScheduler, check_trials
from deta.platform.sweep.search_space import Sweep
from deta.platform.sweep.speed_probe import TrialSpeed, measure_speed, whole_estimate
from deta.platform.sweep.sweep_folder import describe_sweep, read_sweep, refuse_another, write_sweep
from deta.platform.system.atomic_write import write_json
from deta.platform.system.process_tree import RUN_MARK, kill_marked, new_mark, working_in
from deta.platform.tracking.upload_process import finish_uploader, start_uploader

logger = logging.getLogger(__name__)

DRIVER_MEMORY_BYTES = 100 * 2**20  # Tune needs a non-zero resource request of a trial's own process


def launch_sweep(
    sweep: Sweep,
    *,
    probe: bool = True,
    estimate_only: bool = False,
    confirm: Callable[[str], bool] | None = None,
    retry_failed: bool = False,
) -> StudyReport | None:
    """Run a sweep on the Ray cluster named by RAY_ADDRESS, or on one started here.

    Calling it again continues the sweep: finished trials are not run again, others resume.

    Args:
        probe: measure the speed before anything is trained, and tell what all of it will
            cost.
        confirm: called with that estimate; returns whether to continue.
        retry_failed: run failed trials once more.

    Returns:
        The report; None if only the estimate was requested, or `confirm` declined.

    Raises:
        ValueError: the input, the name, or a lock; before the cluster is touched.
        ClusterTooSmallError: a trial can never be scheduled; names it and what the cluster lacks.
        MismatchError: a trial was trained with parameters other than its own.
        RuntimeError: no trial finished.
    """
    table = LiveTable()
    run = prepare_run(sweep.config)
    sweep = sweep.with_base(run.config)
    trials = sweep.trials()
    check_trials(sweep, trials)
    folder = run.folder
    before = read_sweep(folder) if folder.exists() else None
    is_new = before is None
    now = describe_sweep(sweep, run, trials, before)
    if before is not None:
        refuse_another(folder, before, now)
    mark = new_mark()
    os.environ[RUN_MARK] = mark  # child processes inherit it
    with RunLock.acquire(folder) as lock, _reaping_orphans(mark, folder), working_in(folder):
        try:
            try:
                table.print_line(join_cluster())
            except Exception as error:
                raise RuntimeError(f"there is no Ray cluster: {error}") from error
            at_once = _room(sweep, trials)
            table.print_line(f"{sweep.num_trials} trials, {at_once} at once")
            now["hardware"] = _hardware()
            if probe and is_new:
                first = sweep.trial_config(trials[0]) if trials else sweep.config
                speed = measure_speed(run, first, folder / "probe", table.print_line)
                now["estimate"] = asdict(speed)
            estimate = ""
            if now["estimate"]:
                estimate = _estimate(sweep, run, TrialSpeed(**now["estimate"]), trials, at_once)
                table.print_line(estimate)
            is_wanted = not estimate_only and not (confirm and is_new and not confirm(estimate))
        except BaseException:
            is_wanted = False
            raise
        finally:
            if is_new and not is_wanted:
                lock.release()
                shutil.rmtree(folder, ignore_errors=True)
        if not is_wanted:
            return None
        now["command"] = shlex.join(["python", *sys.argv])
        write_sweep(folder, now)
        state = SweepScheduler(sweep, run, trials, at_once, table, now, lock, retry_failed)
        return _run_to_end(state)


@contextmanager
def _reaping_orphans(mark: str, folder: Path) -> Iterator[None]:
    """End all child processes when this process ends, however it ends."""
    reaper = start_orphan_reaper(mark, folder)
    try:
        yield
    finally:
        ray.shutdown()
        kill_marked(RUN_MARK, mark)
        assert reaper.stdin is not None
        with suppress(BrokenPipeError):
            reaper.stdin.write(CLEAN_EXIT)
            reaper.stdin.close()
        reaper.wait()


# What the cluster has


def _room(sweep: Sweep, trials: list[Trial]) -> int:
    """Return how many trials run at once.

    Raises:
        ClusterTooSmallError: a trial would wait forever.
    """
    least = 10**6
    clusters: dict[ClusterConfig, str] = {}
    for trial in trials:
        clusters.setdefault(sweep.trial_config(trial).cluster, sweep.trial_name(trial))
    for wanted_cluster, name in (clusters or {sweep.config.cluster: "a trial"}).items():
        cluster = fit_cpus(wanted_cluster, ray.nodes())
        try:
            check_resources(cluster)
        except ClusterTooSmallError as error:
            raise ClusterTooSmallError(f"{name}: {error}") from None
        num_workers = cluster.min_workers or cluster.num_workers
        places = sum(num_places(node, cluster) for node in _nodes())
        if places < num_workers:
            wanted = f"{cluster.cpus_per_worker:g} CPUs" + (" and a GPU" if cluster.gpu else "")
            raise ClusterTooSmallError(
                f"{name} needs {num_workers} workers with {wanted} each on one node; the cluster's "
                f"nodes have room for {places}. Lower cluster.cpus_per_worker or "
                "cluster.num_workers"
            )
        least = min(least, max(1, places // cluster.num_workers))
    return min(least, sweep.max_concurrent or least)


def _nodes() -> list[dict[str, float]]:
    """Return the resources of each node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _hardware() -> str:
    """Describe the nodes of the cluster."""
    nodes = _nodes()
    kinds = sorted(
        {key.partition(":")[2] for node in nodes for key in node if key.startswith("accelerator_")}
    )
    cpus, gpus = (sum(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU"))
    words = f"{len(nodes)} node{'s' * (len(nodes) > 1)}, {cpus:.0f} CPU cores"
    if gpus:
        words += f", {gpus:.0f} × {' / '.join(kinds) or 'GPU'}"
    return words


def _estimate(sweep: Sweep, run: Run, speed: TrialSpeed, trials: list[Trial], at_once: int) -> str:
    """Describe the cost of all trials."""
    configs = [sweep.trial_config(trial) for trial in trials] or [sweep.config] * sweep.num_trials
    each, whole = whole_estimate(speed, run, configs, at_once)
    until = datetime.now().astimezone() + timedelta(hours=whole.hours)
    text = (
        f"estimate: a trial {each}\n"
        f"estimate: all {len(configs)}, {at_once} at once: {whole}; until {until:%a %H:%M}"
    )
    return text if sweep.stopping is None else f"{text}, less the trials that ASHA stops"


# In the process of a trial, on any node of the cluster


def _train_trial(given: dict[str, Any], base: Run) -> None:
    """Train one trial from its last checkpoint; Tune calls it again if it raises."""
    config, folder = from_json(RunConfig, given["config"]), Path(given["folder"])
    run = replace(base, config=config, folder=folder)
    (folder / OUTCOME_FILE).unlink(missing_ok=True)
    monitor = AttemptMonitor(run)
    threading.Thread(target=_end_if_silent, args=(monitor,), daemon=True).start()
    began = AttemptMonitor(run)
    try:
        # A lost worker ends the attempt. Tune starts the next one and counts them.
        fit_on_cluster(run, max_failures=0, callbacks=[TuneReportCallback()])
    except Exception:
        failure = began.permanent_failure()
        if not failure:
            raise
        write_json(folder / OUTCOME_FILE, asdict(AttemptOutcome("refused", failure)), durable=True)


def _end_if_silent(monitor: AttemptMonitor) -> None:
    while True:
        time.sleep(POLL_INTERVAL_S)
        monitor.poll()
        if monitor.ended or monitor.stopped:
            return
        if reason := monitor.hang():
            logger.error("%s: %s; the trial starts again", monitor.run.folder, reason)
            os._exit(1)


# In this process


def _run_to_end(state: SweepScheduler) -> StudyReport:
    table, folder = state.table, state.folder
    uploader = start_uploader(folder, sweep=True)
    state.begin()
    status: Literal["FINISHED", "FAILED", "KILLED"] = "FAILED"
    reason = ""
    try:
        if state.waiting or state.has_more:
            _tune(state)
        state.end_remaining("it ended without a result; see its folder")
        if all(trial.status == "failed" for trial in state.trials):
            reasons = [trial.reason for trial in state.trials if trial.reason]
            raise RuntimeError(f"no trial finished; the first: {' '.join(reasons[:1])}")
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status, reason = "KILLED", "stopped from outside"
        state.stop_gracefully()
        raise
    except BaseException as error:
        reason = str(error)
        state.end_remaining("", killed=True)
        raise
    finally:
        report = state.report(is_over=status == "FINISHED")
        state.draw(last=True)
        state.write_end(status, reason, report)
        uploaded = finish_uploader(uploader, folder)
        if not uploaded.is_complete:
            table.print_line(
                f"the upload to MLflow at {uploaded.uri} is not complete. Nothing is lost: "
                f"python jobs/sync.py {folder}"
            )
    for sentence in report.verdicts:
        table.print_line(sentence)
    table.print_line(f"report: {folder / 'report.html'}")
    return report


def _tune(state: SweepScheduler) -> None:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    trainable = tune.with_resources(
        tune.with_parameters(_train_trial, base=state.run),
        {"CPU": 0, "memory": DRIVER_MEMORY_BYTES},
    )
    callback = _TuneCallback(state)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_SchedulerSearch(callback),
            scheduler=_scheduler(state),
            num_samples=-1,  # until the scheduler has no more
            max_concurrent_trials=state.at_once,
            trial_dirname_creator=lambda trial: str(trial.config["trial"]),
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns()}",
            storage_path=str(state.folder / "ray"),
            failure_config=tune.FailureConfig(max_failures=state.sweep.max_failures),
            callbacks=[callback],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception:
        if callback.error is not None:  # Tune wraps it in its own advice
            raise callback.error from None
        raise


def _scheduler(state: SweepScheduler) -> TrialScheduler:
    asha, run = state.sweep.stopping, state.run
    if asha is None:
        return FIFOScheduler()
    samples = run.num_steps * run.config.total_batch_size
    scheduler = ASHAScheduler(
        time_attr="samples_seen",
        metric="AP",
        mode="max",
        grace_period=asha.grace_samples,
        reduction_factor=asha.reduction,
        max_t=max(asha.max_samples or samples, asha.grace_samples),
        stop_last_trials=False,  # a trial ends by itself
    )
    nobody = cast(Any, None)
    for trial in state.trials:
        if trial.is_done and trial.curve:  # results that ASHA saw before this start
            stub: Any = SimpleNamespace(trial_id=trial.trial.id)
            scheduler.on_trial_add(nobody, stub)
            for seen, ap in sorted(trial.curve.items()):
                scheduler.on_trial_result(nobody, stub, {"samples_seen": seen, "AP": ap})
            scheduler.on_trial_remove(nobody, stub)
    return scheduler


class _TuneCallback(tune.Callback):
    """Forward Tune's events to the scheduler of the sweep."""

    def __init__(self, state: SweepScheduler) -> None:
        self.state = state
        self.error: Exception | None = None  # that ends the sweep

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and nobody reads that copy

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        with self._recording_errors():
            self.state.by_id[trial.config["trial"]].verify()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with self._recording_errors():
            # Tune has killed the trial, so it cannot cancel its reservation itself.
            release_reservations(Path(trial.config["folder"]))
            self.state.on_trial_ended(trial.config["trial"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        with self._recording_errors():
            release_reservations(Path(trial.config["folder"]))
            error = trial.get_error()  # Ray also saves the exception, but as a pickle
            lines = str(error or "").strip().splitlines() or ["its workers were lost"]
            self.state.on_trial_failed(trial.config["trial"], lines[-1])

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        with self._recording_errors():
            self.state.poll()

    @contextmanager
    def _recording_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = error
            raise


class _SchedulerSearch(Searcher):
    """Tune asks it for trials; which ones is the business of the sweep's state."""

    def __init__(self, callback: _TuneCallback) -> None:
        super().__init__()
        self.callback = callback

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        with self.callback._recording_errors():
            return self.callback.state.next_trial() or cast(Any, Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, *_: Any, **__: Any) -> None: ...

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None: ...
