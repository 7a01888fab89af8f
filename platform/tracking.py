"""A run in MLflow: parameters, metrics over steps, data sets, pictures, the best checkpoint.

Reads the run's journal and uploads what is new; training never talks to MLflow. With the run's id
and the offset of the last uploaded line kept in the run's folder, a resumed run goes on in the
same MLflow run and no line is uploaded twice.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

# A server that is away must not hold a run for the 247 s of the defaults; see launch.py, which
# tries again at every turn.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from deta.platform.checkpoint import best_checkpoint
from deta.platform.config import flatten
from deta.platform.journal import read_events
from deta.platform.training import Run

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # limits of MLflow's REST interface
MAX_PARAM_CHARACTERS = 6000


class TrackingError(RuntimeError):
    """MLflow cannot be reached."""


@dataclass
class _Uploaded:
    """How far the journal has been uploaded. Kept in the run's folder."""

    run_id: str
    offset_bytes: int = 0

    def save(self, path: Path) -> None:
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(vars(self)), encoding="utf-8")
        unfinished.replace(path)


def tracking_uri(storage: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or a database file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.resolve() / 'mlflow.db'}"


class Tracker:
    """The MLflow run of one training run."""

    def __init__(self, run: Run, uri: str) -> None:
        """Open the MLflow run of this folder, or create it.

        Raises:
            TrackingError: MLflow cannot be reached; before any training.
        """
        self.run, self.uri = run, uri
        self._record = run.folder / "mlflow.json"
        try:
            self._client = MlflowClient(tracking_uri=uri)
            if self._record.exists():
                self._uploaded = _Uploaded(**json.loads(self._record.read_text(encoding="utf-8")))
                self._client.update_run(self._uploaded.run_id, status="RUNNING")
            else:
                self._uploaded = _Uploaded(self._create())
                self._describe()
                self._uploaded.save(self._record)
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"MLflow at {uri} cannot be used: {error}\nStart its server, or unset "
                "MLFLOW_TRACKING_URI to keep a database file beside the runs."
            ) from error

    @property
    def run_id(self) -> str:
        return self._uploaded.run_id

    def _create(self) -> str:
        name = self.run.config.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            location = None
            if self.uri.startswith("sqlite:"):
                location = (self.run.folder.parent / "mlartifacts" / name).resolve().as_uri()
            experiment_id = self._client.create_experiment(name, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        tags = {
            "mlflow.source.name": Path(sys.argv[0]).name,
            "mlflow.source.type": "JOB",
            "deta.run_folder": str(self.run.folder),
            "deta.train_fingerprint": self.run.train_set.fingerprint,
            "deta.val_fingerprint": self.run.val_set.fingerprint,
        }
        if self.run.code_commit:
            tags["mlflow.source.git.commit"] = self.run.code_commit
        created = self._client.create_run(experiment_id, run_name=self.run.config.name, tags=tags)
        return created.info.run_id

    def _describe(self) -> None:
        """What is known before the first step."""
        params = [
            Param(key, str(value)[:MAX_PARAM_CHARACTERS])
            for key, value in flatten(self.run.config).items()
        ]
        for begin in range(0, len(params), PARAMS_PER_CALL):
            self._client.log_batch(self.run_id, params=params[begin : begin + PARAMS_PER_CALL])
        data = self.run.config.data
        self._client.log_inputs(
            self.run_id,
            datasets=[
                DatasetInput(
                    Dataset(
                        name=Path(annotations).stem,
                        digest=dataset.fingerprint[:36],
                        source_type="local",
                        source=json.dumps({"images": images, "annotations": annotations}),
                        profile=json.dumps(
                            {
                                "images": len(dataset),
                                "classes": len(dataset.categories),
                                "fingerprint": dataset.fingerprint,
                                "notes": dataset.notes,
                            }
                        ),
                    ),
                    [InputTag("mlflow.data.context", context)],
                )
                for dataset, images, annotations, context in (
                    (self.run.train_set, data.train_images, data.train_annotations, "training"),
                    (self.run.val_set, data.val_images, data.val_annotations, "validation"),
                )
            ],
        )
        self._client.log_dict(self.run_id, _environment(), "environment.json")
        categories = {str(category.id): category.name for category in self.run.train_set.categories}
        self._client.log_dict(self.run_id, categories, "categories.json")

    def upload(self) -> None:
        """Everything new in the journal.

        Raises:
            MlflowException: MLflow is away; what was not uploaded will be at the next call.
        """
        metrics: list[Metric] = []
        offset = self._uploaded.offset_bytes
        for event, offset_after in read_events(self.run.folder, offset):
            time_ms = int(event["time_s"] * 1000)
            metrics += [
                Metric(_metric_name(name), value, time_ms, event["step"])
                for name, value in event.get("metrics", {}).items()
                if event["kind"] in ("progress", "evaluation")
            ]
            if event["kind"] == "picture":
                picture = self.run.folder / event["path"]
                if picture.exists():
                    self._client.log_artifact(self.run_id, str(picture), "pictures")
            offset = offset_after
        for begin in range(0, len(metrics), METRICS_PER_CALL):
            # Sent twice after a fault between here and `save`, a row is still there once: MLflow
            # drops an equal (key, value, time, step).
            self._client.log_batch(self.run_id, metrics=metrics[begin : begin + METRICS_PER_CALL])
        if offset != self._uploaded.offset_bytes:
            self._uploaded.offset_bytes = offset
            self._uploaded.save(self._record)

    def finish(self, status: Status, reason: str = "") -> None:
        """Upload the rest and the best checkpoint, and close the MLflow run."""
        self.upload()
        best = best_checkpoint(self.run.checkpoints)
        if best is not None and status == "FINISHED":
            for name in ("model.safetensors", "config.json", "state.json"):
                self._client.log_artifact(self.run_id, str(best / name), "best_checkpoint")
            state = json.loads((best / "state.json").read_text(encoding="utf-8"))
            tags = [RunTag("deta.best_checkpoint", str(best))]
            self._client.log_batch(
                self.run_id,
                metrics=[
                    Metric(
                        "best/AP",
                        state["metrics"]["AP"],
                        int(best.stat().st_mtime * 1000),
                        state["step"],
                    )
                ],
                tags=tags,
            )
        if reason:
            self._client.set_tag(self.run_id, "deta.reason", reason[:4000])
        self._client.set_terminated(self.run_id, status=status)


def _metric_name(name: str) -> str:
    """MLflow allows letters, digits and _-. :/ in names."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def _environment() -> dict[str, Any]:
    packages = sorted(
        {f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}
    )
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
    }
