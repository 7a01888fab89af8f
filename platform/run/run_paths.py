"""Checks that the files which a configuration names exist, before anything slow is imported."""

from __future__ import annotations

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
