"""What a detection service counts, for Prometheus.

    deta_serving_requests_total{outcome}          "ok", or the kind of the refusal
    deta_serving_request_seconds                  of those that were ok, from first byte to answer
    deta_serving_phase_seconds{phase}             read, decode, wait, model
    deta_serving_batch_size                       pictures that the model saw at once
    deta_serving_detections                       in one picture, after the request's own limits
    deta_serving_in_flight                        requests now
    deta_serving_model_info{name,version,sha256}  1 for the model that answers now
    deta_serving_model_changes_total{outcome}     "ok", or "failed" and the old one stayed

A process that serves alone shows them at /metrics. Under Ray Serve they leave through Ray, which
puts `ray_` before each name; see serve.py.
"""

from __future__ import annotations

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deta.platform.serving.model import ModelName

# Upper bounds, in seconds: from a GPU that is alone with one small picture to a busy CPU.
SECONDS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 30.0)
BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
DETECTIONS = (0.5, 1, 2, 5, 10, 20, 50, 100, 300)  # the first holds pictures with none

DESCRIPTIONS = {
    "deta_serving_requests_total": "Detection requests, by what became of them",
    "deta_serving_request_seconds": "Seconds from a request's first byte to its detections",
    "deta_serving_phase_seconds": "Seconds of a request in one phase",
    "deta_serving_batch_size": "Pictures that the model saw at once",
    "deta_serving_detections": "Detections given for one picture",
    "deta_serving_in_flight": "Requests that are being answered",
    "deta_serving_model_info": "The model that answers now",
    "deta_serving_model_changes_total": "Changes of the model while serving",
}


class Measurements(Protocol):
    """Where a service's numbers go. Called on the event loop, so nothing may wait here."""

    def request(self, outcome: str, seconds: float) -> None:
        """A request for detections came to its end."""

    def phase(self, name: str, seconds: float) -> None: ...

    def batch(self, size: int, model_s: float) -> None: ...

    def detections(self, number: int) -> None:
        """So many were given for one picture."""

    def in_flight(self, number: int) -> None: ...

    def model(self, name: ModelName) -> None:
        """This model answers from now on."""

    def change_failed(self) -> None:
        """Another model was wanted and could not be had."""

    def text(self) -> bytes | None:
        """For Prometheus to read; none where the numbers leave another way."""


class ProcessMeasurements:
    """Numbers of this process, in a registry of their own, so that tests can have several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def of(name: str) -> tuple[str, str]:
            return name, DESCRIPTIONS[name]

        to = self.registry
        self._requests = Counter(*of("deta_serving_requests_total"), ["outcome"], registry=to)
        self._seconds = Histogram(*of("deta_serving_request_seconds"), registry=to, buckets=SECONDS)
        self._phases = Histogram(
            *of("deta_serving_phase_seconds"), ["phase"], registry=to, buckets=SECONDS
        )
        self._batches = Histogram(*of("deta_serving_batch_size"), registry=to, buckets=BATCH_SIZES)
        self._detections = Histogram(
            *of("deta_serving_detections"), registry=to, buckets=DETECTIONS
        )
        self._in_flight = Gauge(*of("deta_serving_in_flight"), registry=to)
        labels = ["name", "version", "sha256"]
        self._model = Gauge(*of("deta_serving_model_info"), labels, registry=to)
        self._changes = Counter(*of("deta_serving_model_changes_total"), ["outcome"], registry=to)
        self._has_model = False

    def request(self, outcome: str, seconds: float) -> None:
        self._requests.labels(outcome).inc()
        if outcome == "ok":  # refusals are quick, and would make a busy service look so
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
