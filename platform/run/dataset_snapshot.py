"""Snapshot of a run's data sets, as validated at its start, in the folder of the run.

The Ray driver reads it, so that no attempt validates a large data set again. A resumed run also
needs it if images have broken since: training tolerates some, but a data set with a missing image
cannot be opened.

Others may be able to write to the folder, or the run may come from elsewhere. So the file holds
tables of numbers and JSON in safetensors, which cannot carry code. Reading it checks the same as
for an annotation file: names stay inside the folder, rows refer to existing rows, and the
fingerprint matches.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deta.platform.data.coco_annotations import file_name_fault
from deta.platform.data.coco_dataset import Category, CocoDataset
from deta.platform.data.coco_tables import ANNOTATION_ROW, IMAGE_ROW, CocoTables
from deta.platform.run.config import DataConfig, RunConfig, from_json, to_json
from deta.platform.run.run import Run
from deta.platform.shards.manifest import Shard
from deta.platform.shards.object_store import ObjectStore
from deta.platform.shards.sharded_dataset import LOCATION_ROW, ShardedDataset
from deta.platform.system.atomic_write import write_atomic
from deta.platform.system.safe_read import file_sha256

logger = logging.getLogger(__name__)

DATA_FILE = "data.safetensors"  # readable for its owner alone: it lists file names
FORMAT = 1
Split = Literal["train", "val"]


class SnapshotError(ValueError):
    """The snapshot is damaged, or `write_dataset_snapshot` did not write it."""


def write_dataset_snapshot(run: Run) -> None:
    """Write the snapshot of a run and its data sets into the folder of the run."""
    data = run.config.data
    about: dict[str, Any] = {
        "format": FORMAT,
        "config": json.loads(to_json(run.config)),
        "code_commit": run.code_commit,
        "notes": list(run.notes),
        "annotations_sha256": {
            split: _annotations_sha256(getattr(data, f"{split}_annotations"))
            for split in ("train", "val")
        },
    }
    tables: dict[str, np.ndarray] = {}
    for split, dataset in (("train", run.train_set), ("val", run.val_set)):
        names, image_rows, annotation_rows = dataset.tables
        about[split] = {
            "fingerprint": dataset.fingerprint,
            "file_names": names,
            "categories": [asdict(category) for category in dataset.categories],
            "notes": dataset.notes,
            "max_pixels": dataset.max_pixels,
            "shards": None,
        }
        tables[f"{split}.images"], tables[f"{split}.annotations"] = image_rows, annotation_rows
        if isinstance(dataset, ShardedDataset):
            about[split]["shards"] = [asdict(shard) for shard in dataset.shards]
            tables[f"{split}.places"] = dataset.locations
    rows = {name: np.frombuffer(table.tobytes(), np.uint8) for name, table in tables.items()}
    rows["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    write_atomic(run.folder / DATA_FILE, save(rows), mode=0o600)


def read_run_snapshot(folder: Path) -> Run:
    """Read the run of a folder, as `write_dataset_snapshot` wrote it.

    Raises:
        SnapshotError: the file is damaged, or has content that is never written.
        OSError: it does not exist, or the storage failed.
    """
    about, rows = _read(folder)
    try:
        config = from_json(RunConfig, json.dumps(about["config"]))
        train_set = _dataset(about["train"], rows, "train", config.data)
        val_set = _dataset(about["val"], rows, "val", config.data)
        notes = tuple(str(note) for note in about["notes"])
        return Run(config, folder, train_set, val_set, str(about["code_commit"]), notes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SnapshotError(
            f"{folder / DATA_FILE}: is not a data-set snapshot of a run: {error}"
        ) from error


def read_dataset_snapshot(folder: Path, split: Split, annotations: str) -> CocoDataset | None:
    """Return the data set that a run started with; None if unknown or if annotations changed."""
    try:
        known = _read(folder)[0]["annotations_sha256"][split]
        if not annotations or known != _annotations_sha256(annotations):
            return None
        run = read_run_snapshot(folder)
    except OSError:
        return None
    except (SnapshotError, KeyError, TypeError) as error:
        logger.warning("%s; it is ignored", error)
        return None
    return run.train_set if split == "train" else run.val_set


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    path = folder / DATA_FILE
    content = path.read_bytes()
    try:
        rows = load(content)
        about = json.loads(rows.pop("about").tobytes())
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise SnapshotError(f"{path}: is damaged: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise SnapshotError(f"{path}: has another format; resume with the version that wrote it")
    return about, rows


def _dataset(
    about: dict[str, Any], rows: dict[str, np.ndarray], split: Split, data: DataConfig
) -> CocoDataset:
    """Return one of the two data sets. The configuration says where and how its images are read.

    Raises:
        ValueError, TypeError, KeyError: some content is not as it is written.
    """
    names = list(about["file_names"])
    image_rows = _table(rows[f"{split}.images"], IMAGE_ROW)
    annotation_rows = _table(rows[f"{split}.annotations"], ANNOTATION_ROW)
    categories = tuple(Category(int(c["id"]), str(c["name"])) for c in about["categories"])
    notes = [str(note) for note in about["notes"]]
    for name in names:
        if fault := file_name_fault(name):
            raise ValueError(f"a file name {fault}")
    if len(names) != len(image_rows):
        raise ValueError(f"{len(names)} file names for {len(image_rows)} images")
    start, end = image_rows["start"], image_rows["end"]
    if (start < 0).any() or (start > end).any() or (end > len(annotation_rows)).any():
        raise ValueError("images point at annotations that do not exist")
    _require_within(annotation_rows["label"], len(categories), "categories")

    max_pixels, rules = int(about["max_pixels"]), data.pixel_rules
    images = getattr(data, f"{split}_images")
    coco = CocoTables(names, image_rows, annotation_rows)
    dataset: CocoDataset
    if about["shards"] is None:
        dataset = CocoDataset(Path(images), coco, categories, notes, max_pixels, rules)
    else:
        places = _table(rows[f"{split}.places"], LOCATION_ROW)
        shards = tuple(Shard(**shard) for shard in about["shards"])
        if len(places) != len(image_rows):
            raise ValueError(f"{len(places)} places for {len(image_rows)} images")
        _require_within(places["shard"], len(shards), "shards")
        dataset = ShardedDataset(
            ObjectStore(images), shards, places, coco, categories, notes, max_pixels, rules
        )
    if dataset.fingerprint != about["fingerprint"]:
        raise ValueError(
            f"the {split} data set does not have the fingerprint that it was stored with"
        )
    return dataset


def _table(content: np.ndarray, row: np.dtype) -> np.ndarray:
    return np.frombuffer(content.tobytes(), row).copy()


def _require_within(numbers: np.ndarray, count: int, what: str) -> None:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < count):
        raise ValueError(f"rows point at {what} that do not exist")


def _annotations_sha256(annotations: str) -> str:
    path = Path(annotations)  # shards have hashes of their own
    return file_sha256(path) if annotations and path.is_file() else ""
