"""The live metrics of a run: their names, units and sources.

This file imports neither Ray nor Prometheus: `cluster/metrics_export.py` exports the values. There
are two sources. Every worker measures its own steps (`WorkerMeter`). The rest comes from the run's
folder, read by the Ray driver (`RunMeter`): the journal has the state of the run over all restarts,
and the uploader's record shows how far MLflow is behind.

In Prometheus, Ray puts `ray_` before each name and `_total` after that of a counter. MLflow has the
history of a run; these metrics show its present state.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from deta.platform.run.journal import JOURNAL_FILE, read_events
from deta.platform.run.run_file import RUN_FILE
from deta.platform.tracking.upload_plan import UploadRecord, is_number, read_record
from deta.platform.tracking.upload_process import read_upload_state

Kind = Literal["counter", "gauge", "histogram"]
# Seconds of an update, from a tiny model on a GPU to a large batch on a busy CPU.
STEP_BOUNDS_S = (
    *(0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7),
    *(1.0, 1.5, 2.5, 4.0, 7.0, 12.0, 20.0, 40.0, 80.0),
)
MEMORY_EVERY_S = 5.0
# The total loss, and its parts for the last layer and the first stage; other layers are in MLflow.
SHOWN_LOSS = re.compile(r"train/(loss|(class|l1|giou)(_encoder)?)")


@dataclass(frozen=True)
class Metric:
    """A metric in Prometheus; all metrics have the label `run`."""

    name: str
    kind: Kind
    help: str  # with its unit
    label: str = ""  # a second label: the rank of a worker, or the part that the value belongs to
    bounds: tuple[float, ...] = ()  # upper bounds of a histogram's buckets


IMAGES = Metric("deta_images", "counter", "Training images of this worker", "rank")
DATA_WAIT = Metric(
    "deta_data_wait_seconds", "counter", "Seconds that this worker has waited for data", "rank"
)
STEP = Metric(
    "deta_step_seconds", "histogram",
    "Seconds of an update on this worker, from its data to its new weights", "rank",
    STEP_BOUNDS_S,
)  # fmt: skip
GPU_MEMORY = Metric(
    "deta_gpu_memory_bytes", "gauge", "Bytes that tensors of this worker hold on its GPU", "rank"
)
GPU_MEMORY_PEAK = Metric(
    "deta_gpu_memory_peak_bytes", "gauge", "Highest deta_gpu_memory_bytes so far", "rank"
)
# Of the run, all gauges: name without "deta_", help, second label.
_OF_RUN = (
    ("steps_done", "Updates of the weights so far"),
    ("steps_in_all", "Updates of the complete schedule"),
    ("workers", "Workers that train together"),
    ("epoch", "Passes over the training images so far"),
    ("remaining_seconds", "Estimated seconds until the training ends"),
    ("images_per_second", "Training images per second over all workers, last value"),
    ("loss", "Mean training loss since the previous value", "part"),
    ("grad_norm", "Norm of the gradient before clipping, mean"),
    ("learning_rate", "Learning rate of the first group of weights"),
    ("skipped_steps", "Updates skipped because a value was not finite"),
    ("replaced_images", "Broken images that were replaced by others"),
    ("ap", "AP of the last evaluation, 0 to 100", "kind"),
    ("best_ap", "Highest AP of all evaluations, 0 to 100"),
    ("evaluation_seconds", "Seconds of the last evaluation"),
    ("checkpoint_seconds", "Seconds from the last snapshot to its checkpoint on disk"),
    ("checkpoint_pause_seconds", "Seconds that training paused for the last snapshot"),
    ("checkpoint_time_seconds", "Unix time when the last checkpoint was complete"),
    ("checkpoint_failures", "Checkpoints that could not be written or copied"),
    ("starts", "Number of worker starts, the first one included"),
    ("restarts", "Number of times that a new attempt was started"),
    ("redone_steps", "Updates lost in a failure and repeated"),
    ("goodput", "Share of the time since launch spent in steps that were not lost"),
    ("event_time_seconds", "Unix time of the run's last event"),
    ("mlflow_backlog_rows", "Metric values not yet sent to MLflow"),
    ("mlflow_time_seconds", "Unix time of the last upload to MLflow"),
    ("mlflow_call_seconds", "Seconds of the last call to MLflow"),
    ("mlflow_failing", "1 while MLflow does not answer, else 0"),
)
OF_RUN = {name: Metric(f"deta_{name}", "gauge", text, "".join(label))
          for name, text, *label in _OF_RUN}  # fmt: skip
METRICS = (IMAGES, DATA_WAIT, STEP, GPU_MEMORY, GPU_MEMORY_PEAK, *OF_RUN.values())

# Which value of which event a gauge of the run shows.
GAUGES: dict[str, dict[str, str]] = {
    "begin": {"step": "steps_done", "num_steps": "steps_in_all", "world_size": "workers"},
    "progress": {"step": "steps_done", "remaining_s": "remaining_seconds"},
    "skipped": {"total": "skipped_steps"},
    "checkpoint": {
        "time_s": "checkpoint_time_seconds",
        "seconds": "checkpoint_seconds",
        "blocked_s": "checkpoint_pause_seconds",
    },
}
# Of the metrics that MLflow gets, too.
GAUGES_OF_METRICS = {
    "train/epoch": "epoch",
    "train/images_per_s": "images_per_second",
    "train/grad_norm": "grad_norm",
    "train/lr": "learning_rate",
    "train/skipped_steps": "skipped_steps",
    "train/broken_images": "replaced_images",
    "val/seconds": "evaluation_seconds",
}
# What an event adds to a gauge; 0 shows the gauge before there is anything to count.
COUNTS = {
    "begin": ("starts", 1),
    "starting": ("restarts", 0),
    "restart": ("restarts", 1),
    "checkpoint": ("checkpoint_failures", 0),
    "checkpoint_failed": ("checkpoint_failures", 1),
}


class Export(Protocol):
    """A function that exports values with the label `run`."""

    def __call__(self, metric: Metric, value: float, part: str = "", /) -> None:
        """Add to a counter (values above 0 only), set a gauge, or observe for a histogram.

        Args:
            part: value of the metric's own label, if it has one.
        """
        ...


@dataclass(frozen=True)
class StepTimes:
    """The times of one step on one worker."""

    num_images: int  # of this worker
    data_wait_s: float
    update_s: float


class WorkerMeter:
    """Exports the step times of one worker; takes a few microseconds per step."""

    def __init__(self, export: Export, rank: int, *, on_gpu: bool) -> None:
        self.export, self.rank, self.on_gpu = export, str(rank), on_gpu
        self._memory_exported_s = -math.inf

    def __call__(self, step: StepTimes) -> None:
        self.export(IMAGES, step.num_images, self.rank)
        self.export(STEP, step.update_s, self.rank)
        if step.data_wait_s > 0:
            self.export(DATA_WAIT, step.data_wait_s, self.rank)
        now_s = time.monotonic()
        if self.on_gpu and now_s - self._memory_exported_s > MEMORY_EVERY_S:
            self._memory_exported_s = now_s
            import torch  # here, so that reading the names of metrics does not import it

            self.export(GPU_MEMORY, torch.cuda.memory_allocated(), self.rank)
            self.export(GPU_MEMORY_PEAK, torch.cuda.max_memory_allocated(), self.rank)


class RunMeter:
    """Exports the state of a run, read from its folder."""

    def __init__(self, folder: Path, export: Export) -> None:
        self.folder, self.export = folder, export
        self._read_from_start()

    def _read_from_start(self) -> None:
        self.status = RunStatus()
        self._offset_bytes = 0
        # As if all were sent; it knows which values of an event MLflow gets.
        self._sent = UploadRecord()
        self._waiting: list[tuple[int, int]] = []  # offset after an event, its values for MLflow

    def poll(self) -> None:
        """Read new events and export all values again.

        It may be called at any time, whatever the files contain; other processes write them.
        """
        try:
            if (self.folder / JOURNAL_FILE).stat().st_size < self._offset_bytes:  # another file
                self._read_from_start()
            for event, offset_bytes in read_events(self.folder, self._offset_bytes):
                self._offset_bytes = offset_bytes
                self.status.add(event)
                self._waiting.append((offset_bytes, len(self._sent.add(event, offset_bytes))))
            launched_s = (self.folder / RUN_FILE).stat().st_mtime  # written by every launch
        except OSError:  # the disk is unreachable; the next poll may succeed
            return
        for metric, value, part in self.status.values(time.time() - launched_s):
            self.export(metric, value, part)
        upload, sent_bytes = read_upload_state(self.folder), read_record(self.folder).offset_bytes
        self._waiting = [(at, rows) for at, rows in self._waiting if at > sent_bytes and rows]
        self.export(OF_RUN["mlflow_backlog_rows"], sum(rows for _, rows in self._waiting))
        self.export(OF_RUN["mlflow_failing"], float(bool(upload.error)))
        if upload.last_success_s:
            self.export(OF_RUN["mlflow_time_seconds"], upload.last_success_s)
            self.export(OF_RUN["mlflow_call_seconds"], upload.call_s)


class RunStatus:
    """The state of a run, computed from its journal over all restarts."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], float] = {}  # by name of the metric, and part
        self._replaced: set[Any] = set()
        self._useful_s: float | None = None  # in steps that were not lost, over all launches
        self._useful_s_before: float | None = None  # of earlier launches

    def values(self, since_launch_s: float) -> Iterator[tuple[Metric, float, str]]:
        """Yield metric, value and the value of the metric's own label, for all that is known."""
        for (name, part), value in self._values.items():
            yield OF_RUN[name], value, part
        if self._useful_s is not None and since_launch_s > 0:
            useful_s = max(0.0, self._useful_s - (self._useful_s_before or 0.0))
            yield OF_RUN["goodput"], min(1.0, useful_s / since_launch_s), ""

    def add(self, event: dict[str, Any]) -> None:
        """Update the values with the next event of the journal."""
        self._set("event_time_seconds", event["time_s"])
        try:
            self._add(event["kind"], event)
        except (KeyError, TypeError, ValueError, AttributeError):  # another version wrote it
            return

    def _add(self, kind: str, event: dict[str, Any]) -> None:
        for key, name in GAUGES.get(kind, {}).items():
            self._set(name, event.get(key))
        if kind in COUNTS:
            name, more = COUNTS[kind]
            self._set(name, self._values.get((name, ""), 0.0) + more)
        if is_number(event.get("useful_s")):
            self._useful_s = event["useful_s"]
        if kind == "begin":
            if self._useful_s_before is None:
                self._useful_s_before = self._useful_s
            redone = self._values.get(("redone_steps", ""), 0.0)
            self._set("redone_steps", redone + event.get("wasted_steps", 0))
        elif kind == "ended":
            self._useful_s_before = None  # the next launch counts from zero
        elif kind == "replaced":
            self._replaced |= {image["image_id"] for image in event["images"]}
            self._set("replaced_images", len(self._replaced))
        elif kind in ("progress", "evaluation"):
            for name, value in event["metrics"].items():
                if name in GAUGES_OF_METRICS:
                    self._set(GAUGES_OF_METRICS[name], value)
                elif SHOWN_LOSS.fullmatch(name):
                    self._set("loss", value, name.removeprefix("train/"))
                elif name.startswith("val/A"):
                    self._set("ap", value, name.removeprefix("val/"))
            if is_number(ap := event["metrics"].get("val/AP")):
                self._set("best_ap", max(ap, self._values.get(("best_ap", ""), 0.0)))

    def _set(self, name: str, value: Any, part: str = "") -> None:
        if is_number(value):
            self._values[name, part] = float(value)
