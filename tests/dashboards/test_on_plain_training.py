"""The training dashboard's queries, run by a real Prometheus that scrapes a real training.

The training runs in this process without Ray. Prometheus's own client exports the metrics under
Ray's names. `test_on_a_run.py` does the same with a run on a Ray cluster, which takes longer.
"""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import asdict
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from deta.jobs.deta_r50 import demo
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.data.synthetic_shapes import write_shapes
from deta.platform.learning.distributed import Worker
from deta.platform.run.config import override
from deta.platform.run.run import STOP_FILE, Run
from deta.platform.run.run_file import RUN_FILE
from deta.platform.system.atomic_write import write_json
from deta.platform.tracking.prometheus_grafana import TARGETS
from deta.platform.tracking.upload_process import STATE_FILE, UploadState
from deta.platform.training.loop import train
from deta.platform.training.run_metrics import Metric, RunMeter, WorkerMeter
from tests.dashboards.prometheus import answer, queries_of, running_prometheus

WITHIN_S = 200  # usually 10
TINY = {
    "model.backbone.width": "0.25", "model.dim": "32", "model.num_heads": "4",
    "model.ffn_dim": "32", "model.encoder_layers": "1", "model.decoder_layers": "1",
    "model.num_queries": "20", "model.num_classes": "5",
    "data.augmentation.short_edges": "48,64", "data.augmentation.max_long_edge": "96",
    "data.evaluation_size.short_edge": "64", "data.evaluation_size.max_long_edge": "96",
    "data.loader_workers": "0", "total_batch_size": "4", "micro_batch_size": "2",
    "log_every_steps": "2", "evaluate_every_epochs": "2", "num_pictures": "0",
    "schedule.epochs": "100000", "schedule.warmup_epochs": "0", "cluster.num_workers": "1",
}  # fmt: skip


class ToRegistry:
    """`metrics.Export` without Ray, with the names that Ray gives."""

    def __init__(self, run: str) -> None:
        self.run, self.registry = run, CollectorRegistry()
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def __call__(self, metric: Metric, value: float, part: str = "", /) -> None:
        name, keys = f"ray_{metric.name}", ["run", *filter(None, [metric.label])]
        if name not in self._made:
            if metric.kind == "histogram":
                made = Histogram(
                    name, metric.help, keys, buckets=metric.bounds, registry=self.registry
                )
            else:
                kind = Counter if metric.kind == "counter" else Gauge
                made = kind(name, metric.help, keys, registry=self.registry)
            self._made[name] = made
        one = self._made[name].labels(*([self.run, part] if metric.label else [self.run]))
        if isinstance(one, Counter):
            one.inc(value)
        elif isinstance(one, Gauge):
            one.set(value)
        else:
            one.observe(value)


def test_every_query_of_the_training_dashboard_has_an_answer(tmp_path: Path):
    drawn = write_shapes(tmp_path / "shapes", num_train=16, num_val=6, size_px=64)
    folder = tmp_path / "shown"
    folder.mkdir()
    (folder / RUN_FILE).write_text("{}")
    state = UploadState(state="waiting", last_success_s=time.time(), call_s=0.1)
    write_json(folder / STATE_FILE, asdict(state))
    run = Run(
        override(demo(), {**TINY, "name": "shown", "storage": str(tmp_path)}),
        folder,
        CocoDataset.open(drawn.train_images, drawn.train_annotations),
        CocoDataset.open(drawn.val_images, drawn.val_annotations),
    )
    export = ToRegistry("shown")
    worker = Worker(0, 1, torch.device("cpu"))
    meter = WorkerMeter(export, 0, on_gpu=False)
    training = threading.Thread(target=train, args=(run, worker), kwargs={"on_step": meter})
    server, _ = start_http_server(0, "127.0.0.1", export.registry)
    queries = [q for q in queries_of("training", run="shown") if q.needs != "gpu"]
    values: dict[str, list[float]] = {}
    try:
        training.start()
        with running_prometheus(tmp_path / "prometheus") as prometheus:
            targets = [{"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{server.server_port}"]}]
            (tmp_path / "prometheus" / TARGETS / "run.json").write_text(json.dumps(targets))
            run_meter = RunMeter(folder, export)
            deadline_s = time.monotonic() + WITHIN_S
            while time.monotonic() < deadline_s and training.is_alive():
                run_meter.poll()
                values = {
                    f"{q.title} | {q.legend}": [v for _, v in answer(prometheus, q.text)]
                    for q in queries
                }
                if all(found and all(map(math.isfinite, found)) for found in values.values()):
                    break
                time.sleep(1)
    finally:
        (folder / STOP_FILE).touch()
        training.join(60)
        server.shutdown()
    print("\n".join(f"{name} | {found}" for name, found in values.items()))
    assert not [name for name, found in values.items() if not found]
    assert all(math.isfinite(value) for found in values.values() for value in found)
    assert values["Workers | {{run}}"] == [1]
    assert values["Images per second of each worker | {{run}} rank {{rank}}"][0] > 0
    assert 0 < values["Step time | {{run}} median"][0] < 80
    assert 0 <= values["Waiting for data | {{run}} rank {{rank}}"][0] <= 1
