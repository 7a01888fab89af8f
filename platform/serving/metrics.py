"""The metrics of a detection service, for Prometheus.

A process without Ray exports them at /metrics. Under Ray Serve, Ray exports them and puts `ray_`
before each name; see ray_serve.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import prometheus_client

from deta.platform.serving.model import ModelName

PREFIX = "deta_serving_"
# Upper bounds, in seconds: from an idle GPU with one small image to a busy CPU.
SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 30.0)


class Metric(NamedTuple):
    """A metric, and the class that has it in prometheus_client and in Ray."""

    kind: str
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds


METRICS = {
    # "ok", or the kind of the refusal
    "requests_total": Metric("Counter", "Detection requests, by outcome", ("outcome",)),
    # Of "ok" requests: refusals are fast and would hide the latency of a busy service.
    "request_seconds": Metric(
        "Histogram", "Seconds from a request's first byte to its detections", buckets=SECONDS
    ),
    # read, decode, wait, model
    "phase_seconds": Metric("Histogram", "Seconds of a request in one phase", ("phase",), SECONDS),
    "batch_size": Metric(
        "Histogram", "Images per batch", buckets=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    ),
    # After the limits of the request; the first bound counts images without any.
    "detections": Metric(
        "Histogram",
        "Detections returned per image",
        buckets=(0.5, 1, 2, 5, 10, 20, 50, 100, 300),
    ),
    "in_flight": Metric("Gauge", "Requests in progress"),
    # 1 for the current model
    "model_info": Metric("Gauge", "The current model", ("name", "version", "sha256")),
    # "ok", or "failed": the old model stayed
    "model_changes_total": Metric("Counter", "Model changes while serving", ("outcome",)),
}
RECORDING = {"Counter": "inc", "Gauge": "set", "Histogram": "observe"}  # the method of each kind
DESCRIPTIONS = {PREFIX + name: metric.description for name, metric in METRICS.items()}


class Measurements:
    """The metrics of this process, in a registry of their own, so that tests can have several."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.name: ModelName | None = None
        self._metrics = {name: self._new(PREFIX + name, one) for name, one in METRICS.items()}

    def record(self, metric: str, value: float = 1, /, **labels: str) -> None:
        """Add to a counter, set a gauge, or count a value in a histogram. It never blocks."""
        recorder = self._metrics[metric]
        recorder = recorder.labels(**labels) if labels else recorder
        getattr(recorder, RECORDING[METRICS[metric].kind])(value)

    def request(self, outcome: str, seconds: float) -> None:
        """Record the end of a detection request."""
        self.record("requests_total", outcome=outcome)
        if outcome == "ok":
            self.record("request_seconds", seconds)

    def model(self, name: ModelName) -> None:
        """Record that this model is the current one from now on."""
        if self.name is not None:
            self.record("model_changes_total", outcome="ok")
            self._end_of(self.name)
        self.name = name
        self.record("model_info", **name.labels())

    def text(self) -> bytes | None:
        """Return Prometheus's text format; None if the metrics are exported otherwise."""
        return prometheus_client.generate_latest(self.registry)

    def _new(self, name: str, metric: Metric) -> Any:
        options = {"buckets": metric.buckets} if metric.buckets else {}
        kind = getattr(prometheus_client, metric.kind)
        return kind(name, metric.description, metric.labels, registry=self.registry, **options)

    def _end_of(self, name: ModelName) -> None:
        self._metrics["model_info"].clear()
