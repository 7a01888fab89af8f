"""The numbers that a run shows while it trains: their names, units, and where each comes from.

Knows no Ray and no Prometheus: `ray_metrics.py` carries the values out. There are two sources.
Every worker measures its own steps (`WorkerMeter`). All else is in the run's folder: the journal
says how the run stands, over all restarts, and the uploader's record says how far MLflow is behind
(`RunMeter`, outside of the training, in the Ray driver).

In Prometheus a name begins with `ray_`, as all do that leave through Ray, and a counter ends with
`_total`. MLflow keeps the history of a run; these are for looking at what happens now.
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

from deta.platform.run.journal import FILE_NAME, read_events
from deta.platform.run.run_file import RUN_FILE
from deta.platform.tracking.upload_plan import Record, is_number, read_record
from deta.platform.tracking.upload_process import read_upload_state

Kind = Literal["counter", "gauge", "histogram"]
# Seconds of an update, from a tiny model on a GPU to a large batch on a busy CPU.
STEP_BOUNDS_S = (
    *(0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7),
    *(1.0, 1.5, 2.5, 4.0, 7.0, 12.0, 20.0, 40.0, 80.0),
)
MEMORY_EVERY_S = 5.0
# The total, and the parts of the last layer and of the first stage; other layers are in MLflow.
SHOWN_LOSS = re.compile(r"train/(loss|(class|l1|giou)(_encoder)?)")


@dataclass(frozen=True)
class Metric:
    """A name that Prometheus sees; all have the label `run`."""

    name: str
    kind: Kind
    help: str  # with its unit
    label: str = ""  # one more: the rank of a worker, or which part the value is of
    bounds: tuple[float, ...] = ()  # of a histogram, upper ones


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
    "deta_gpu_memory_peak_bytes", "gauge", "The most bytes they held at once so far", "rank"
)

STEPS_DONE = Metric("deta_steps_done", "gauge", "Updates of the weights so far")
STEPS_IN_ALL = Metric("deta_steps_in_all", "gauge", "Updates of the whole schedule")
WORKERS = Metric("deta_workers", "gauge", "Workers that train together")
EPOCH = Metric("deta_epoch", "gauge", "Passes over the training images so far")
REMAINING = Metric("deta_remaining_seconds", "gauge", "Seconds of training ahead, as things go")
RATE = Metric(
    "deta_images_per_second", "gauge", "Training images a second over all workers, at the last look"
)
LOSS = Metric("deta_loss", "gauge", "Mean training loss since the look before", "part")
GRAD_NORM = Metric("deta_grad_norm", "gauge", "Norm of the gradient before clipping, mean")
LEARNING_RATE = Metric("deta_learning_rate", "gauge", "Learning rate of the first group of weights")
SKIPPED = Metric("deta_skipped_steps", "gauge", "Updates skipped since a number was not finite")
REPLACED = Metric("deta_replaced_images", "gauge", "Broken pictures that others stand in for")
AP = Metric("deta_ap", "gauge", "AP of the last evaluation, 0 to 100", "kind")
BEST_AP = Metric("deta_best_ap", "gauge", "Highest AP of all evaluations, 0 to 100")
EVALUATION = Metric("deta_evaluation_seconds", "gauge", "Seconds of the last evaluation")
CHECKPOINT = Metric(
    "deta_checkpoint_seconds", "gauge", "Seconds from the last snapshot to its checkpoint on disk"
)
CHECKPOINT_PAUSE = Metric(
    "deta_checkpoint_pause_seconds", "gauge", "Seconds that training stood still for the snapshot"
)
CHECKPOINT_TIME = Metric(
    "deta_checkpoint_time_seconds", "gauge", "When the last checkpoint was whole, since 1970"
)
CHECKPOINT_FAILURES = Metric(
    "deta_checkpoint_failures", "gauge", "Checkpoints that could not be written or copied"
)
STARTS = Metric("deta_starts", "gauge", "Times that workers began to train, the first one included")
ATTEMPTS = Metric("deta_restarts", "gauge", "Times that the whole attempt had to be started again")
REDONE = Metric("deta_redone_steps", "gauge", "Updates lost with a worker and done again")
GOODPUT = Metric(
    "deta_goodput", "gauge", "Share of the time since launch spent in steps that were not lost"
)
EVENT_TIME = Metric("deta_event_time_seconds", "gauge", "When the run last said something")
BACKLOG = Metric("deta_mlflow_backlog_rows", "gauge", "Numbers that MLflow does not have yet")
MLFLOW_TIME = Metric("deta_mlflow_time_seconds", "gauge", "When MLflow last took something")
MLFLOW_CALL = Metric("deta_mlflow_call_seconds", "gauge", "Seconds of the last call to MLflow")
MLFLOW_FAILING = Metric("deta_mlflow_failing", "gauge", "1 while MLflow does not answer, else 0")

METRICS = tuple(value for value in globals().values() if isinstance(value, Metric))


class Export(Protocol):
    """Where values go, with the label `run` on them."""

    def __call__(self, metric: Metric, value: float, part: str = "", /) -> None:
        """Add to a counter (only what is above 0), set a gauge, or put into a histogram.

        Args:
            part: value of the metric's own label, where it has one.
        """
        ...


@dataclass(frozen=True)
class StepTimes:
    """What a worker measured of one step."""

    num_images: int  # of this worker
    data_wait_s: float
    update_s: float


class WorkerMeter:
    """What one worker shows of its steps; costs a training step a few microseconds."""

    def __init__(self, export: Export, rank: int, *, on_gpu: bool) -> None:
        self.export, self.rank, self.on_gpu = export, str(rank), on_gpu
        self._looked_s = -math.inf

    def __call__(self, step: StepTimes) -> None:
        self.export(IMAGES, step.num_images, self.rank)
        self.export(STEP, step.update_s, self.rank)
        if step.data_wait_s > 0:
            self.export(DATA_WAIT, step.data_wait_s, self.rank)
        now_s = time.monotonic()
        if self.on_gpu and now_s - self._looked_s > MEMORY_EVERY_S:
            self._looked_s = now_s
            self._look_at_memory()

    def _look_at_memory(self) -> None:
        import torch  # here: whoever only reads names needs none

        self.export(GPU_MEMORY, torch.cuda.memory_allocated(), self.rank)
        self.export(GPU_MEMORY_PEAK, torch.cuda.max_memory_allocated(), self.rank)


class RunMeter:
    """What a run's folder says of it. `look` reads what is new and shows all of it again."""

    def __init__(self, folder: Path, export: Export) -> None:
        self.folder, self.export = folder, export
        self.numbers = RunNumbers()
        self.backlog = Backlog()
        self._offset_bytes = 0

    def look(self) -> None:
        """Safe at any time, whatever the files hold; they are other processes'."""
        try:
            if (self.folder / FILE_NAME).stat().st_size < self._offset_bytes:  # another file
                self.numbers, self.backlog, self._offset_bytes = RunNumbers(), Backlog(), 0
            for event, offset_bytes in read_events(self.folder, self._offset_bytes):
                self._offset_bytes = offset_bytes
                self.numbers.take(event)
                self.backlog.take(event, offset_bytes)
            launched_s = (self.folder / RUN_FILE).stat().st_mtime  # written by every launch
        except OSError:  # a disk that is away; the next look may find it
            return
        for metric, value, part in self.numbers.values(time.time() - launched_s):
            self.export(metric, value, part)
        self._show_upload()

    def _show_upload(self) -> None:
        state = read_upload_state(self.folder)
        self.export(BACKLOG, self.backlog.num_rows(read_record(self.folder).offset_bytes))
        self.export(MLFLOW_FAILING, float(bool(state.error)))
        if state.last_success_s:
            self.export(MLFLOW_TIME, state.last_success_s)
            self.export(MLFLOW_CALL, state.call_s)


class RunNumbers:
    """How a run stands, by the events of its journal, restarts included."""

    def __init__(self) -> None:
        self._values: dict[tuple[Metric, str], float] = {}
        self._replaced: set[Any] = set()
        self._useful_s: float | None = None  # in steps that were not lost, over all launches
        self._useful_s_before: float | None = None  # of earlier launches

    def values(self, since_launch_s: float) -> Iterator[tuple[Metric, float, str]]:
        """All that is known: metric, value, and the value of its own label."""
        for (metric, part), value in self._values.items():
            yield metric, value, part
        if self._useful_s is not None and since_launch_s > 0:
            useful_s = max(0.0, self._useful_s - (self._useful_s_before or 0.0))
            yield GOODPUT, min(1.0, useful_s / since_launch_s), ""

    def take(self, event: dict[str, Any]) -> None:
        take = getattr(self, f"_take_{event['kind']}", None)
        self._set(EVENT_TIME, event["time_s"])
        if take is not None:
            try:
                take(event)
            except (KeyError, TypeError, ValueError, AttributeError):  # another version wrote it
                return

    def _take_begin(self, event: dict[str, Any]) -> None:
        self._add(STARTS, 1)
        self._add(REDONE, event.get("wasted_steps", 0))
        self._set(STEPS_DONE, event["step"])
        self._set(STEPS_IN_ALL, event["num_steps"])
        self._set(WORKERS, event["world_size"])
        self._note_useful(event)
        if self._useful_s_before is None:
            self._useful_s_before = self._useful_s

    def _take_progress(self, event: dict[str, Any]) -> None:
        self._set(STEPS_DONE, event["step"])
        self._set(REMAINING, event["remaining_s"])
        self._note_useful(event)
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

    def _take_skipped(self, event: dict[str, Any]) -> None:
        self._set(SKIPPED, event["total"])

    def _take_replaced(self, event: dict[str, Any]) -> None:
        self._replaced |= {image["image_id"] for image in event["images"]}
        self._set(REPLACED, len(self._replaced))

    def _take_evaluation(self, event: dict[str, Any]) -> None:
        self._note_useful(event)
        for name, value in event["metrics"].items():
            kind = name.removeprefix("val/")
            if name.startswith("val/A"):
                self._set(AP, value, kind)
        self._set(EVALUATION, event["metrics"].get("val/seconds"))
        ap = event["metrics"].get("val/AP")
        if is_number(ap):
            self._set(BEST_AP, max(ap, self._values.get((BEST_AP, ""), 0.0)))

    def _take_checkpoint(self, event: dict[str, Any]) -> None:
        self._set(CHECKPOINT_TIME, event["time_s"])
        self._set(CHECKPOINT, event.get("seconds"))
        self._set(CHECKPOINT_PAUSE, event.get("blocked_s"))
        self._add(CHECKPOINT_FAILURES, 0)

    def _take_checkpoint_failed(self, event: dict[str, Any]) -> None:
        self._add(CHECKPOINT_FAILURES, 1)

    def _take_restart(self, event: dict[str, Any]) -> None:
        self._add(ATTEMPTS, 1)

    def _take_starting(self, event: dict[str, Any]) -> None:
        self._add(ATTEMPTS, 0)

    def _take_ended(self, event: dict[str, Any]) -> None:
        self._useful_s_before = None  # the next launch begins to count anew

    def _note_useful(self, event: dict[str, Any]) -> None:
        if is_number(event.get("useful_s")):
            self._useful_s = event["useful_s"]

    def _set(self, metric: Metric, value: Any, part: str = "") -> None:
        if is_number(value):
            self._values[metric, part] = float(value)

    def _add(self, metric: Metric, value: float) -> None:
        self._set(metric, self._values.get((metric, ""), 0.0) + value)


class Backlog:
    """How many numbers of a journal lie behind what MLflow has."""

    def __init__(self) -> None:
        self._record = Record()  # as it would be if all were sent: it knows what counts
        self._waiting: deque[tuple[int, int]] = deque()  # offset behind an event, its rows
        self._num_rows = 0

    def take(self, event: dict[str, Any], offset_bytes: int) -> None:
        num_rows = len(self._record.take(event, offset_bytes))
        if num_rows:
            self._waiting.append((offset_bytes, num_rows))
            self._num_rows += num_rows

    def num_rows(self, sent_bytes: int) -> int:
        """Of the events taken, where MLflow has what lies before this offset."""
        while self._waiting and self._waiting[0][0] <= sent_bytes:
            self._num_rows -= self._waiting.popleft()[1]
        return self._num_rows
