"""The state of a run on disk: whole, or not there.

A checkpoint is a folder. It is written under another name, every file is hashed into a manifest
and forced to disk, and only then does it get its name. So whatever carries a name is whole, unless
the disk changed it later, which the hashes show.

    step-00001200/
        model.safetensors      the weights that were evaluated (the average, where there is one)
        training.safetensors   what else it takes to go on: optimizer, and the weights if averaged
        state.json             position, metrics, categories, data fingerprint
        config.json            the whole configuration
        MANIFEST.json          size and SHA-256 of each file
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from deta.platform.coco import Category
from deta.platform.config import RunConfig, from_json, to_json
from deta.platform.weights import write_weights

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run stands."""

    step: int  # updates made
    samples_seen: int  # the position in training; all that is random follows from it
    epoch: float
    metrics: dict[str, float] = field(
        default_factory=dict
    )  # AP and its kin in 0..100, if evaluated
    best_ap: float | None = None  # of this run so far, in 0..100
    # Of every evaluation of this run so far, in order; early stopping follows from it alone.
    ap_history: list[float] = field(default_factory=list)
    data_fingerprint: str = ""
    code_commit: str = ""
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been verified."""

    path: Path
    config: RunConfig
    state: RunState
    categories: tuple[Category, ...]

    def model_state(self) -> dict[str, Tensor]:
        return load_file(self.path / "model.safetensors")

    def training_state(self) -> dict[str, Tensor]:
        return load_file(self.path / "training.safetensors")


class CheckpointError(ValueError):
    """A folder is no checkpoint, or a damaged one, or one of a newer version."""


def write_checkpoint(
    folder: Path,
    *,
    model_state: Mapping[str, Tensor],
    training_state: Mapping[str, Tensor],
    state: RunState,
    config: RunConfig,
    categories: tuple[Category, ...],
) -> Path:
    """Write a checkpoint into the folder and return its path.

    Writing the same step again replaces what is there.
    """
    final = folder / f"step-{state.step:08d}"
    unfinished = folder / f".{final.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_weights(unfinished / "model.safetensors", model_state)
    write_weights(unfinished / "training.safetensors", training_state)
    (unfinished / "config.json").write_text(to_json(config), encoding="utf-8")
    content = asdict(state) | {"categories": [asdict(category) for category in categories]}
    (unfinished / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    files = sorted(path for path in unfinished.iterdir())
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in [*files, unfinished / MANIFEST, unfinished]:
        _force_to_disk(path)
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)
    _force_to_disk(folder)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, having compared every file with the manifest.

    Raises:
        CheckpointError: says which file is missing or damaged, or which version is too new.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is no whole checkpoint, its {MANIFEST} cannot be read ({error})"
        ) from error
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{file}: is missing or cut short; use an older checkpoint")
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(
                f"{file}: has changed since it was written; use an older checkpoint"
            )
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if content["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {content['format_version']}; this version of deta-platform reads "
            f"up to {FORMAT_VERSION}, so it needs a newer one"
        )
    categories = tuple(Category(**category) for category in content.pop("categories"))
    config = from_json(RunConfig, (path / "config.json").read_text(encoding="utf-8"))
    return Checkpoint(path, config, RunState(**content), categories)


def all_checkpoints(folder: Path) -> list[Path]:
    """By step, oldest first; not verified."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest one that verifies. A damaged one is renamed out of the way, with a warning."""
    for path in reversed(all_checkpoints(folder)):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            aside = path.with_name(f"damaged-{path.name}")
            logger.warning("%s; set aside as %s", error, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The one with the highest AP, the newest of equals; not verified."""
    best, best_ap = None, -1.0
    for path in all_checkpoints(folder):
        ap = _metrics(path).get("AP", -1.0)
        if ap >= best_ap and "AP" in _metrics(path):
            best, best_ap = path, ap
    return best


def keep_newest_and_best(folder: Path) -> None:
    """Delete all checkpoints but the newest and the best, and what an interrupted save left."""
    paths = all_checkpoints(folder)
    keep = {paths[-1] if paths else None, best_checkpoint(folder)}
    for path in paths:
        if path not in keep:
            shutil.rmtree(path)
    for leftover in folder.glob(".step-*.unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)


def _metrics(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))["metrics"]
    except (OSError, ValueError, KeyError):
        return {}


# Optimizer state under the names of the parameters, so that it survives another order of them.


def optimizer_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """`optimizer/<kind>/<parameter>` to tensor."""
    return {
        f"optimizer/{kind}/{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, kind, name = key.split("/", 2)
            parameter = parameters[name]
            # AdamW counts steps on the host; its moments live with the parameter.
            place = "cpu" if kind == "step" else parameter.device
            optimizer.state[parameter][kind] = tensor.to(place)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
