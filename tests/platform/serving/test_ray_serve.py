"""The service on Ray Serve, on a cluster that the command starts and stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.platform.serving.serving_case import encoded, random_image, tiny_checkpoint, wait_until

pytest.importorskip("ray.serve", exc_type=ImportError)
pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[3]
WITHIN_S = 400  # it takes 25; minutes on a busy machine


@dataclass(frozen=True)
class Running:
    process: subprocess.Popen[str]
    port: int
    lines: list[str]

    def request(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body, {"Content-Type": "image/jpeg"}
        )
        try:
            with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    checkpoint = tiny_checkpoint(tmp_path_factory.mktemp("serve") / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "jobs/serve.py", str(checkpoint), "--port", str(port)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    assert process.stdout is not None
    threading.Thread(target=lines.extend, args=[process.stdout], daemon=True).start()
    try:
        wait_until(
            lambda: any("images: POST" in line for line in lines) or process.poll(), WITHIN_S
        )
        assert process.poll() is None, "".join(lines)
        yield Running(process, port, lines)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 128 + signal.SIGTERM, "".join(lines)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 5).close()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_images_are_processed_and_refused_as_without_ray(service: Running):
    status, content = service.request("/v1/detect?min_score=0", encoded(random_image()))
    assert status == 200
    assert len(json.loads(content)["detections"]) > 1
    status, content = service.request("/v1/detect", encoded(random_image())[:200])
    assert (status, json.loads(content)["error"]) == (422, "undecodable")
    assert service.request("/ready")[0] == 200
    assert service.request("/health")[0] == 200
    assert service.request("/")[0] == 200
    assert json.loads(service.request("/openapi.json")[1])["paths"]["/v1/detect"]


def test_only_this_machine_can_reach_it(service: Running):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; selects the address of this machine
            outward = probe.getsockname()[0]
        except OSError:
            pytest.skip("this machine has no other address")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((outward, service.port), 5).close()


def test_rays_exporter_has_the_metrics(service: Running):
    service.request("/v1/detect", encoded(random_image()))
    address = next(line.split()[1] for line in service.lines if line.startswith("metrics: "))
    wanted = "ray_deta_serving_requests_total"
    began_s, text = time.monotonic(), ""
    while wanted not in text and time.monotonic() - began_s < 90:  # Ray exports about every 10 s
        with urllib.request.urlopen(address, timeout=30) as answer:
            text = answer.read().decode()
        time.sleep(1)
    for name in ("requests_total", "request_seconds_bucket", "phase_seconds_bucket",
                 "batch_size_bucket", "detections_bucket", "in_flight", "model_info"):  # fmt: skip
        assert f"ray_deta_serving_{name}" in text, name
    assert service.request("/metrics")[0] == 404
