"""Turns a configuration into a run that can start; checks all that needs no cluster."""

from __future__ import annotations

import logging
import os
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from deta.model.architectures import make_criterion, make_detector, without_download
from deta.model.shapes_only import shapes_only
from deta.platform.checkpoint.local import find_checkpoint
from deta.platform.data.coco_annotations import DatasetError
from deta.platform.data.coco_dataset import CocoDataset
from deta.platform.launch.dataset_report import shared_images_note
from deta.platform.learning.optimizer import freeze
from deta.platform.run.config import DataConfig, RunConfig, flatten
from deta.platform.run.dataset_snapshot import Split, read_dataset_snapshot
from deta.platform.run.run import Run
from deta.platform.run.run_file import read_run_file
from deta.platform.run.run_paths import require_run_paths
from deta.platform.shards.open_dataset import open_dataset
from deta.platform.system.download import fetch, is_url
from deta.platform.system.redaction import holds_secret
from deta.platform.weights.initial_weights import check_initial_weights
from deta.platform.weights.weight_parts import is_weights_folder

logger = logging.getLogger(__name__)


def prepare_run(config: RunConfig, *, resume: bool = False) -> Run:
    """Check everything that can be checked without a cluster: data, classes, sizes.

    Args:
        resume: the run has begun. Training images that have become unreadable since are accepted
            then; the training replaces them, up to `data.max_broken_share`.

    Raises:
        ValueError: names the file and record, or the configuration key.
    """
    make_criterion(config.criterion, config.model)  # raises if it does not fit the model
    require_run_paths(config, is_resumed=resume)
    data = config.data
    keys = ("train_images", "train_annotations", "val_images", "val_annotations")
    paths: dict[str, Any] = {key: _absolute(getattr(data, key)) for key in keys}
    data = replace(data, **paths)
    storage = Path(_absolute(config.storage))
    kept = storage / config.name if resume else None
    train_set, val_set = _open("train", data, kept), _open("val", data, kept)
    if train_set.categories != val_set.categories:
        train = {(category.id, category.name) for category in train_set.categories}
        val = {(category.id, category.name) for category in val_set.categories}
        raise ValueError(
            f"{data.train_annotations or data.train_images} and "
            f"{data.val_annotations or data.val_images} have different categories: only in the "
            f"first {sorted(train - val)[:5]}, only in the second {sorted(val - train)[:5]}; both "
            "must list the same ids and names"
        )
    if data.sixteen_bit == "stretch" and data.sixteen_bit_range is None:
        data = replace(data, sixteen_bit_range=_sixteen_bit_range(train_set, kept))
        train_set.rules = val_set.rules = data.pixel_rules
    if not resume and (note := shared_images_note(train_set, val_set)):
        val_set.notes.append(note)
    if config.optim.freeze:
        with shapes_only():
            freeze(make_detector(without_download(config.model)), config.optim.freeze)
    config = replace(
        config,
        data=data,
        storage=str(storage),
        init_checkpoint=_local("init_checkpoint", config.init_checkpoint, storage),
        init_backbone=_local("init_backbone", config.init_backbone, storage),
        model=replace(config.model, num_classes=len(train_set.categories)),
    )
    _refuse_secrets(config)
    notes = tuple(check_initial_weights(config, train_set.categories))
    return Run(config, storage / config.name, train_set, val_set, _code_commit(), notes)


def _open(split: Split, data: DataConfig, kept: Path | None) -> CocoDataset:
    images, annotations, first = (
        getattr(data, f"{split}_{key}") for key in ("images", "annotations", "first")
    )
    try:
        dataset = open_dataset(
            images,
            annotations,
            lenient=data.lenient,
            max_pixels=data.max_pixels,
            rules=data.pixel_rules,
            progress=True,
        )
    except DatasetError as error:
        before = None
        if kept and split == "train":
            before = read_dataset_snapshot(kept, split, annotations)
        if before is None:
            raise
        logger.warning("%s\nThese images were readable when the run began, so it continues: the "
                       "training replaces broken images.", error)  # fmt: skip
        return before
    return dataset if first is None else dataset.first(min(first, len(dataset)))


def _sixteen_bit_range(train_set: CocoDataset, kept: Path | None) -> tuple[int, int]:
    """Return the range that the run began with, or that of the training images."""
    if kept is not None:
        with suppress(ValueError, OSError, KeyError, TypeError):
            least, most = read_run_file(kept)["config"]["data"]["sixteen_bit_range"]
            return least, most
    if (found := train_set.sixteen_bit_range()) is None:
        raise ValueError(
            "data.sixteen_bit=stretch: no training image that was looked at is grey of 16 bits; "
            "leave it out, or give data.sixteen_bit_range=LEAST,MOST"
        )
    return found


def _local(key: str, given: str | None, storage: Path) -> str | None:
    """Return the path of init_checkpoint or init_backbone, where all nodes can read it."""
    if given is None:
        return None
    if is_url(given):  # download it to the storage, which all nodes share
        return str(fetch(given, storage / "downloads"))
    path = Path(_absolute(given))
    if key == "init_checkpoint" and not path.is_file() and not is_weights_folder(path):
        path = find_checkpoint(path)
    if not path.exists():
        raise ValueError(f"{key}={path}: no such file or folder")
    return str(path)


def _refuse_secrets(config: RunConfig) -> None:
    """Refuse secrets: the run's folder, its checkpoints and MLflow store the configuration.

    Raises:
        ValueError: a value is a secret; names the key, not the value.
    """
    for key, value in flatten(config).items():
        if isinstance(value, str) and holds_secret(value):
            raise ValueError(
                f"{key} contains a password or a key, which would be stored in the run's folder, "
                "its checkpoints and logs; set it in the environment instead (AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY for S3, or the credentials file of the store's tools)"
            )


def _absolute(path: str) -> str:
    if not path or "://" in path:  # for example a bucket
        return path
    return str(Path(path).expanduser().resolve())


def _code_commit() -> str:
    """Return the commit of this code; `deta submit` sets it for a job that has no git history."""
    if commit := os.environ.get("DETA_COMMIT"):
        return commit
    folder = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
