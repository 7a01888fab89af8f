"""Exports the metrics of `training/run_metrics.py` to Prometheus, through Ray.

Ray's agent on every node collects what the node's processes set, and serves it to Prometheus. So no
port is opened here, and a value outlives the process that set it by 20 s at most.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from deta.platform.training.run_metrics import Metric, RunMeter

logger = logging.getLogger(__name__)

POLL_EVERY_S = 5.0  # Ray sends every 10 s


class RayExport:
    """Exports the values of one run; an `Export` of `run_metrics.py`."""

    def __init__(self, run_name: str) -> None:
        self.run_name = run_name
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def __call__(self, metric: Metric, value: float, part: str = "", /) -> None:
        tags = {"run": self.run_name} | ({metric.label: part} if metric.label else {})
        if metric.name not in self._made:
            kinds: Any = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
            bounds = [list(metric.bounds)] if metric.kind == "histogram" else []
            made = kinds[metric.kind](metric.name, metric.help, *bounds, tuple(tags))
            self._made[metric.name] = made
        made = self._made[metric.name]
        if isinstance(made, Counter):
            made.inc(value, tags)
        elif isinstance(made, Gauge):
            made.set(value, tags)
        else:
            made.observe(value, tags)


class RunExport:
    """Exports the state of a run from a thread, while the context is open or this process lives."""

    def __init__(self, folder: Path, run_name: str) -> None:
        self._meter = RunMeter(folder, RayExport(run_name))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def __enter__(self) -> RunExport:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _follow(self) -> None:
        wait_s = 0.0
        while not self._stop.wait(wait_s):
            wait_s = POLL_EVERY_S
            try:
                self._meter.poll()
            except Exception:  # the export must never end a run
                logger.exception("the run's metrics could not be exported; retrying")
