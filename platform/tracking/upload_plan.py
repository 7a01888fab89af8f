"""Computes which rows and files of a run's journal MLflow still needs. No network, no MLflow.

The rows to send follow from the journal and the upload record alone. If the uploader dies after
sending but before it saves the record, the next one sends the same rows with the same times again.
MLflow stores equal rows once, so nothing is duplicated.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from deta.platform.run.journal import read_events
from deta.platform.run.run_file import RUN_FILE, tracking_uri
from deta.platform.system.artifact_names import artifact_fault
from deta.platform.system.atomic_write import write_json
from deta.platform.system.redaction import REDACTED, redact

NUM_LEVELS = 3  # of folders between a sweep and its runs


logger = logging.getLogger(__name__)

RECORD_FILE = "mlflow.json"
REPLACED_FILE = "replaced_images.jsonl"
TEXTS = ("environment", "categories")  # parts of run.json that become files in MLflow
REPORT_FILE, REPORT_TAG = "report.html", "deta.report"  # the tag: its path in MLflow
ROWS_PER_CALL = 1000  # limit of MLflow's REST interface
ENDS = ("FINISHED", "FAILED", "KILLED")
MAX_NAME_CHARACTERS = 250
# Files of the best step by their folder in the run, and where they are in MLflow.
BEST_FILES = {
    "checkpoints": ("best_checkpoint", ("model.safetensors", "config.json", "state.json")),
    "evaluations": ("evaluation", ("evaluation.json", "detections.parquet", "ground_truth.json.gz",
                                   "explanation.json", "report.html")),
}  # fmt: skip
# Metrics that are a value of an event, by the event's kind.
COPIED = {
    "evaluation_kept": {"val/keep_seconds": "seconds"},
    "interval": {
        "best/AP_low": "low",
        "best/AP_high": "high",
        "best/AP_corrected": "corrected",
    },
    "skipped": {"train/skipped_steps": "total"},
    "checkpoint": {"checkpoint/blocked_s": "blocked_s", "checkpoint/seconds": "seconds"},
}


@dataclass(frozen=True)
class UploadRow:
    """One value of a metric at a step, as MLflow stores it."""

    name: str
    value: float
    time_ms: int
    step: int
    kind: str  # of event


@dataclass
class UploadRecord:
    """The rows and files that MLflow has already, cached in mlflow.json; see above."""

    uri: str = ""  # without its password
    run_id: str = ""
    is_described: bool = False  # parameters, data sets, environment
    offset_bytes: int = 0  # after the last event that was added
    last_steps: dict[str, int] = field(default_factory=dict)  # by kind of event
    status: str = ""  # the last one sent to MLflow
    reason: str = ""
    end_time_ms: int = 0
    end_bytes: int = 0  # after the `ended` event, if it is the last event
    files: list[list[str]] = field(default_factory=list)  # to send: path, folder in MLflow
    texts: list[str] = field(default_factory=list)  # to send: parts of run.json, as files
    files_bytes: int = 0  # sent so far
    tags: dict[str, str] = field(default_factory=dict)  # to set
    replaced_images: list[int] = field(default_factory=list)
    num_begins: int = 0
    num_restarts: int = 0
    highest_step: int = 0
    redone_steps: int = 0
    best_ap: float | None = None
    best_step: int = 0
    best_time_ms: int = 0
    is_gpu: bool | None = None  # whether its workers use GPUs; None: not a training run
    cpus_per_worker: float = 0.0
    began_s: float = 0.0  # the present start, since 1970
    last_s: float = 0.0
    num_workers: int = 0  # of the present start
    wall_s: float = 0.0  # of the previous starts
    worker_s: float = 0.0
    sent_rows: int = 0
    skipped_rows: int = 0  # of steps that were repeated after a restart
    refused_rows: int = 0  # rejected by MLflow as invalid

    def add(self, event: dict[str, Any], offset_bytes: int) -> list[UploadRow]:
        """Add an event to the record; return the rows that it sends to MLflow."""
        self.offset_bytes, self.end_bytes = offset_bytes, 0
        self._count_time(event)
        kind = event["kind"]
        rows_of = getattr(self, f"_rows_of_{kind}", None)
        try:
            if kind in COPIED:
                return self._once(event, {to: event.get(key) for to, key in COPIED[kind].items()})
            return [] if rows_of is None else rows_of(event)
        except (KeyError, TypeError, ValueError, OverflowError):  # another version wrote it
            return []

    def _rows_of_progress(self, event: dict[str, Any]) -> list[UploadRow]:
        self.highest_step = max(self.highest_step, int(event["step"]))
        return self._once(event, event["metrics"])

    def _rows_of_evaluation(self, event: dict[str, Any]) -> list[UploadRow]:
        rows = self._once(event, event["metrics"])
        ap = event["metrics"].get("val/AP")
        if rows and is_number(ap) and (self.best_ap is None or ap >= self.best_ap):
            self.best_ap, self.best_step = ap, int(event["step"])
            self.best_time_ms = _time_ms(event)
        return rows

    def _rows_of_replaced(self, event: dict[str, Any]) -> list[UploadRow]:
        number = len(self.replaced_images)
        images = [*self.replaced_images, *(image["image_id"] for image in event["images"])]
        self.replaced_images = list(dict.fromkeys(images))
        if len(self.replaced_images) == number:
            return []
        self._add_file(REPLACED_FILE, "")
        return _rows(event, {"train/replaced_images": len(self.replaced_images)})

    def _rows_of_file(self, event: dict[str, Any], to: str = "") -> list[UploadRow]:
        """Queue a file of the folder, such as a sweep's report."""
        self._add_file(event["path"], event.get("to", to))
        return []

    def _rows_of_picture(self, event: dict[str, Any]) -> list[UploadRow]:
        return self._rows_of_file(event, "pictures")

    def _rows_of_tags(self, event: dict[str, Any]) -> list[UploadRow]:
        """Queue tags that are known only later, such as a sweep's verdict."""
        self.tags |= {str(name): str(value) for name, value in event["tags"].items()}
        return []

    def _rows_of_begin(self, event: dict[str, Any]) -> list[UploadRow]:
        step = int(event["step"])
        self.num_begins += 1
        self.status = "RUNNING"
        if self.num_begins == 1:
            return _rows(event, {"model/parameters": event.get("num_parameters")})
        self.redone_steps += event.get("wasted_steps", max(0, self.highest_step - step))
        self.num_restarts += 1
        self.highest_step = step
        values = {"run/restarts": self.num_restarts, "run/redone_steps": self.redone_steps}
        return _rows(event, values | {"run/restart_s": event.get("restart_s")})

    def _rows_of_ended(self, event: dict[str, Any]) -> list[UploadRow]:
        self.status = event["status"] if event["status"] in ENDS else "FAILED"
        self.reason = redact(str(event.get("reason") or ""))
        self.end_bytes, self.end_time_ms = self.offset_bytes, _time_ms(event)
        values = {"run/goodput": event.get("goodput")} | self._cost()
        rows = _rows(event | {"step": self.highest_step}, values)
        if self.best_ap is None:
            return rows
        for place, (to, names) in BEST_FILES.items() if self.status == "FINISHED" else ():
            for name in names:
                self._add_file(f"{place}/step-{self.best_step:08d}/{name}", to)
        best = UploadRow("best/AP", float(self.best_ap), self.best_time_ms, self.best_step, "ended")
        return [*rows, best]

    def _count_time(self, event: dict[str, Any]) -> None:
        """Count the time from each start to its last event; time between starts is not counted."""
        kind = event["kind"]
        if not is_number(event.get("time_s")):
            return
        time_s = float(event["time_s"])
        if kind == "starting":
            self._close_start()
            self.began_s = self.last_s = time_s
        elif kind in ("begin", "progress", "evaluation", "checkpoint", "end"):
            self.began_s = self.began_s or time_s
            self.last_s = max(self.last_s, time_s)
            if kind == "begin" and is_number(event.get("world_size")):
                self.num_workers = int(event["world_size"])
                if is_number(event.get("cpus")):  # fewer than asked for, where GPUs share few
                    self.cpus_per_worker = float(event["cpus"])

    def _close_start(self) -> None:
        seconds = max(0.0, self.last_s - self.began_s)
        self.wall_s += seconds
        self.worker_s += seconds * self.num_workers
        self.began_s, self.last_s, self.num_workers = 0.0, 0.0, 0

    def _cost(self) -> dict[str, float]:
        """Return the cost of the run over all its starts; empty if it is not a training run."""
        self._close_start()
        if self.is_gpu is None or not self.worker_s:
            return {}
        hours = self.worker_s / 3600
        return {
            "cost/wall_s": self.wall_s,
            "cost/gpu_hours": hours if self.is_gpu else 0.0,
            "cost/cpu_hours": hours * self.cpus_per_worker,
        }

    def _once(self, event: dict[str, Any], values: dict[str, Any]) -> list[UploadRow]:
        """Return the rows, unless the step has rows of this kind: a restart repeats steps."""
        rows = _rows(event, values)
        kind, step = event["kind"], int(event["step"])
        if step <= self.last_steps.get(kind, -1):
            self.skipped_rows += len(rows)
            return []
        self.last_steps[kind] = step
        return rows

    def _add_file(self, path: str, folder: str) -> None:
        fault = artifact_fault(path) or (artifact_fault(folder) if folder else None)
        if fault:
            logger.warning("a file of the run is not sent to MLflow: %s", fault)
            return
        if [path, folder] not in self.files:
            self.files.append([path, folder])

    def copy(self) -> UploadRecord:
        return copy.deepcopy(self)

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD_FILE, asdict(self))  # only a cache


def read_record(folder: Path) -> UploadRecord:
    """Read the record of a run; return an empty one if it is missing or damaged."""
    try:
        content = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        known = {part.name for part in fields(UploadRecord)}
        return UploadRecord(**{name: value for name, value in content.items() if name in known})
    except (OSError, ValueError, AttributeError, TypeError):
        return UploadRecord()


def next_rows(folder: Path, record: UploadRecord) -> Iterator[tuple[UploadRecord, list[UploadRow]]]:
    """Yield the new rows of the journal, about one call's worth at a time.

    Each part comes with the record to save once it is sent.
    """
    draft, rows = record.copy(), []
    moved = False
    for event, offset_bytes in read_events(folder, record.offset_bytes):
        status = draft.status
        rows += draft.add(event, offset_bytes)
        moved = True
        if len(rows) >= ROWS_PER_CALL or draft.status != status:
            yield draft.copy(), rows
            rows, moved = [], False
    if moved:
        yield draft, rows


def count_unsent(folder: Path) -> tuple[int, int]:
    """Return how many rows and files of a run are not in MLflow yet, according to its folder."""
    record, num_rows = read_record(folder), 0
    for further, rows in next_rows(folder, record):
        record, num_rows = further, num_rows + len(rows)
    return num_rows, len(record.files) + len(record.texts)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def metric_name(name: str) -> str:
    """Return the name with all characters replaced that MLflow does not allow.

    MLflow allows letters, digits and _-. :/ in names, which must be plain paths. A changed name
    ends with a checksum, so that two classes with special characters stay distinguishable.
    """
    allowed = re.sub(r"[^\w\-. :/]", "_", name)
    parts = [part if part.strip(".") else "_" for part in allowed.split("/")]
    allowed = "/".join(parts)
    if allowed == name and len(name) <= MAX_NAME_CHARACTERS:
        return name
    return f"{allowed[: MAX_NAME_CHARACTERS - 9]}-{zlib.crc32(name.encode()):08x}"


def _rows(event: dict[str, Any], values: dict[str, Any]) -> list[UploadRow]:
    time_ms, step = _time_ms(event), int(event["step"])
    return [
        UploadRow(metric_name(name), float(value), time_ms, step, event["kind"])
        for name, value in values.items()
        if is_number(value)
    ]


def _time_ms(event: dict[str, Any]) -> int:
    return int(event["time_s"] * 1000)


def uri_of(folder: Path) -> str:
    """Return the tracking URI of a run: `MLFLOW_TRACKING_URI`, its earlier one, or the default.

    The default is a database beside the run's folder.

    Raises:
        ValueError: the earlier URI had a password, which is not stored.
    """
    known = read_record(folder).uri
    if os.environ.get("MLFLOW_TRACKING_URI") or not known:
        return tracking_uri(_storage_of(folder))
    if REDACTED in known:
        raise ValueError(
            f"{folder}: belongs to MLflow at {known}, and its password is not stored; set "
            "MLFLOW_TRACKING_URI"
        )
    return known


def _storage_of(folder: Path) -> Path:
    """Return the folder that contains the runs; for a trial, the one that contains its sweep."""
    folder = folder.resolve()
    sweeps = [one for one in folder.parents[:NUM_LEVELS] if (one / RUN_FILE).is_file()]
    return (sweeps[-1] if sweeps else folder).parent
