"""Resolves a model, given by address or path, to a folder on this machine.

    models:/deta@champion    the version that was promoted last
    models:/deta/3           version 3
    ~/deta-runs/my-run       the best checkpoint of a run, or one checkpoint

A version has the files of a checkpoint, so the result is always a folder that
`Predictor.from_checkpoint` opens. Versions are downloaded once, into the cache, and every byte is
compared with the hash in the registry each time.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from deta.platform.registry.model_address import is_model_address, parse_address, registry_uri
from deta.platform.system.download import cache_folder

# MLflow and torch are imported where they are used: they take seconds, and paths need no MLflow.
if TYPE_CHECKING:
    from deta.platform.registry.mlflow_registry import Version

WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine."""

    path: Path  # folder of a checkpoint, for `Predictor.from_checkpoint`
    version: int | None  # in the registry; None for a checkpoint
    name: str  # in the registry; for a checkpoint, the name of its run
    sha256: str  # of the file of the weights

    def __str__(self) -> str:
        return str(self.path) if self.version is None else f"{self.name} version {self.version}"


def resolve_model(model: str | Path, tracking_uri: str | None = None) -> ModelFolder:
    """Return the folder of a model; download it if it is in the registry and not in the cache.

    Args:
        model: an address in the registry, or the folder of a checkpoint or of a run.
        tracking_uri: of MLflow; default `registry_uri()`.

    Raises:
        ValueError: there is no such version, checkpoint or run, or its files are not those that
            were registered.
        RuntimeError: MLflow is unreachable.
    """
    if not is_model_address(model):
        return _local(Path(model).expanduser())
    from deta.platform.checkpoint.format import CheckpointError

    try:
        from deta.platform.registry.mlflow_registry import Registry
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{model}: registered models need MLflow ({error}): pip install 'deta-platform[train]'"
        ) from error

    registry = Registry(tracking_uri or registry_uri())
    version = registry.find(parse_address(str(model)))
    cache = cache_folder().parent / "models"
    # Named by its content too, since two registries may both have a version 3.
    folder = cache / f"{quote(version.name, safe='')}-{version.number}-{version.manifest[:16]}"
    if folder.is_dir():
        try:
            return open_version(folder, version)
        except (CheckpointError, OSError):
            shutil.rmtree(folder, ignore_errors=True)  # damaged: download it again
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=cache) as unfinished:
        downloaded = registry.download(version, Path(unfinished))
        open_version(downloaded, version)
        if not folder.exists():  # unless another process has made it meanwhile
            downloaded.rename(folder)
    return open_version(folder, version)


def _local(path: Path) -> ModelFolder:
    from deta.platform.checkpoint.format import read_manifest
    from deta.platform.checkpoint.local import find_checkpoint

    if path.is_file():
        raise ValueError(f"{path}: is a file; give a run, a checkpoint, or models:/NAME@ALIAS")
    checkpoint = find_checkpoint(path).resolve()
    folder = checkpoint.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    # Opening the checkpoint compares every byte.
    return ModelFolder(checkpoint, None, run.name, read_manifest(checkpoint)[WEIGHTS_FILE].sha256)


def open_version(folder: Path, version: Version) -> ModelFolder:
    """Return a version's folder after comparing all files with its manifest and the registry."""
    from deta.platform.checkpoint.format import (
        MANIFEST,
        CheckpointError,
        read_checkpoint,
        read_manifest,
    )
    from deta.platform.system.safe_read import file_sha256

    read_checkpoint(folder)
    found = read_manifest(folder)[WEIGHTS_FILE].sha256
    if found != version.sha256 or file_sha256(folder / MANIFEST) != version.manifest:
        raise CheckpointError(
            f"{version}: its files in MLflow are not those that were registered; the SHA-256 of "
            f"the weights is {found[:12]}… and was {version.sha256[:12]}…. Register the model again"
        )
    return ModelFolder(folder, version.number, version.name, found)
