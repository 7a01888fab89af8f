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
from collections import deque
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

STEPS_DONE = Metric("deta_steps_done", "gauge", "Updates of the weights so far")
STEPS_IN_ALL = Metric("deta_steps_in_all", "gauge", "Updates of the complete schedule")
WORKERS = Metric("deta_workers", "gauge", "Workers that train together")
EPOCH = Metric("deta_epoch", "gauge", "Passes over the training images so far")
REMAINING = Metric("deta_remaining_seconds", "gauge", "Estimated seconds until the training ends")
RATE = Metric(
    "deta_images_per_second", "gauge", "Training images per second over all workers, last value"
)
LOSS = Metric("deta_loss", "gauge", "Mean training loss since the previous value", "part")
GRAD_NORM = Metric("deta_grad_norm", "gauge", "Norm of the gradient before clipping, mean")
LEARNING_RATE = Metric("deta_learning_rate", "gauge", "Learning rate of the first group of weights")
SKIPPED = Metric("deta_skipped_steps", "gauge", "Updates skipped because a value was not finite")
REPLACED = Metric("deta_replaced_images", "gauge", "Broken images that were replaced by others")
AP = Metric("deta_ap", "gauge", "AP of the last evaluation, 0 to 100", "kind")
BEST_AP = Metric("deta_best_ap", "gauge", "Highest AP of all evaluations, 0 to 100")
EVALUATION = Metric("deta_evaluation_seconds", "gauge", "Seconds of the last evaluation")
CHECKPOINT = Metric(
    "deta_checkpoint_seconds", "gauge", "Seconds from the last snapshot to its checkpoint on disk"
)
CHECKPOINT_PAUSE = Metric(
    "deta_checkpoint_pause_seconds", "gauge", "Seconds that training paused for the last snapshot"
)
CHECKPOINT_TIME = Metric(
    "deta_checkpoint_time_seconds", "gauge", "Unix time when the last checkpoint was complete"
)
CHECKPOINT_FAILURES = Metric(
    "deta_checkpoint_failures", "gauge", "Checkpoints that could not be written or copied"
)
STARTS = Metric("deta_starts", "gauge", "Number of worker starts, the first one included")
ATTEMPTS = Metric("deta_restarts", "gauge", "Number of times that a new attempt was started")
REDONE = Metric("deta_redone_steps", "gauge", "Updates lost in a failure and repeated")
GOODPUT = Metric(
    "deta_goodput", "gauge", "Share of the time since launch spent in steps that were not lost"
)
EVENT_TIME = Metric("deta_event_time_seconds", "gauge", "Unix time of the run's last event")
BACKLOG = Metric("deta_mlflow_backlog_rows", "gauge", "Metric values not yet sent to MLflow")
MLFLOW_TIME = Metric("deta_mlflow_time_seconds", "gauge", "Unix time of the last upload to MLflow")
MLFLOW_CALL = Metric("deta_mlflow_call_seconds", "gauge", "Seconds of the last call to MLflow")
MLFLOW_FAILING = Metric("deta_mlflow_failing", "gauge", "1 while MLflow does not answer, else 0")

METRICS = tuple(value for value in globals().values() if isinstance(value, Metric))


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
            self._export_memory()

    def _export_memory(self) -> None:
        import torch  # here, so that reading the names of metrics does not import it

        self.export(GPU_MEMORY, torch.cuda.memory_allocated(), self.rank)
        self.export(GPU_MEMORY_PEAK, torch.cuda.max_memory_allocated(), self.rank)


class RunMeter:
    """Exports the state of a run, read from its folder."""

    def __init__(self, folder: Path, export: Export) -> None:
        self.folder, self.export = folder, export
        self.status = RunStatus()
        self.backlog = Backlog()
        self._offset_bytes = 0

    def poll(self) -> None:
        """Read new events and export all values again.

        It may be called at any time, whatever the files contain; other processes write them.
        """
        try:
            if (self.folder / JOURNAL_FILE).stat().st_size < self._offset_bytes:  # another file
                self.status, self.backlog, self._offset_bytes = RunStatus(), Backlog(), 0
            for event, offset_bytes in read_events(self.folder, self._offset_bytes):
                self._offset_bytes = offset_bytes
                self.status.add(event)
                self.backlog.add(event, offset_bytes)
            launched_s = (self.folder / RUN_FILE).stat().st_mtime  # written by every launch
        except OSError:  # the disk is unreachable; the next poll may succeed
            return
        for metric, value, part in self.status.values(time.time() - launched_s):
            self.export(metric, value, part)
        self._export_upload()

    def _export_upload(self) -> None:
        state = read_upload_state(self.folder)
        self.export(BACKLOG, self.backlog.num_rows(read_record(self.folder).offset_bytes))
        self.export(MLFLOW_FAILING, float(bool(state.error)))
        if state.last_success_s:
            self.export(MLFLOW_TIME, state.last_success_s)
            self.export(MLFLOW_CALL, state.call_s)


class RunStatus:
    """The state of a run, computed from its journal over all restarts."""

    def __init__(self) -> None:
        self._values: dict[tuple[Metric, str], float] = {}
        self._replaced: set[Any] = set()
        self._useful_s: float | None = None  # in steps that were not lost, over all launches
        self._useful_s_before: float | None = None  # of earlier launches

    def values(self, since_launch_s: float) -> Iterator[tuple[Metric, float, str]]:
        """Yield metric, value and the value of the metric's own label, for all that is known."""
        for (metric, part), value in self._values.items():
            yield metric, value, part
        if self._useful_s is not None and since_launch_s > 0:
            useful_s = max(0.0, self._useful_s - (self._useful_s_before or 0.0))
            yield GOODPUT, min(1.0, useful_s / since_launch_s), ""

    def add(self, event: dict[str, Any]) -> None:
        """Update the values with the next event of the journal."""
        on_event = getattr(self, f"_on_{event['kind']}", None)
        self._set(EVENT_TIME, event["time_s"])
        if on_event is not None:
            try:
                on_event(event)
            except (KeyError, TypeError, ValueError, AttributeError):  # another version wrote it
                return

    def _on_begin(self, event: dict[str, Any]) -> None:
        self._add(STARTS, 1)
        self._add(REDONE, event.get("wasted_steps", 0))
        self._set(STEPS_DONE, event["step"])
        self._set(STEPS_IN_ALL, event["num_steps"])
        self._set(WORKERS, event["world_size"])
        self._update_useful(event)
        if self._useful_s_before is None:
            self._useful_s_before = self._useful_s

    def _on_progress(self, event: dict[str, Any]) -> None:
        self._set(STEPS_DONE, event["step"])
        self._set(REMAINING, event["remaining_s"])
        self._update_useful(event)
        metrics = event["metrics"]
        for name, metric in {
            "train/epoch": EPOCH,
            "train/images_per_s": RATE,
            "train/grad_norm": GRAD_NORM,
            "train/lr": LEARNING_RATE,
            "train/skipped_steps": SKIPPED,
            "train/broken_images": REPLACED,
        }.items():
            self._set(metric, metrics.get(name))
        for name, value in metrics.items():
            if SHOWN_LOSS.fullmatch(name):
                self._set(LOSS, value, name.removeprefix("train/"))

    def _on_skipped(self, event: dict[str, Any]) -> None:
        self._set(SKIPPED, event["total"])

    def _on_replaced(self, event: dict[str, Any]) -> None:
        self._replaced |= {image["image_id"] for image in event["images"]}
        self._set(REPLACED, len(self._replaced))

    def _on_evaluation(self, event: dict[str, Any]) -> None:
        self._update_useful(event)
        for name, value in event["metrics"].items():
            kind = name.removeprefix("val/")
            if name.startswith("val/A"):
                self._set(AP, value, kind)
        self._set(EVALUATION, event["metrics"].get("val/seconds"))
        ap = event["metrics"].get("val/AP")
        if is_number(ap):
            self._set(BEST_AP, max(ap, self._values.get((BEST_AP, ""), 0.0)))

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        self._set(CHECKPOINT_TIME, event["time_s"])
        self._set(CHECKPOINT, event.get("seconds"))
        self._set(CHECKPOINT_PAUSE, event.get("blocked_s"))
        self._add(CHECKPOINT_FAILURES, 0)

    def _on_checkpoint_failed(self, event: dict[str, Any]) -> None:
        self._add(CHECKPOINT_FAILURES, 1)

    def _on_restart(self, event: dict[str, Any]) -> None:
        self._add(ATTEMPTS, 1)

    def _on_starting(self, event: dict[str, Any]) -> None:
        self._add(ATTEMPTS, 0)

    def _on_ended(self, event: dict[str, Any]) -> None:
        self._useful_s_before = None  # the next launch counts from zero

    def _update_useful(self, event: dict[str, Any]) -> None:
        if is_number(event.get("useful_s")):
            self._useful_s = event["useful_s"]

    def _set(self, metric: Metric, value: Any, part: str = "") -> None:
        if is_number(value):
            self._values[metric, part] = float(value)

    def _add(self, metric: Metric, value: float) -> None:
        self._set(metric, self._values.get((metric, ""), 0.0) + value)


class Backlog:
    """Counts the metric values of a journal that MLflow does not have yet."""

    def __init__(self) -> None:
        self._record = UploadRecord()  # as if all were sent; it knows which values count
        self._waiting: deque[tuple[int, int]] = deque()  # offset after an event, its rows
        self._num_rows = 0

    def add(self, event: dict[str, Any], offset_bytes: int) -> None:
        num_rows = len(self._record.add(event, offset_bytes))
        if num_rows:
            self._waiting.append((offset_bytes, num_rows))
            self._num_rows += num_rows

    def num_rows(self, sent_bytes: int) -> int:
        """Return the rows after this offset, up to which MLflow has the journal."""
        while self._waiting and self._waiting[0][0] <= sent_bytes:
            self._num_rows -= self._waiting.popleft()[1]
        return self._num_rows
