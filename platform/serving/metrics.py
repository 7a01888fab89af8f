"""The metrics of a detection service, for Prometheus.

    deta_serving_requests_total{outcome}          "ok", or the kind of the refusal
    deta_serving_request_seconds                  of "ok" requests, from first byte to response
    deta_serving_phase_seconds{phase}             read, decode, wait, model
    deta_serving_batch_size                       images per batch
    deta_serving_detections                       per image, after the limits of the request
    deta_serving_in_flight                        current requests
    deta_serving_model_info{name,version,sha256}  1 for the current model
    deta_serving_model_changes_total{outcome}     "ok", or "failed": the old model stayed

A process without Ray exports them at /metrics. Under Ray Serve, Ray exports them and puts `ray_`
before each name; see ray_serve.py.
"""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deta.platform.serving.model import ModelName

# Upper bounds, in seconds: from an idle GPU with one small image to a busy CPU.
SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 30.0)
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
DETECTIONS = (0.5, 1, 2, 5, 10, 20, 50, 100, 300)  # the first counts images without any

DESCRIPTIONS = {
    "deta_serving_requests_total": "Detection requests, by outcome",
    "deta_serving_request_seconds": "Seconds from a request's first byte to its detections",
    "deta_serving_phase_seconds": "Seconds of a request in one phase",
    "deta_serving_batch_size": "Images per batch",
    "deta_serving_detections": "Detections returned per image",
    "deta_serving_in_flight": "Requests in progress",
    "deta_serving_model_info": "The current model",
    "deta_serving_model_changes_total": "Model changes while serving",
}


class Measurements(Protocol):
    """A recorder of a service's metrics. It runs on the event loop, so no method may block."""

    def request(self, outcome: str, seconds: float) -> None:
        """Record the end of a detection request."""

    def phase(self, name: str, seconds: float) -> None: ...

    def batch(self, size: int, model_s: float) -> None: ...

    def detections(self, number: int) -> None:
        """Record the number of detections returned for one image."""

    def in_flight(self, number: int) -> None: ...

    def model(self, name: ModelName) -> None:
        """Record that this model is the current one from now on."""

    def change_failed(self) -> None:
        """Record that another model could not be loaded."""

    def text(self) -> bytes | None:
        """Return Prometheus's text format; None if the metrics are exported otherwise."""


class ProcessMeasurements:
    """Metrics of this process, in a registry of their own, so that tests can have several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def described(name: str) -> tuple[str, str]:
            return name, DESCRIPTIONS[name]

        registry = self.registry
        self._requests = Counter(
            *described("deta_serving_requests_total"), ["outcome"], registry=registry
        )
        self._seconds = Histogram(
            *described("deta_serving_request_seconds"), registry=registry, buckets=SECONDS
        )
        self._phases = Histogram(
            *described("deta_serving_phase_seconds"), ["phase"], registry=registry, buckets=SECONDS
        )
        self._batches = Histogram(
            *described("deta_serving_batch_size"), registry=registry, buckets=BATCH_SIZES
        )
        self._detections = Histogram(
            *described("deta_serving_detections"), registry=registry, buckets=DETECTIONS
        )
        self._in_flight = Gauge(*described("deta_serving_in_flight"), registry=registry)
        labels = ["name", "version", "sha256"]
        self._model = Gauge(*described("deta_serving_model_info"), labels, registry=registry)
        self._changes = Counter(
            *described("deta_serving_model_changes_total"), ["outcome"], registry=registry
        )
        self._has_model = False

    def request(self, outcome: str, seconds: float) -> None:
        self._requests.labels(outcome).inc()
        if outcome == "ok":  # refusals are fast and would hide the latency of a busy service
            self._seconds.observe(seconds)

    def phase(self, name: str, seconds: float) -> None:
        self._phases.labels(name).observe(seconds)

    def batch(self, size: int, model_s: float) -> None:
        self._batches.observe(size)

    def detections(self, number: int) -> None:
        self._detections.observe(number)

    def in_flight(self, number: int) -> None:
        self._in_flight.set(number)

    def model(self, name: ModelName) -> None:
        if self._has_model:
            self._changes.labels("ok").inc()
        self._has_model = True
        self._model.clear()
        self._model.labels(name.name, name.version, name.weights_sha256).set(1)

    def change_failed(self) -> None:
        self._changes.labels("failed").inc()

    def text(self) -> bytes | None:
        return generate_latest(self.registry)
