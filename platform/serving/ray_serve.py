"""A detection service on a Ray cluster: several replicas behind Ray Serve's HTTP proxy.

Each replica runs the application of app.py, with its own batching, alias polling and limits. Ray
restarts an unhealthy replica, and sends requests to a replica only once it has a model. Ray's own
batching (`serve.batch`) is not used: a batch must have images of one size, and the service batches
in the same way without Ray.

Ray exports the metrics, with `ray_` before the names in metrics.py: with several replicas, /metrics
would show those of any one of them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from deta.platform.cluster.auth_token import configure_own_cluster, starts_own_cluster

if starts_own_cluster():  # read by Ray when it is imported
    configure_own_cluster()

import ray.util.metrics
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from deta.platform.cluster.connection import join_cluster
from deta.platform.serving.app import create_app
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.metrics import METRICS, RECORDING, Measurements, Metric
from deta.platform.serving.model import ModelName
from deta.platform.serving.model_source import ModelSource
from deta.platform.system.child_server import is_loopback

APPLICATION = "deta"
SPARE_S = 5.0  # longer than the application, whose refusals have a reason
GRACE_S = 60.0  # for current requests when a replica stops


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The address of the service and the resources of its replicas."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    cpus: float = 1.0  # of each replica
    device: str = "auto"  # "cuda": a GPU for each; "auto": the same if the cluster has any


class RayMeasurements(Measurements):
    """The metrics of metrics.py, exported by Ray."""

    def record(self, metric: str, value: float = 1, /, **labels: str) -> None:
        getattr(self._metrics[metric], RECORDING[METRICS[metric].kind])(value, tags=labels)

    def text(self) -> None:
        return None

    def _new(self, name: str, metric: Metric) -> Any:
        options = {"boundaries": [*metric.buckets]} if metric.buckets else {}
        kind = getattr(ray.util.metrics, metric.kind)
        return kind(name, metric.description, tag_keys=metric.labels, **options)

    def _end_of(self, name: ModelName) -> None:
        self.record("model_info", 0, **name.labels())  # Ray removes no series


@serve.ingress()
class DetectionReplica:
    """A replica: one process with one model."""

    def __init__(self, source: ModelSource, config: ServingConfig) -> None:
        self.application = create_app(source, config, RayMeasurements(), load_first=True)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.application

    def check_health(self) -> None:
        """Raise if unhealthy. Ray calls this every few seconds and restarts the replica then."""
        if problem := self.application.state.service.health_problem():
            raise RuntimeError(problem)


@contextlib.contextmanager
def service_on_ray(
    source: ModelSource,
    config: ServingConfig,
    placement: Placement,
    echo: Callable[[str], None] = print,
) -> Iterator[str]:
    """Run a service on the cluster that RAY_ADDRESS names, or on one started here.

    Yields:
        The address, once all replicas have a model. The service stops at the end of the block.

    Raises:
        RuntimeError: the cluster is too small, or a replica did not start.
    """
    echo(join_cluster())
    gpus = _gpus(placement)
    loopback = is_loopback(placement.host)
    limit_s = config.read_timeout_s + config.answer_timeout_s + SPARE_S
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(
        proxy_location=ProxyLocation.HeadOnly if loopback else ProxyLocation.EveryNode,
        http_options=HTTPOptions(
            host=placement.host, port=placement.port, request_timeout_s=limit_s
        ),
        logging_config=quiet,
    )
    deployment: Any = serve.deployment(
        DetectionReplica,
        name="detections",
        num_replicas=placement.replicas,
        ray_actor_options={"num_cpus": placement.cpus, "num_gpus": gpus},
        # More than the application accepts, so that it refuses, with a reason, before Ray does.
        max_ongoing_requests=2 * config.max_requests,
        max_queued_requests=2 * config.max_requests,
        graceful_shutdown_timeout_s=GRACE_S,
        logging_config=quiet,
    )
    try:
        serve.run(deployment.bind(source, config), name=APPLICATION, route_prefix="/")
        yield f"http://{placement.host}:{placement.port}/"
    finally:
        # Also on a cluster that others started: this process started the service.
        serve.shutdown()
        if starts_own_cluster():
            ray.shutdown()


def wait_for_a_signal() -> int:
    """Wait for SIGINT or SIGTERM and return its number."""
    received: queue.SimpleQueue[int] = queue.SimpleQueue()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: received.put(number))
    number = received.get()
    logging.getLogger("ray").setLevel(logging.ERROR)
    return number


def metrics_addresses() -> list[str]:
    """Return the address of each node's metrics, for Prometheus."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"]
    ]


def _gpus(placement: Placement) -> int:
    """Return the GPUs of each replica.

    Raises:
        RuntimeError: the cluster is too small; Ray would wait forever.
    """
    available = ray.cluster_resources()
    has_any = available.get("GPU", 0) >= 1
    gpus = int(placement.device == "cuda" or (placement.device == "auto" and has_any))
    for kind, each in (("CPU", placement.cpus), ("GPU", gpus)):
        wanted, has = placement.replicas * each, available.get(kind, 0)
        if wanted > has:
            raise RuntimeError(
                f"{placement.replicas} replicas need {wanted:g} {kind}s, and the cluster has "
                f"{has:g}; ask for fewer with --replicas or --cpus"
            )
    return gpus
