"""What a run is, in its folder: run.json, written by the supervisor before anything begins.

Everything that MLflow is told of a run before its first step is in here, so that the process that
tells it needs neither the data nor torch.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import uuid
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deta.platform.system.atomic_write import write_json

# Where a run goes on although these differ from when it began: they do not change what is learnt.
FREE_TO_CHANGE = (
    "name", "storage", "experiment", "cluster.", "checkpoint.", "data.loader_workers",
    "data.max_broken_share", "log_every_steps", "num_pictures", "data.train_images",
    "data.train_annotations", "data.val_images", "data.val_annotations", "micro_batch_size",
    "max_skipped_steps", "compare_weights_every_steps", "schedule.patience", "schedule.min_delta",
)  # fmt: skip


if TYPE_CHECKING:
    from deta.platform.data.coco_dataset import CocoDataset
    from deta.platform.run.run import Run

RUN_FILE = "run.json"
RECIPE_TAG = "deta.recipe"  # of a run in MLflow: "deta_r50.demo"


def describe_run(
    run: Run,
    before: dict[str, Any] | None = None,
    *,
    parent: str | None = None,
    tags: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What run.json holds.

    Args:
        before: what it held, where the run is resumed: its key, time, parent and tags stay.
        parent: key of the sweep that this is a trial of, or the id of its MLflow run.
        tags: further tags of the MLflow run.
    """
    from deta.platform.run.config import to_json  # here: readers of the file need no torch

    before = before or {}
    data = run.config.data
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
        "environment": _environment(),
    }


def write_run_file(folder: Path, description: dict[str, Any]) -> None:
    """Replace run.json, as a whole."""
    write_json(folder / RUN_FILE, description, indent=2, durable=True)


def read_run_file(folder: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: the file is damaged.
    """
    path = folder / RUN_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise ValueError(f"{path}: is damaged, it holds no run")
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


def _environment() -> dict[str, Any]:
    packages = sorted(
        {f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}
    )
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
    }


class RunExistsError(ValueError):
    """The name is taken, or cannot be resumed like this."""


def tracking_uri(storage: Path) -> str:
    """`MLFLOW_TRACKING_URI`, or a database file beside the runs."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{storage.resolve() / 'mlflow.db'}"
