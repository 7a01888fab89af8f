"""A tiny model in a real server on a free port of loopback, for the tests of the service."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from deta.model.detector import DETA
from deta.platform.checkpoint.local import take_snapshot, write_checkpoint
from deta.platform.data.coco_dataset import Category
from deta.platform.data.image_sizes import EvaluationSize
from deta.platform.inference.predictor import Predictor
from deta.platform.run.config import DataConfig, RunConfig
from deta.platform.run.run_state import RunState
from deta.platform.serving.app import create_app
from deta.platform.serving.config import ServingConfig
from deta.platform.serving.metrics import Measurements
from deta.platform.serving.model import ModelName, ServedModel
from tests.platform.weights.small_detector import SMALL

CATEGORIES = tuple(Category(7 * i + 3, name) for i, name in enumerate(["disc", "<b>star</b>"]))
WITHIN_S = 300  # it takes a second; longer on a busy machine


def tiny_config() -> RunConfig:
    return RunConfig(
        model=replace(SMALL, num_classes=len(CATEGORIES)),
        data=DataConfig(
            loader_workers=0, evaluation_size=EvaluationSize(short_edge=64, max_long_edge=96)
        ),
        micro_batch_size=1,
    )


def tiny_model(seed: int) -> DETA:
    """Return a model of random weights whose outputs differ between queries and classes."""
    torch.manual_seed(seed)
    model = DETA(tiny_config().model)
    with torch.no_grad():
        for head in model.class_heads:
            head.weight.normal_(std=0.5)
            head.bias.zero_()  # scores around 0.5, not 0.01 as at the start of training
        for head in model.box_heads:
            head.mlp[-1].weight.normal_(std=0.5)
    return model


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    state = RunState(step=1, samples_seen=8, epoch=1.0, metrics={"AP": 1.5})
    model_state = tiny_model(seed).state_dict()
    snapshot = take_snapshot(state, tiny_config(), CATEGORIES, model_state, {})
    return write_checkpoint(folder / "checkpoints", snapshot)


@dataclass
class AliasSource:
    """A source with an alias that a test can move, and versions that it can break."""

    moves = True
    folders: dict[str, Path]
    alias: str
    broken: set[str] = field(default_factory=set)
    opened: list[str] = field(default_factory=list)

    def current(self) -> str:
        return self.alias

    def open(self, current: str) -> ServedModel:
        self.opened.append(current)
        if current in self.broken:
            raise ValueError(f"version {current} is damaged")
        predictor = Predictor.from_checkpoint(self.folders[current])
        return ServedModel(predictor, ModelName("source", current, predictor.weights_sha256))


@dataclass
class Server:
    """A server that runs in a thread of this process."""

    app: FastAPI
    port: int
    measurements: Measurements

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers in lower case and body, over a new connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return response.status, named, response.read()
        finally:
            connection.close()

    def detect(
        self, body: bytes, query: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        status, _, content = self.request(
            "POST", f"/v1/detect{query}", body, headers or {"Content-Type": "image/jpeg"}
        )
        return status, json.loads(content)

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.request("GET", "/ready")[0] == 200)

    def metric(self, sample: str, /, **labels: str) -> float:
        """Return the value of a sample; 0 if it is not recorded yet."""
        return self.measurements.registry.get_sample_value(sample, labels) or 0.0


@contextmanager
def running(source: Any, config: ServingConfig, *, ready: bool = True) -> Iterator[Server]:
    measurements = Measurements()
    app = create_app(source, config, measurements)
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=10)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    assert thread.is_alive(), "the server did not start"
    port = server.servers[0].sockets[0].getsockname()[1]
    here = Server(app, port, measurements)
    try:
        if ready:
            here.wait_until_ready()
        yield here
    finally:
        server.should_exit = True
        thread.join(WITHIN_S)


def wait_until(condition: Callable[[], bool], within_s: float = WITHIN_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.02)


def random_image(seed: int = 0, width: int = 80, height: int = 60) -> Image.Image:
    """Return noise in blocks, which survives JPEG and differs by seed."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, ((height + 7) // 8, (width + 7) // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def form(
    content: bytes, field_name: str = "image", boundary: str = "b0undary"
) -> tuple[bytes, str]:
    """Return a form with one file, and its Content-Type."""
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{field_name}"; '
        'filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"
