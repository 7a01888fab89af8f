"""The Ray driver: joins or starts a cluster, trains on it once, and reports the outcome.

The supervisor (`launch/supervisor.py`) runs it as a separate process, because the loss of a cluster
can end the process that has joined it, from C++ and without an exception. Ray replaces lost workers
without the supervisor; every other failure ends the attempt.

    python -m deta.platform.cluster.driver FOLDER
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

from deta.platform.cluster.connection import ClusterTooSmallError, join_cluster

# First: it sets variables that Ray reads when it is imported.
from deta.platform.system.atomic_write import write_json

# isort: split
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.cluster.auth_token import OpenClusterError, starts_own_cluster
from deta.platform.cluster.metrics_export import RunExport
from deta.platform.cluster.reservations import release_reservations, save_reservation
from deta.platform.cluster.train_worker import require_gpu, train_worker
from deta.platform.run.config import RunConfig
from deta.platform.run.dataset_snapshot import SnapshotError, read_run_snapshot
from deta.platform.run.run import OUTCOME_FILE, AttemptOutcome, Run
from deta.platform.system.process_tree import ATTEMPT_MARK, kill_marked

MAX_CONTROLLERS = 3  # Ray controllers lost in a row without a new checkpoint; then the attempt ends
GPU_ANSWER_WITHIN_S = 60.0  # a worker process starts within it on a busy machine
RELEASE_WITHIN_S = 1.0  # it takes milliseconds


class Trainer(TorchTrainer):
    """A `TorchTrainer` without Ray's manager of data sets, which a run does not use.

    The manager is one more process at each start of workers, and its imports take one of fourteen
    seconds on two cores. The method is private to Ray (2.60); if Ray renames it, the manager starts
    again and nothing else changes.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if type(one).__name__ != "DatasetsCallback"]


def check_resources(config: RunConfig) -> None:
    """Check that the cluster can provide the resources; without this, Ray would wait forever.

    Raises:
        ClusterTooSmallError: names what the cluster lacks.
    """
    available = ray.cluster_resources()
    cluster = config.cluster
    num_workers = cluster.min_workers or cluster.num_workers
    wanted = {"CPU": num_workers * cluster.cpus_per_worker}
    if cluster.gpu:
        wanted["GPU"] = num_workers
    if lacking := [
        f"{number:g} {kind}s (it has {available.get(kind, 0):g})"
        for kind, number in wanted.items()
        if number > available.get(kind, 0)
    ]:
        raise ClusterTooSmallError(
            f"the run needs {num_workers} workers and therefore {' and '.join(lacking)} of the "
            "cluster. Lower cluster.num_workers or cluster.cpus_per_worker (the total batch stays "
            "the same: workers accumulate), or set cluster.gpu=false to train on CPUs."
        )


def check_gpus(config: RunConfig) -> None:
    """Check that PyTorch can use the GPUs that Ray counts, on each node that has a free one.

    Raises:
        ClusterTooSmallError: it cannot; says where and why.
    """
    if not config.cluster.gpu:
        return
    ask = ray.remote(num_cpus=0, num_gpus=1)(require_gpu)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    answers = [
        ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in nodes
    ]
    given, others = ray.wait(answers, num_returns=len(answers), timeout=GPU_ANSWER_WITHIN_S)
    for other in others:  # the GPUs of its node are in use, so they can be used
        ray.cancel(other)
    try:
        ray.get(given)
    except ray.exceptions.RayTaskError as error:
        raise ClusterTooSmallError(str(error.cause)) from error


def fit_on_cluster(run: Run, *, max_failures: int, callbacks: list[Any] | None = None) -> None:
    """Train on the cluster that this process has joined, until the run has ended.

    Args:
        max_failures: how often Ray may replace lost workers; -1 for any number of times.
        callbacks: of Ray Train; a sweep uses one to follow the metrics.

    Raises:
        ray.train.TrainingFailedError: workers failed too often.
        ray.exceptions.RayActorError: Ray's controller was lost.
    """
    cluster = run.config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpu:
        resources["GPU"] = 1
    num_workers: Any = cluster.num_workers
    if cluster.min_workers not in (None, cluster.num_workers):
        num_workers = (cluster.min_workers, cluster.num_workers)
        # Ray requests only what it believes is free, so workers start at once; or Ray does not know
        # yet that a node is lost, checks again after this time, and continues with fewer workers.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    trainer = Trainer(
        train_worker,
        train_loop_config={"run": ray.put(run)},
        torch_config=TorchConfig(backend="nccl" if cluster.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=cluster.gpu,
            resources_per_worker=resources,
        ),
        # Each attempt has a new name. With the same name Ray would resume from its own records, but
        # a run resumes from its checkpoints.
        run_config=ray.train.RunConfig(
            name=f"{run.config.name}-{time.time_ns()}",
            storage_path=str(run.folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=callbacks,
        ),
    )
    release_reservations(run.folder)
    save_reservation(run.folder, trainer)
    with RunExport(run.folder, run.config.name):
        trainer.fit()


def run_attempt(folder: Path) -> AttemptOutcome:
    """Train once and return the outcome; the results are in the run's journal and checkpoints."""
    try:
        run = read_run_snapshot(folder)
        print(join_cluster(), flush=True)
    except (SnapshotError, OpenClusterError) as error:
        return AttemptOutcome("refused", str(error))
    except Exception as error:
        # If our own cluster did not start, for example on a busy machine, a retry may help.
        kind: Literal["unreachable", "lost"] = "lost" if starts_own_cluster() else "unreachable"
        return AttemptOutcome(kind, f"{type(error).__name__}: {error}")
    try:
        check_resources(run.config)
        check_gpus(run.config)
        fruitless, reached = 0, _newest_step(run)
        while True:
            try:
                fit_on_cluster(run, max_failures=-1)
                return AttemptOutcome("ended")
            except ray.exceptions.RayActorError as error:  # the controller, not a worker
                print(f"Ray's controller was lost ({type(error).__name__})", flush=True)
                before, reached = reached, _newest_step(run)
                fruitless = 0 if reached > before else fruitless + 1
                if fruitless == MAX_CONTROLLERS:
                    raise
    except ClusterTooSmallError as error:
        return AttemptOutcome("refused", str(error))
    except Exception as error:
        return AttemptOutcome("lost", f"{type(error).__name__}: {error}")


def _newest_step(run: Run) -> int:
    newest = newest_checkpoint(run.checkpoints)
    return -1 if newest is None else newest.state.step


def _end_with_supervisor(folder: Path) -> None:
    """Exit when stdin closes: the supervisor closed it on purpose, or died.

    A driver must not train beside its successor, nor hold reservations that others need.
    """
    sys.stdin.buffer.read()
    if ray.is_initialized() and not starts_own_cluster():
        releasing = threading.Thread(target=release_reservations, args=(folder,), daemon=True)
        releasing.start()
        releasing.join(RELEASE_WITHIN_S)  # a lost cluster does not answer
    kill_marked(ATTEMPT_MARK, os.environ[ATTEMPT_MARK])
    os._exit(1)


def main(folder: Path) -> None:
    threading.Thread(target=_end_with_supervisor, args=(folder,), daemon=True).start()
    outcome = run_attempt(folder)
    write_json(folder / OUTCOME_FILE, vars(outcome))
    # Ray's atexit handlers can hang when the cluster is gone.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
