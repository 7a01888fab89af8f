"""What a person means by a model: a version of the registry, or a checkpoint on this machine.

    models:/deta@champion    the version that the registry's gate let through last
    models:/deta/3           version 3
    ~/deta-runs/my-run       a run's best checkpoint; or one checkpoint

A version is kept as a checkpoint is, so either way the answer is a folder that
`Predictor.from_checkpoint` opens. Versions are downloaded once, into the cache, and every byte is
compared with the hash in the registry each time.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from deta.platform.registry.mlflow_registry import SCHEME, ModelAddress, registry_uri
from deta.platform.system.download import cache_folder

# What needs torch is imported where it is used: an address alone needs none.
if TYPE_CHECKING:
    from deta.platform.registry.mlflow_registry import Version

WEIGHTS_FILE = "model.safetensors"
_ADDRESS = re.compile(r"models:/+(?P<name>[^/@:]+)(?:/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine."""

    path: Path  # a checkpoint's folder, for `Predictor.from_checkpoint`
    version: int | None  # in the registry; none for a checkpoint
    name: str  # in the registry; of a checkpoint its run's
    sha256: str  # of the weights' file

    def __str__(self) -> str:
        return str(self.path) if self.version is None else f"{self.name} version {self.version}"


def is_model_address(text: str | Path) -> bool:
    return str(text).startswith(SCHEME)


def parse_address(text: str) -> ModelAddress:
    """
    Raises:
        ValueError: it is of another form.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} names no version of the registry; give models:/NAME@ALIAS or "
            "models:/NAME/NUMBER, such as models:/deta@champion or models:/deta/3"
        )
    version = match["version"]
    return ModelAddress(match["name"], int(version) if version else None, match["alias"])


def resolve_model(model: str | Path, tracking_uri: str | None = None) -> ModelFolder:
    """The folder of a model, downloaded if it is in the registry and not here yet.

    Args:
        model: an address in the registry, a checkpoint's folder, or a run's.
        tracking_uri: of MLflow; default `registry_uri()`.

    Raises:
        ValueError: there is no such version, checkpoint or run, or it is not the one that was
            registered.
        RuntimeError: MLflow does not answer.
    """
    if not is_model_address(model):
        return _local(Path(model).expanduser())
    from deta.platform.checkpoint.format import CheckpointError
    from deta.platform.registry.mlflow_registry import (
        Registry,  # here: slow to import, and paths need no MLflow
    )

    registry = Registry(tracking_uri or registry_uri())
    version = registry.find(parse_address(str(model)))
    place = cache_folder().parent / "models"
    # By all that is in it: two registries may both have a version 3.
    folder = place / f"{quote(version.name, safe='')}-{version.number}-{version.manifest[:16]}"
    if folder.is_dir():
        try:
            return open_version(folder, version)
        except (CheckpointError, OSError):
            shutil.rmtree(folder, ignore_errors=True)  # damaged in the cache: once more
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=place) as unfinished:
        arrived = registry.download(version, Path(unfinished))
        open_version(arrived, version)
        if not folder.exists():  # else by another process, meanwhile
            arrived.rename(folder)
    return open_version(folder, version)


def _local(path: Path) -> ModelFolder:
    from deta.platform.checkpoint.format import read_manifest
    from deta.platform.checkpoint.local import find_checkpoint

    if path.is_file():
        raise ValueError(f"{path}: is a file; give a run, a checkpoint, or models:/NAME@ALIAS")
    checkpoint = find_checkpoint(path).resolve()
    folder = checkpoint.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    # Whoever opens it compares every byte.
    return ModelFolder(checkpoint, None, run.name, read_manifest(checkpoint)[WEIGHTS_FILE].sha256)


def open_version(folder: Path, version: Version) -> ModelFolder:
    """Having compared every byte with the folder's manifest, and that one with the registry."""
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
