"""Stores a run in MLflow: parameters, metrics over steps, data sets, images, the best checkpoint.

The uploader process uses it (`uploader_main.py`). Training itself writes a journal and never calls
MLflow, so the state of MLflow's server cannot slow it down, stop it or lose a value.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

# The uploader retries, since it knows what else to do meanwhile. MLflow's own retries would block
# a call for minutes, and create a second run if the answer to the first call was lost.
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # nothing here is stored as a pickle

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    Metric,
    Param,
    Run,
    ViewType,
)
from mlflow.exceptions import MlflowException

from deta.platform.system.artifact_names import folder_name
from deta.platform.system.atomic_write import replacing
from deta.platform.system.places import bypass_proxies
from deta.platform.system.redaction import REDACTED, redact, redact_value
from deta.platform.tracking.upload_plan import ROWS_PER_CALL, UploadRecord, UploadRow

logger = logging.getLogger(__name__)

PARAMS_PER_CALL = 100  # limit of MLflow's REST interface
MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS = 6000, 4000
TIMEOUT_S, MAX_TIMEOUT_S, LAST_TIMEOUT_S = 5, 20, 3  # of one call; longer if MLflow is slow
FILE_TIMEOUT_S = 60
MAX_REDACTED_BYTES = 2_000_000
TEXT_SUFFIXES = (".json", ".jsonl", ".txt", ".md", ".csv", ".yaml", ".yml")
HEARTBEAT_TAG, KEY_TAG, FOLDER_TAG = "deta.heartbeat", "deta.key", "deta.run_folder"
DEAD_AFTER_S = 120.0
WATCH_S = 45.0  # one and a half times between two heartbeats of an uploader
# A metric that every event of the kind has.
SENTINELS = {"progress": "train/epoch", "evaluation": "val/epoch"}


class MlflowStore:
    """The uploader's calls to MLflow. Each may raise anything, and can be repeated."""

    def __init__(self, uri: str) -> None:
        bypass_proxies()
        self.uri, self.shown_uri = uri, redact(uri)
        self.call_s = 0.0
        self._client: MlflowClient | None = None
        self._timeout_s, self._is_final = TIMEOUT_S, False

    def open(
        self, folder: Path, description: dict[str, Any], run_id: str, *, needs_parent: bool
    ) -> str:
        """Return the id of this folder's run in MLflow; create the run if there is none.

        Args:
            run_id: the id from an earlier call, or empty.
            needs_parent: do not create a run before the run of its sweep exists.

        Raises:
            LookupError: the run of the sweep does not exist yet.
            RuntimeError: the run was deleted in MLflow.
        """
        if run_id and (run := self._find_run(run_id)) is not None:
            _require_active(run)
            return run_id
        key = _key(folder, description)
        experiment = self._experiment(description["config"]["experiment"])
        mine = self._runs_of(experiment, key)
        if not mine:
            self._create(experiment, folder, description, key, needs_parent)
            mine = self._runs_of(experiment, key)
        # If the answer to an earlier call was lost and the search came too early, there are two
        # runs. All readers use the oldest one.
        for twin in mine[1:]:
            if not twin.data.metrics:
                self._call("delete_run", twin.info.run_id)
        return mine[0].info.run_id

    def describe(self, run_id: str, description: dict[str, Any]) -> None:
        """Send what is known before the first step; do not change what MLflow has already.

        Sends no files: `send_text` does.
        """
        run = self._call("get_run", run_id)
        params = [
            Param(key, _param_value(key, value))
            for key, value in _flatten(description["config"]).items()
            if key not in run.data.params
        ]
        for begin in range(0, len(params), PARAMS_PER_CALL):
            part = params[begin : begin + PARAMS_PER_CALL]
            self._call("log_batch", run_id, params=part)
        data = description.get("data") or {}
        if data and not (run.inputs and run.inputs.dataset_inputs):
            inputs = [_dataset_input(context, one) for context, one in data.items()]
            self._call("log_inputs", run_id, datasets=inputs)

    def send_text(self, run_id: str, name: str, content: Any) -> None:
        """Send a part of the description as a JSON file."""
        text = redact(json.dumps(content, indent=2))
        self._call("log_text", run_id, text, f"{name}.json", at_least_s=FILE_TIMEOUT_S)

    def known_steps(self, run_id: str) -> dict[str, dict[int, int]]:
        """Return, for each kind of event, the steps that MLflow has and their times in ms."""
        known: dict[str, dict[int, int]] = {}
        for kind, name in SENTINELS.items():
            history = self._call("get_metric_history", run_id, name)
            known[kind] = {metric.step: metric.timestamp for metric in history}
        return known

    def send(self, run_id: str, rows: list[UploadRow]) -> int:
        """Send metric values; return how many of them MLflow rejected as invalid."""
        if len(rows) > ROWS_PER_CALL:
            return self._send_parts(run_id, rows, ROWS_PER_CALL)
        metrics = [
            Metric(row.name, row.value, row.time_ms, row.step)
            for row in rows
            if math.isfinite(row.value)
        ]
        try:
            # A row that is sent again after a failure is stored once: MLflow drops an equal
            # (key, value, time, step).
            self._call("log_batch", run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            _require_active(self._call("get_run", run_id))
            if len(rows) > 1:
                return self._send_parts(run_id, rows, (len(rows) + 1) // 2)
            logger.warning("MLflow refuses %s: %s", rows[0], error)
            return 1
        return 0

    def _send_parts(self, run_id: str, rows: list[UploadRow], size: int) -> int:
        begins = range(0, len(rows), size)
        return sum(self.send(run_id, rows[begin : begin + size]) for begin in begins)

    def set_status(self, run_id: str, record: UploadRecord) -> None:
        if record.status == "RUNNING":
            self._call("update_run", run_id, status="RUNNING")
            return
        if record.reason or record.num_begins > 1:
            self._call("set_tag", run_id, "deta.reason", record.reason[:MAX_TAG_CHARACTERS])
        if record.status == "FINISHED" and record.best_ap is not None:
            path = f"checkpoints/step-{record.best_step:08d}"
            self._call("set_tag", run_id, "deta.best_checkpoint", path)
        self._call(
            "set_terminated", run_id, status=record.status, end_time=record.end_time_ms or None
        )

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        for name, value in tags.items():
            text = redact_value(name, redact(value))[:MAX_TAG_CHARACTERS]
            self._call("set_tag", run_id, name[:250], text)

    def heartbeat(self, run_id: str) -> None:
        self._call("set_tag", run_id, HEARTBEAT_TAG, f"{time.time():.0f}")

    def send_file(self, run_id: str, path: Path, folder: str) -> None:
        """Send a file; redact secrets if it is text."""
        with tempfile.TemporaryDirectory(prefix="deta-") as clean:
            if path.suffix in TEXT_SUFFIXES and path.stat().st_size <= MAX_REDACTED_BYTES:
                text = path.read_text(encoding="utf-8", errors="replace")
                path = Path(clean) / path.name
                path.write_text(redact(text), encoding="utf-8")
            self._call("log_artifact", run_id, str(path), folder or None, at_least_s=FILE_TIMEOUT_S)

    def fetch_folder(self, run_id: str, name: str, to: Path) -> tuple[str, Path]:
        """Copy a folder of a run's artifacts; return the run's name and the path of the copy.

        Raises:
            ValueError: the run does not exist, or it has no such folder.
        """
        try:
            run = self._call("get_run", run_id)
        except MlflowException as error:
            raise ValueError(f"{self.shown_uri} has no run {run_id}: {error.message}") from error
        if not self._call("list_artifacts", run_id, name):
            raise ValueError(f"run {run_id} of {self.shown_uri} has no artifacts {name!r}")
        path = self._call("download_artifacts", run_id, name, str(to), at_least_s=FILE_TIMEOUT_S)
        return run.info.run_name or run_id, Path(path)

    def shorten_timeouts(self) -> None:
        """Use short timeouts from now on, because little time is left."""
        self._is_final = True

    def _connect(self) -> MlflowClient:
        if self._client is None:
            database = Path(self.uri.removeprefix("sqlite:///"))
            with contextlib.ExitStack() as held:
                if self.uri.startswith("sqlite:///"):
                    # Two processes that create its tables at once would both fail.
                    database.parent.mkdir(parents=True, exist_ok=True)
                    held.enter_context(FileLock(database.with_name(f".{database.name}.lock")))
                    if not database.exists():
                        _create_database(database)
                client = MlflowClient(tracking_uri=self.uri)
                client.search_experiments(max_results=1)
            self._client = client
        return self._client

    def _call(self, method: str, *args: Any, at_least_s: int = 0, **kwargs: Any) -> Any:
        """Call a method of MLflow's client, and adapt the timeout to how fast it answers."""
        timeout_s = max(self._timeout_s, at_least_s)
        if self._is_final:
            timeout_s = LAST_TIMEOUT_S
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout_s)  # MLflow reads it at each call
        began_s = time.monotonic()
        try:
            result = getattr(self._connect(), method)(*args, **kwargs)
        except Exception as error:
            if re.search("time.?out|timed out", str(error), re.IGNORECASE):
                self._timeout_s = min(MAX_TIMEOUT_S, 2 * self._timeout_s)
            raise
        finally:
            self.call_s = time.monotonic() - began_s
        if self.call_s < TIMEOUT_S / 4:
            self._timeout_s = TIMEOUT_S
        return result

    def _experiment(self, name: str) -> Experiment:
        found = self._call("get_experiment_by_name", name)
        if found is None:
            location = None
            if self.uri.startswith("sqlite:///"):
                beside = Path(self.uri.removeprefix("sqlite:///")).resolve().parent
                location = (beside / "mlartifacts" / folder_name(name)).as_uri()
            try:
                self._call("create_experiment", name, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # created by another run
                    raise
            found = self._call("get_experiment_by_name", name)
        if found.lifecycle_stage != "active":
            raise RuntimeError(
                f"experiment {name!r} was deleted in MLflow; restore it with `mlflow experiments "
                f"restore -x {found.experiment_id}`, then the run will be sent"
            )
        return found

    def _create(
        self,
        experiment: Experiment,
        folder: Path,
        description: dict[str, Any],
        key: str,
        needs_parent: bool,
    ) -> None:
        tags = {
            str(k): redact_value(str(k), str(v)) for k, v in (description.get("tags") or {}).items()
        }
        tags |= {
            "mlflow.source.name": description.get("source") or "deta",
            "mlflow.source.type": "JOB",
            KEY_TAG: key,
            FOLDER_TAG: redact(str(folder.resolve())),
        }
        for split in ("train", "val"):
            if fingerprint := description.get(f"{split}_fingerprint"):
                tags[f"deta.{split}_fingerprint"] = fingerprint
        if commit := description.get("code_commit"):
            tags["mlflow.source.git.commit"] = commit
        if parent := description.get("parent"):
            tags["deta.parent"] = parent
            parent_run = self._parent(experiment, parent)
            if parent_run:
                tags["mlflow.parentRunId"] = parent_run
            elif needs_parent:
                raise LookupError(f"the run of the sweep {parent} is not in MLflow yet")
        created_s = description.get("created_s")
        self._call(
            "create_run",
            experiment.experiment_id,
            start_time=int(created_s * 1000) if created_s else None,
            run_name=description.get("title") or description["config"].get("name") or folder.name,
            tags={k[:250]: v[:MAX_TAG_CHARACTERS] for k, v in tags.items()},
        )

    def _parent(self, experiment: Experiment, parent: str) -> str | None:
        found = next(iter(self._runs_of(experiment, parent)), None) or self._find_run(parent)
        return None if found is None else found.info.run_id

    def _find_run(self, run_id: str) -> Run | None:
        try:
            return self._call("get_run", run_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def _runs_of(self, experiment: Experiment, key: str) -> list[Run]:
        """Return the runs with this key, oldest first."""
        safe = re.sub(r"[^A-Za-z0-9_.:-]", "_", key)
        runs = self._search(experiment, f"tags.`{KEY_TAG}` = '{safe}'")
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def _search(self, experiment: Experiment, what: str) -> list[Run]:
        return list(
            self._call(
                "search_runs",
                [experiment.experiment_id],
                what,
                run_view_type=ViewType.ACTIVE_ONLY,
                max_results=10_000,
            )
        )

    def reap(
        self, experiment: str, *, dry_run: bool = False, watch_s: float = WATCH_S
    ) -> list[tuple[str, str]]:
        """Mark runs KILLED that are RUNNING without a recent heartbeat, and have no folder here.

        Args:
            watch_s: how long to watch heartbeats that seem old. The clock of another machine may be
                wrong, so a run whose heartbeat changes meanwhile is alive.

        Returns:
            The id and name of each.
        """
        silent = self._silent_runs(experiment)
        if silent:
            time.sleep(watch_s)
        later = self._silent_runs(experiment)
        dead = []
        for run_id, (name, beat) in silent.items():
            if later.get(run_id) != (name, beat):
                continue
            dead.append((run_id, name))
            if not dry_run:
                when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(beat)))
                self._call("set_tag", run_id, "deta.reason", f"no heartbeat since {when}")
                self._call("set_terminated", run_id, status="KILLED")
        return dead

    def _silent_runs(self, experiment: str) -> dict[str, tuple[str, str]]:
        """Return name and heartbeat of running runs that seem silent, by id."""
        found = self._call("get_experiment_by_name", experiment)
        silent = {}
        for run in self._search(found, "attributes.status = 'RUNNING'") if found else []:
            beat = run.data.tags.get(HEARTBEAT_TAG, "")
            is_beat = re.fullmatch(r"\d+(\.\d+)?", beat)
            if not is_beat or abs(time.time() - float(beat)) < DEAD_AFTER_S:
                continue
            folder = run.data.tags.get(FOLDER_TAG, "")
            if folder and REDACTED not in folder and Path(folder).is_dir():
                continue  # jobs/sync.py reads the status from the folder
            silent[run.info.run_id] = (run.info.run_name or "", beat)
        return silent


def _create_database(database: Path) -> None:
    """Create a database file atomically: a partial one, from a killed process, stays broken.

    It is made in memory first, since MLflow creates its tables in hundreds of disk writes.
    """
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="deta-", dir=place) as folder:
        new = Path(folder) / database.name
        MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
        with replacing(database) as unfinished:
            shutil.copyfile(new, unfinished)


def _require_active(run: Run) -> None:
    if run.info.lifecycle_stage != "active":
        raise RuntimeError(
            f"the run {run.info.run_id} was deleted in MLflow; restore it with `mlflow runs "
            f"restore --run-id {run.info.run_id}`, then the rest will be sent"
        )


def _key(folder: Path, description: dict[str, Any]) -> str:
    """Return the unique key of a run; run files of older versions have none, so it is derived."""
    if key := description.get("key"):
        return str(key)
    text = f"{folder.resolve()} {description.get('train_fingerprint')}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value by its dotted key, as `config.flatten` does for a configuration."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = tuple(value) if isinstance(value, list) else value
    return flat


def _param_value(key: str, value: Any) -> str:
    text = redact_value(key, str(value))
    if len(text) <= MAX_PARAM_CHARACTERS:
        return text
    note = f" … (cut; {len(text)} characters)"
    return text[: MAX_PARAM_CHARACTERS - len(note)] + note


def _dataset_input(context: str, data: dict[str, Any]) -> DatasetInput:
    source = {"images": data["images"], "annotations": data["annotations"]}
    profile = {
        "images": data["num_images"],
        "classes": data["num_classes"],
        "fingerprint": data["fingerprint"],
        "notes": data["notes"],
    }
    dataset = Dataset(
        name=redact(data["name"])[:500],
        digest=data["fingerprint"][:36],
        source_type="local",
        source=redact(json.dumps(source)),
        profile=redact(json.dumps(profile))[:60_000],
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
