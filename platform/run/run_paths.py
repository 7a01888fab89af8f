"""Checks that the files which a configuration names exist, before anything slow is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from deta.platform.run.config import RunConfig


def require_run_paths(config: RunConfig, *, is_resumed: bool = False) -> None:
    """Refuse a configuration whose data or initial weights are not given or not there.

    Args:
        is_resumed: data may have gone since; the snapshot in the run's folder then replaces them.

    Raises:
        ValueError: names the key.
    """
    require_storage(config.storage)
    data = config.data
    for split in ("train", "val"):
        if not getattr(data, f"{split}_images"):
            raise ValueError(
                f"data.{split}_images is not set; give --train-images, --train-annotations, "
                "--val-images and --val-annotations (shards hold their annotations)"
            )
    keys = ("train_images", "train_annotations", "val_images", "val_annotations")
    if not is_resumed:
        require_paths({f"data.{key}": getattr(data, key) for key in keys})
    require_paths({"init_backbone": config.init_backbone})
    weights = config.init_checkpoint
    require_paths({"init_checkpoint": weights and weights.removesuffix("/best")})


def require_storage(storage: str) -> None:
    """Refuse a folder for runs that cannot be written, before any work.

    Raises:
        ValueError: says which folder above it is the obstacle, or that there is no home.
    """
    try:
        folder = Path(storage).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"storage={storage}: the home of this user is unknown; set HOME, or storage=FOLDER"
        ) from error
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not existing.is_dir():
        raise ValueError(f"storage={storage}: {existing} is not a folder; set storage=FOLDER")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"storage={storage}: {existing} cannot be written; set storage=FOLDER")


def require_paths(paths: Mapping[str, str | Path | None]) -> None:
    """Refuse paths that do not exist. Addresses, such as s3://… and models:/…, are not looked up.

    Args:
        paths: by the name of their key or option, "" for none; empty paths are skipped.

    Raises:
        ValueError: names the first one.
    """
    for name, path in paths.items():
        if path and ":/" not in str(path) and not Path(path).expanduser().exists():
            raise ValueError(f"{name}={path}: no such file or folder".removeprefix("="))
