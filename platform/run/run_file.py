"""run.json: the description of a run, which the supervisor writes before anything starts.

It holds everything that MLflow receives before the first step, so that the uploader needs neither
the data nor torch.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
import uuid
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deta.platform.system.atomic_write import write_json

# A run can be resumed with other values of these: they do not change what the model learns.
FREE_TO_CHANGE = (
    "name", "storage", "experiment", "cluster.", "checkpoint.", "evaluation.",
    "data.loader_workers", "data.max_broken_share", "log_every_steps", "num_pictures",
    "data.train_images", "data.train_annotations", "data.val_images", "data.val_annotations",
    "micro_batch_size", "max_skipped_steps", "compare_weights_every_steps",
    "schedule.patience", "schedule.min_delta",
)  # fmt: skip


if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import CocoDataset
    from deta.platform.run.run import Run

RUN_FILE = "run.json"
RUN_ID = re.compile(r"[0-9a-f]{32}")  # of MLflow
RECIPE_TAG = "deta.recipe"  # a tag of the MLflow run, such as "deta_r50.demo"


def describe_run(
    run: Run,
    before: dict[str, Any] | None = None,
    *,
    parent: str | None = None,
    tags: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return the content of run.json.

    Args:
        before: its content when the run is resumed: key, time, parent and tags are kept.
        parent: key of the sweep of this trial, or the id of its MLflow run.
        tags: further tags of the MLflow run.
    """
    from deta.platform.run.config import to_json  # here, so that readers of the file need no torch

    before = before or {}
    data = run.config.data
    packages = {f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}
    return {
        "key": before.get("key") or uuid.uuid4().hex,
        "config": json.loads(to_json(run.config)),
        "train_fingerprint": run.train_set.fingerprint,
        "val_fingerprint": run.val_set.fingerprint,
        "code_commit": run.code_commit,
        "created_s": before.get("created_s") or time.time(),
        "parent": parent or before.get("parent"),
        "tags": (before.get("tags") or {}) | (tags or {}),
        "source": Path(sys.argv[0]).name,
        "data": {
            "training": _describe_data(run.train_set, data.train_images, data.train_annotations),
            "validation": _describe_data(run.val_set, data.val_images, data.val_annotations),
        },
        "categories": {str(category.id): category.name for category in run.train_set.categories},
        "environment": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "packages": sorted(packages),
        },
    }


def write_run_file(folder: Path, description: dict[str, Any]) -> None:
    """Replace run.json atomically."""
    write_json(folder / RUN_FILE, description, indent=2, durable=True)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read run.json.

    Raises:
        FileNotFoundError: the folder does not hold a run.
        ValueError: the file is damaged.
    """
    path = folder / RUN_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ValueError(f"{path}: is damaged, it does not describe a run")
    return content


def _describe_data(dataset: CocoDataset, images: str, annotations: str) -> dict[str, Any]:
    return {
        "name": Path(annotations).stem,
        "images": images,
        "annotations": annotations,
        "fingerprint": dataset.fingerprint,
        "num_images": len(dataset),
        "num_classes": len(dataset.categories),
        "notes": list(dataset.notes),
    }


class RunExistsError(ValueError):
    """A run of this name exists and cannot be resumed with this configuration."""


def tracking_uri(storage: Path) -> str:
    """Return `MLFLOW_TRACKING_URI`, or the address of a database file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.resolve() / 'mlflow.db'}"
