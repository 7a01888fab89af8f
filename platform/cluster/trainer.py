"""Trains a run on the workers of a cluster that this process has joined, by Ray Train."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import deta.platform.cluster.connection  # noqa: F401  # sets what Ray reads when it is imported

# isort: split
import ray
import ray.train
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from deta.platform.cluster.auth_token import starts_own_cluster
from deta.platform.cluster.cpu_share import fit_cpus
from deta.platform.cluster.metrics_export import RunExport
from deta.platform.cluster.reservations import release_reservations, save_reservation
from deta.platform.cluster.train_worker import train_worker
from deta.platform.cluster.worker_group import FixedSize, ProcessGroupConfig
from deta.platform.run.config import ClusterConfig
from deta.platform.run.run import Run


class Trainer(DataParallelTrainer):
    """A trainer of Ray Train without what a run does not use, for a short start.

    Left out is the manager of data sets; and in a cluster that ends with this process also the
    actor that removes placement groups after a lost controller, the request to an autoscaler, and
    an environment of the controller's own, for which Ray would start a process instead of using one
    that is ready. Each is a process that imports Ray Train, two seconds of a core.

    The methods and classes are private to Ray 2.60, below whose next version it is pinned.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = {"DatasetsCallback"}
        if starts_own_cluster():
            unused.add("PlacementGroupCleanerCallback")
        callbacks: list[Any] = super()._create_default_callbacks()
        return [one for one in callbacks if type(one).__name__ not in unused]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if not starts_own_cluster():
            return super()._initialize_and_run_controller(**arguments)
        if type(arguments["scaling_policy"]) is FixedScalingPolicy:
            arguments["scaling_policy"] = FixedSize(arguments["scaling_policy"].scaling_config)
        controller: Any = ray.remote(num_cpus=0)(TrainController).remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def fit_on_cluster(run: Run, *, max_failures: int, callbacks: list[Any] | None = None) -> None:
    """Train a run until it has ended.

    Args:
        max_failures: how often Ray may replace lost workers; -1 for any number of times.
        callbacks: of Ray Train; a sweep uses one to follow the metrics.

    Raises:
        ray.train.TrainingFailedError: workers failed too often.
        ray.exceptions.RayActorError: Ray's controller was lost.
    """
    settings = {"run": ray.put(run)}
    cluster = fit_cpus(run.config.cluster, ray.nodes())
    trainer = make_trainer(cluster, settings, run.folder / "ray", max_failures, callbacks)
    release_reservations(run.folder)
    save_reservation(run.folder, trainer)
    with RunExport(run.folder, run.config.name):
        trainer.fit()


def make_trainer(
    cluster: ClusterConfig,
    settings: dict[str, Any],
    storage: Path,
    max_failures: int,
    callbacks: list[Any] | None = None,
) -> Trainer:
    """Return a trainer whose workers call `train_worker`.

    Args:
        settings: for `train_worker`; `cpus` are added.
        storage: a folder for Ray's own records, that all nodes share.
    """
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpu:
        resources["GPU"] = 1
    num_workers: Any = cluster.num_workers
    if cluster.min_workers not in (None, cluster.num_workers):
        num_workers = (cluster.min_workers, cluster.num_workers)
        # Ray requests only what it believes is free, so workers start at once; or Ray does not know
        # yet that a node is lost, checks again after this time, and continues with fewer workers.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    return Trainer(
        train_worker,
        train_loop_config=settings | {"cpus": cluster.cpus_per_worker},
        backend_config=ProcessGroupConfig("nccl" if cluster.gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers, use_gpu=cluster.gpu, resources_per_worker=resources
        ),
        # Each attempt has a new name. With the same name Ray would resume from its own records, but
        # a run resumes from its checkpoints.
        run_config=ray.train.RunConfig(
            name=f"deta-{time.time_ns()}",
            storage_path=str(storage),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            callbacks=callbacks,
        ),
    )
