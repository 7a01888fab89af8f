"""One attempt at a run on a Ray cluster: join it or start one, train, and say how it went.

The supervisor (`launch.py`) runs this as a process of its own, because losing a cluster can end
the process that has joined it, from C++ and without an exception. Workers that are lost meanwhile
are replaced by Ray, without the supervisor; all else ends the attempt.

    python -m deta.platform.cluster.driver FOLDER
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal

from deta.platform.cluster.connection import ClusterTooSmallError, connect

# First: it sets variables that Ray reads when it is imported.
from deta.platform.system.atomic_write import write_json

# isort: split
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from deta.platform.checkpoint.local import newest_checkpoint
from deta.platform.cluster.auth_token import OpenClusterError, starts_a_cluster
from deta.platform.cluster.metrics_export import RunExport
from deta.platform.cluster.reservations import give_back_reservations, note_reservation
from deta.platform.cluster.train_worker import train_worker
from deta.platform.run.config import RunConfig
from deta.platform.run.dataset_snapshot import SnapshotError, read_run_snapshot
from deta.platform.run.run import OUTCOME_FILE, AttemptOutcome, Run
from deta.platform.system.process_tree import ATTEMPT_MARK, kill_marked

CONTROLLERS = 3  # of Ray; so many in a row without a new checkpoint end the attempt
GIVE_BACK_S = 1.0  # it takes milliseconds


class Trainer(TorchTrainer):
    """Without Ray's manager of data sets, of which a run has none.

    That is a process more at each start of workers, for whose imports they wait where cores are
    few: a second of fourteen on two cores. The method is Ray's own affair (2.60); where it is
    called otherwise one day, the manager is back.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if type(one).__name__ != "DatasetsCallback"]


def check_resources(config: RunConfig) -> None:
    """Refuse what the cluster can never give, instead of waiting for it for ever.

    Raises:
        ClusterTooSmallError: says what it lacks.
    """
    available = ray.cluster_resources()
    cluster = config.cluster
    num_workers = cluster.min_workers or cluster.num_workers
    wanted = {"CPU": num_workers * cluster.cpus_per_worker}
    if cluster.gpu:
        wanted["GPU"] = num_workers
    lacking = [
        f"{number:g} {kind}s (it has {available.get(kind, 0):g})"
        for kind, number in wanted.items()
        if number > available.get(kind, 0)
    ]
    if lacking:
        raise ClusterTooSmallError(
            f"the run wants {num_workers} workers and so {' and '.join(lacking)} of the "
            "cluster. Lower cluster.num_workers or cluster.cpus_per_worker (the total batch stays: "
            "workers accumulate), or set cluster.gpu=false to train on CPUs."
        )


def fit(run: Run, *, max_failures: int, callbacks: list[Any] | None = None) -> None:
    """Train on the cluster that this process has joined, to the end.

    Args:
        max_failures: so often Ray replaces workers that were lost; -1: as often as it happens.
        callbacks: of Ray Train; a sweep follows the metrics with one.

    Raises:
        ray.train.TrainingFailedError, ray.exceptions.RayActorError: workers, or Ray's controller.
    """
    cluster = run.config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpu:
        resources["GPU"] = 1
    num_workers: Any = cluster.num_workers
    if cluster.min_workers not in (None, cluster.num_workers):
        num_workers = (cluster.min_workers, cluster.num_workers)
        # Only what Ray sees as free is asked for, so there is room at once, or Ray does not know
        # yet that a node is gone, looks again after this long, and goes on with fewer.
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
        # A name of its own for each attempt: Ray would take an equal one for a resumption
        # from its own records. The run's records are its checkpoints.
        run_config=ray.train.RunConfig(
            name=f"{run.config.name}-{time.time_ns()}",
            storage_path=str(run.folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=callbacks,
        ),
    )
    give_back_reservations(run.folder)
    note_reservation(run.folder, trainer)
    with RunExport(run.folder, run.config.name):
        trainer.fit()


def attempt(folder: Path) -> AttemptOutcome:
    """Try; what comes of it in the run is in its journal and its checkpoints."""
    try:
        run = read_run_snapshot(folder)
        print(connect(), flush=True)
    except (SnapshotError, OpenClusterError) as error:
        return AttemptOutcome("refused", str(error))
    except Exception as error:
        # A cluster of our own that did not come up, on a busy machine say, is worth another try.
        kind: Literal["unreachable", "lost"] = "lost" if starts_a_cluster() else "unreachable"
        return AttemptOutcome(kind, f"{type(error).__name__}: {error}")
    try:
        check_resources(run.config)
        fruitless, reached = 0, _newest_step(run)
        while True:
            try:
                fit(run, max_failures=-1)
                return AttemptOutcome("ended")
            except ray.exceptions.RayActorError as error:  # the controller, not a worker
                print(f"Ray's controller was lost ({type(error).__name__})", flush=True)
                before, reached = reached, _newest_step(run)
                fruitless = 0 if reached > before else fruitless + 1
                if fruitless == CONTROLLERS:
                    raise
    except ClusterTooSmallError as error:
        return AttemptOutcome("refused", str(error))
    except Exception as error:
        return AttemptOutcome("lost", f"{type(error).__name__}: {error}")


def _newest_step(run: Run) -> int:
    newest = newest_checkpoint(run.checkpoints)
    return -1 if newest is None else newest.state.step


def _end_with_supervisor(folder: Path) -> None:
    """The supervisor lets go of this process's input when it is to end, and when it dies.

    A driver must not train on beside its successor, nor keep what it had reserved from others.
    """
    sys.stdin.buffer.read()
    if ray.is_initialized() and not starts_a_cluster():
        giving = threading.Thread(target=give_back_reservations, args=(folder,), daemon=True)
        giving.start()
        giving.join(GIVE_BACK_S)  # a cluster that is gone does not answer
    kill_marked(ATTEMPT_MARK, os.environ[ATTEMPT_MARK])
    os._exit(1)


def main(folder: Path) -> None:
    threading.Thread(target=_end_with_supervisor, args=(folder,), daemon=True).start()
    outcome = attempt(folder)
    write_json(folder / OUTCOME_FILE, vars(outcome))
    # Leaving by the front door, Ray's library may wait for what is no longer there.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
