"""Compare throughput and latency of the detection service with the bare model in a loop.

  python benchmarks/serving.py ~/deta-runs/my-run
  python benchmarks/serving.py ~/deta-runs/my-run --ray --clients 1 4 16

First the model alone: this process decodes JPEGs from memory and runs the model on them, one by one
and in batches. Then clients in this process send the same JPEGs to a service in another process on
loopback, each client as soon as it has its last response. Ratios are relative to the model alone,
one by one. Clients and service share the CPUs. So with few CPUs the ratio stays below 1, unless
batches are faster.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import processor
from PIL import Image

from deta.platform.inference.predictor import Predictor
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.model_source import model_source
from deta.platform.serving.upload import decode_image

ROOT = Path(__file__).resolve().parents[1]
START_WITHIN_S = 600
NUM_IMAGES = 16  # different ones


@dataclass(frozen=True)
class Load:
    """The result of a measurement."""

    what: str
    num_images: int
    elapsed_s: float
    latencies_s: Sequence[float]
    failed: int = 0
    batch: float = 1.0  # the mean size

    @property
    def per_second(self) -> float:
        return self.num_images / self.elapsed_s

    def row(self, base: Load) -> str:
        p50, p99 = (1000 * np.percentile(self.latencies_s, q) for q in (50, 99))
        return (
            f"{self.what:<28}{self.per_second:>10.1f}{p50:>10.1f}{p99:>10.1f}{self.batch:>8.1f}"
            f"{self.failed:>8}{self.per_second / base.per_second:>8.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--images", type=Path, help="a folder of JPEGs; default: synthetic, 640 x 480"
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument(
        "--requests", "--pictures", type=int, default=200, help="at most, per measurement"
    )
    parser.add_argument("--seconds", type=float, default=20, help="at most, per measurement")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ray", action="store_true", help="also measure Ray Serve")
    arguments = parser.parse_args()

    contents = _contents(arguments.images)
    limit = arguments.requests, arguments.seconds
    source = model_source(arguments.model, None, arguments.device)
    served = source.open(source.current())
    config = ServingConfig()
    served.warm_up(config.max_batch)
    model = served.predictor
    size = model.config.data.evaluation_size
    print(f"{processor()}, {os.cpu_count()} processors, device {model.device}")
    print(f"load before: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    print(f"{len(contents)} JPEGs of {sum(map(len, contents)) / len(contents) / 1000:.0f} kB, "
          f"model at {size.short_edge} to {size.max_long_edge} pixels\n")  # fmt: skip
    head = f"{'':<28}{'images/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'batch':>8}{'failed':>8}"
    print(f"{head}{'ratio':>8}", flush=True)
    base = bare(model, contents, config, 1, limit)
    print(base.row(base))
    print(bare(model, contents, config, config.max_batch, limit).row(base), flush=True)
    for ray in (False, True) if arguments.ray else (False,):
        with service(arguments.model, arguments.device, ray) as port:
            load(port, contents, 1, (8, arguments.seconds), "")  # warm-up
            for clients in arguments.clients:
                name = f"{'Ray Serve' if ray else 'alone'}, {clients} clients"
                print(load(port, contents, clients, limit, name).row(base), flush=True)
    print(f"\nload after: {', '.join(f'{load:.1f}' for load in os.getloadavg())}")


def bare(
    model: Predictor,
    contents: Sequence[bytes],
    config: ServingConfig,
    batch: int,
    limit: tuple[int, float],
) -> Load:
    """Decode, resize and detect in a loop."""
    latencies_s: list[float] = []
    began_s = time.perf_counter()
    done = 0
    while done < limit[0] and time.perf_counter() - began_s < limit[1]:
        sent_s = time.perf_counter()
        chosen = [contents[(done + i) % len(contents)] for i in range(batch)]
        model.detect([model.prepare(decode_image(content, config)) for content in chosen])
        latencies_s.append(time.perf_counter() - sent_s)
        done += batch
    elapsed_s = time.perf_counter() - began_s
    return Load(f"model alone, batch {batch}", done, elapsed_s, latencies_s, batch=batch)


def load(
    port: int, contents: Sequence[bytes], clients: int, limit: tuple[int, float], what: str
) -> Load:
    """Send requests from several clients, each with one connection and one request at a time."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(limit[0]):
        waiting.put(number)
    latencies_s: list[float] = []
    batches: list[int] = []
    failed = 0
    began_s = time.perf_counter()

    def client() -> None:
        nonlocal failed
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() - began_s < limit[1]:
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                break
            sent_s = time.perf_counter()
            connection.request(
                "POST", "/v1/detect", contents[number % len(contents)],
                {"Content-Type": "image/jpeg"},
            )  # fmt: skip
            answer = connection.getresponse()
            content = answer.read()
            if answer.status == 200:
                latencies_s.append(time.perf_counter() - sent_s)
                batches.append(json.loads(content)["batch_size"])
            else:
                failed += 1
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed_s = time.perf_counter() - began_s
    # One value per image, so a batch counts as often as it has images; the harmonic mean corrects.
    batch = statistics.harmonic_mean(batches) if batches else 0.0
    return Load(what, len(latencies_s), elapsed_s, latencies_s or [0.0], failed, batch)


@contextmanager
def service(model: str, device: str, ray: bool) -> Iterator[int]:
    """Run jobs/serve.py in another process, and yield its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "jobs/serve.py", model, "--port", str(port), "--device", device]
    command += [] if ray else ["--without-ray"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        began_s = time.monotonic()
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() - began_s > START_WITHIN_S:
                raise RuntimeError("the service did not start; see its messages above")
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_WITHIN_S)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _contents(folder: Path | None) -> list[bytes]:
    if folder is not None:
        paths = sorted(folder.glob("*.jpg"))[:NUM_IMAGES]
        if not paths:
            raise SystemExit(f"{folder}: contains no *.jpg")
        return [path.read_bytes() for path in paths]
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(NUM_IMAGES):
        blocks = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(blocks).resize((640, 480)).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    return contents


if __name__ == "__main__":
    main()
