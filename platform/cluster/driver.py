"""The Ray driver: joins or starts a cluster, trains on it once, and reports the outcome.

The supervisor (`launch/supervisor.py`) runs it as a separate process, because the loss of a cluster
can end the process that has joined it, from C++ and without an exception. Ray replaces lost workers
without the supervisor; every other failure ends the attempt.

It starts before the run does (`launch/ray_driver.py`), and reads from its input what it needs:
first the resources, then the folder of the run. A cluster of its own and its workers start while
the supervisor's process checks the data. Input that ends is the request to exit.

    python -m deta.platform.cluster.driver
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Literal

from deta.platform.cluster.connection import ClusterTooSmallError, join_cluster

# First: it sets variables that Ray reads when it is imported.
from deta.platform.system.atomic_write import write_atomic, write_json

# isort: split
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deta.platform.cluster.auth_token import OpenClusterError, starts_own_cluster
from deta.platform.cluster.cpu_share import fit_cpus
from deta.platform.cluster.metrics_export import RunExport
from deta.platform.cluster.reservations import (
    release_reservations,
    remove_placement_groups,
    save_reservation,
)
from deta.platform.cluster.train_worker import require_gpu
from deta.platform.cluster.trainer import fit_on_cluster, make_trainer
from deta.platform.run.config import ClusterConfig, from_json
from deta.platform.run.run import ATTEMPT_LOG, OUTCOME_FILE, AttemptOutcome
from deta.platform.system.process_tree import ATTEMPT_MARK, kill_marked

MAX_CONTROLLERS = 3  # Ray controllers lost in a row without a new checkpoint; then the attempt ends
GPU_ANSWER_WITHIN_S = 60.0  # a worker process starts within it on a busy machine
RELEASE_WITHIN_S = 1.0  # it takes milliseconds


class RunRefusedError(RuntimeError):
    """The run cannot be read, so no attempt would succeed."""


def check_resources(cluster: ClusterConfig) -> None:
    """Check that the cluster can provide the resources; without this, Ray would wait forever.

    Raises:
        ClusterTooSmallError: names what the cluster lacks.
    """
    available = ray.cluster_resources()
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


def check_gpus(cluster: ClusterConfig) -> None:
    """Check that PyTorch can use the GPUs that Ray counts, on each node that has a free one.

    Raises:
        ClusterTooSmallError: it cannot; says where and why.
    """
    if not cluster.gpu:
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


class Orders:
    """What the supervisor writes to this process, line by line: the resources, then the folder."""

    def __init__(self) -> None:
        self._clusters: queue.Queue[ClusterConfig] = queue.Queue()
        self._folders: queue.Queue[Path] = queue.Queue()
        # For the workers that wait for the run, and for what Ray stores of them.
        self.scratch = Path(tempfile.mkdtemp(prefix="deta-ray-"))
        self.folder_file = self.scratch / "folder"

    def cluster(self) -> ClusterConfig:
        """Return the resources; wait until they are known."""
        return self._clusters.get()

    def folder(self) -> Path:
        """Return the folder of the run; wait until it may begin."""
        folder = self._folders.get()
        self._folders.put(folder)  # for the next caller
        return folder

    def follow(self) -> None:
        """Read until the input ends, then end this process and all that it has started."""
        try:
            self._read()
        except OSError as error:  # a full disk: the run cannot begin, so this attempt ends
            print(f"the order to begin could not be followed: {error}", flush=True)
        # The supervisor closed it on purpose, or died. A driver must not train beside its
        # successor, nor hold reservations that others need.
        if ray.is_initialized() and not starts_own_cluster() and not self._folders.empty():
            releasing = threading.Thread(
                target=release_reservations, args=(self.folder(),), daemon=True
            )
            releasing.start()
            releasing.join(RELEASE_WITHIN_S)  # a lost cluster does not answer
        kill_marked(ATTEMPT_MARK, os.environ[ATTEMPT_MARK])
        self.exit(1)

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            order = json.loads(line)
            if "cluster" in order:
                self._clusters.put(from_json(ClusterConfig, json.dumps(order["cluster"])))
            if "folder" in order:
                folder = Path(order["folder"])
                _move_log(folder)
                write_atomic(self.folder_file, str(folder))
                self._folders.put(folder)

    def exit(self, code: int) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        # Ray's atexit handlers can hang when the cluster is gone.
        sys.stdout.flush()
        os._exit(code)


def _move_log(folder: Path) -> None:
    """Append to the log of the run's attempts what this process has printed and will print."""
    sys.stdout.flush()
    with (folder / ATTEMPT_LOG).open("ab") as log:
        early_bytes = os.fstat(1).st_size
        log.write(os.pread(1, early_bytes, 0))
        log.flush()
        os.ftruncate(1, 0)  # the supervisor saves what is left there, if this process dies early
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def run_attempt(orders: Orders) -> AttemptOutcome:
    """Train once and return the outcome; the results are in the run's journal and checkpoints."""
    is_own = starts_own_cluster()
    try:
        print(join_cluster(), flush=True)
    except OpenClusterError as error:
        return AttemptOutcome("refused", str(error))
    except Exception as error:
        # If our own cluster did not start, for example on a busy machine, a retry may help.
        kind: Literal["unreachable", "lost"] = "lost" if is_own else "unreachable"
        return AttemptOutcome(kind, f"{type(error).__name__}: {error}")
    try:
        cluster = fit_cpus(orders.cluster(), ray.nodes())
        check_resources(cluster)
        check_gpus(cluster)
        train = _train_early if is_own else _train
        fruitless, reached = 0, -1
        while True:
            try:
                train(cluster, orders)
                return AttemptOutcome("ended")
            except ray.exceptions.RayActorError as error:  # the controller, not a worker
                print(f"Ray's controller was lost ({type(error).__name__})", flush=True)
                if is_own:
                    remove_placement_groups()
                before, reached = reached, newest_step(orders.folder())
                fruitless = 0 if reached > before else fruitless + 1
                if fruitless == MAX_CONTROLLERS:
                    raise
    except (ClusterTooSmallError, RunRefusedError) as error:
        return AttemptOutcome("refused", str(error))
    except Exception as error:
        return AttemptOutcome("lost", f"{type(error).__name__}: {error}")


def _train_early(cluster: ClusterConfig, orders: Orders) -> None:
    """Train on a cluster of this process; its workers wait for the run when they have started."""
    threading.Thread(target=_export, args=(orders,), daemon=True).start()
    settings = {"folder_file": str(orders.folder_file)}
    trainer = make_trainer(cluster, settings, orders.scratch, max_failures=-1)
    release_reservations(orders.scratch)  # of a controller that was lost
    save_reservation(orders.scratch, trainer)
    trainer.fit()


def _export(orders: Orders) -> None:
    folder = orders.folder()
    RunExport(folder, folder.name).start()


def _train(cluster: ClusterConfig, orders: Orders) -> None:
    """Train on a cluster of others, whose resources are taken once the run may begin."""
    # Here, because it imports torch.
    from deta.platform.run.dataset_snapshot import SnapshotError, read_run_snapshot

    try:
        run = read_run_snapshot(orders.folder())
    except SnapshotError as error:
        raise RunRefusedError(str(error)) from error
    fit_on_cluster(run, max_failures=-1)


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint of a run; -1 if it has none."""
    # Here, because it imports torch.
    from deta.platform.checkpoint.local import newest_checkpoint

    newest = newest_checkpoint(folder / "checkpoints")
    return -1 if newest is None else newest.state.step


def main() -> None:
    orders = Orders()
    threading.Thread(target=orders.follow, daemon=True).start()
    outcome = run_attempt(orders)
    write_json(orders.folder() / OUTCOME_FILE, vars(outcome))
    orders.exit(0)


if __name__ == "__main__":
    main()
