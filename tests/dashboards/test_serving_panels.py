"""The serving dashboard's queries, run by a real Prometheus that scrapes a service's metrics.

The metrics are those of a process without Ray. With Ray, the names begin with `ray_`, which the
queries match too. `Replicas` is Ray Serve's own metric, and stays empty here.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model import ModelName
from deta.platform.tracking.prometheus_grafana import TARGETS
from tests.dashboards.prometheus import answer, queries_of, running_prometheus

WITHIN_S = 120


class Answers(BaseHTTPRequestHandler):
    """A service that records one more request of each kind at each scrape."""

    measured = Measurements()

    def do_GET(self) -> None:
        to = self.measured
        for outcome, seconds in (("ok", 0.03), ("ok", 0.2), ("too_large", 0.001)):
            to.request(outcome, seconds)
        for phase in ("read", "decode", "wait", "model"):
            to.record("phase_seconds", 0.01, phase=phase)
        to.record("batch_size", 2)
        to.record("detections", 7)
        to.record("in_flight", 3)
        body = to.text() or b""
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Answers.measured.model(ModelName("deta", "3", "ab" * 32))
    Answers.measured.model(ModelName("deta", "4", "cd" * 32))
    Answers.measured.record("model_changes_total", outcome="failed")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_every_query_of_the_serving_dashboard_has_an_answer(service: str, tmp_path: Path):
    with running_prometheus(tmp_path) as prometheus:
        targets = [{"labels": {"job": "deta"}, "targets": [service]}]
        (tmp_path / TARGETS / "service.json").write_text(json.dumps(targets))
        queries = [q for q in queries_of("serving") if "ray_serve_" not in q.text]
        values: dict[tuple[str, str], list[float]] = {}
        deadline_s = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline_s:
            values = {
                (q.title, q.legend): [v for _, v in answer(prometheus, q.text)] for q in queries
            }
            # Rates need two scrapes.
            if all(found and all(map(math.isfinite, found)) for found in values.values()):
                break
            time.sleep(1)
        for key, found in values.items():
            print(key, found)
            assert found, key
            assert all(map(math.isfinite, found)), key
    assert values["Batch size", "images"] == [pytest.approx(2)]  # two requests for one batch
    assert 5 <= values["Detections", "detections"][0] <= 10  # the bounds around 7
    assert values["Requests in progress", "requests"] == [3]
    assert values["Model", "{{name}} {{version}}"] == [1]
    assert sorted(values["Model changes", "{{outcome}}"]) == [1, 1]
    assert 0 < values["Latency", "median"][0] <= 0.25  # of 0.001, 0.03 and 0.2, in buckets
