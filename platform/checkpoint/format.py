"""The files of a checkpoint. A checkpoint opens only if every byte is as it was written.

    step-00001200/
        model.safetensors      the evaluated weights (EMA weights if they are used)
        training.safetensors   the rest for a resume: optimizer state, and raw weights besides EMA
        state.json             position, metrics, categories, data fingerprint
        config.json            the complete configuration
        MANIFEST.json          format, step, size and SHA-256 of each file, and its own SHA-256

Format 1 had a manifest of files only and less in state.json. It can be read but is never written.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from deta.platform.checkpoint.host_snapshot import WrittenFile
from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig, from_json
from deta.platform.run.run_state import FORMAT_VERSION, RunState
from deta.platform.system.safe_read import MAX_JSON_BYTES, file_sha256, read_bounded, read_json

MANIFEST = "MANIFEST.json"
NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Configuration keys of format 1 that were removed since.
_GONE_KEYS = (("cluster", "max_failures"),)


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
    """A folder is not a checkpoint, or is damaged, or has another format version."""


class OtherVersionError(CheckpointError):
    """A checkpoint is intact, but this version of deta-platform cannot read it."""


def state_to_json(state: RunState, categories: tuple[Category, ...]) -> str:
    """Return the content of state.json, without metrics that are not finite."""
    metrics = {name: value for name, value in state.metrics.items() if math.isfinite(value)}
    state = replace(state, metrics=metrics, format_version=FORMAT_VERSION)
    content = asdict(state) | {"categories": [asdict(category) for category in categories]}
    return json.dumps(content, indent=2)


def manifest_to_json(step: int, files: Mapping[str, WrittenFile]) -> str:
    """Return the content of MANIFEST.json."""
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {
            name: {"bytes": file.num_bytes, "sha256": file.sha256}
            for name, file in sorted(files.items())
        },
    }
    return json.dumps(manifest | {"sha256": _own_sha256(manifest)}, indent=2)


def parse_manifest(text: str | bytes, place: object) -> dict[str, WrittenFile]:
    """Return the files of a checkpoint from its manifest, of either format.

    Args:
        place: for error messages, such as the path of the manifest.

    Raises:
        OtherVersionError: the format is newer.
        CheckpointError: the manifest is damaged.
    """
    try:
        manifest = json.loads(text)
        if "format_version" in manifest:
            version = int(manifest["format_version"])
            expected = manifest.pop("sha256", None)
            intact = expected == _own_sha256(manifest)
            if version > FORMAT_VERSION and (intact or expected is None):
                raise OtherVersionError(
                    f"{place}: has format {version}; this version of deta-platform reads up to "
                    f"{FORMAT_VERSION}, so it needs a newer one"
                )
            if not intact:
                raise ValueError("does not match its own SHA-256")
            manifest = manifest["files"]
        files = {
            name: WrittenFile(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest.items()
        }
        if not all(_FILE_NAME.fullmatch(name) for name in files):
            raise ValueError("names files outside its folder")
        if missing := {"state.json", "config.json", "model.safetensors"} - set(files):
            raise ValueError(f"does not name {', '.join(sorted(missing))}")
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{place}: is not an intact checkpoint manifest ({error}); use an older checkpoint"
        ) from error
    return files


def read_manifest(path: Path) -> dict[str, WrittenFile]:
    """Return the files of a checkpoint after checking that all exist in full length.

    Cheap, since no hash is compared.

    Raises:
        CheckpointError: something is missing, damaged or too new.
    """
    try:
        text = read_bounded(path / MANIFEST, MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{path}: is not a complete checkpoint, it has no {MANIFEST}; use an older checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{error}; use an older checkpoint") from error
    files = parse_manifest(text, path / MANIFEST)
    for name, expected in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected.num_bytes:
            raise CheckpointError(f"{file}: is missing or cut short; use an older checkpoint")
    return files


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint after comparing every file with the manifest.

    Raises:
        OtherVersionError: it is intact, but newer than this version of deta-platform.
        CheckpointError: a file is missing or damaged.
        OSError: the disk cannot be read.
    """
    for name, expected in read_manifest(path).items():
        if file_sha256(path / name) != expected.sha256:
            raise CheckpointError(
                f"{path / name}: has changed since it was written; use an older checkpoint"
            )
    try:
        content, values = read_json(path / "state.json"), read_json(path / "config.json")
        categories = tuple(Category(**category) for category in content.pop("categories"))
        state = RunState(**content)
        if state.format_version == 1:
            for part, key in _GONE_KEYS:
                values.get(part, {}).pop(key, None)
        return Checkpoint(path, from_json(RunConfig, json.dumps(values)), state, categories)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # every byte is verified
        raise OtherVersionError(
            f"{path}: cannot be read by this version of deta-platform ({error}); use the version "
            "that wrote it"
        ) from error


def read_metrics(path: Path) -> dict[str, float]:
    """Return the finite metrics of an unverified checkpoint; empty if they cannot be read."""
    try:
        return parse_metrics((path / "state.json").read_bytes())
    except OSError:
        return {}


def parse_metrics(state: bytes) -> dict[str, float]:
    """Return the finite metrics of a state.json; empty if it is damaged."""
    try:
        metrics = json.loads(state)["metrics"]
        return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _own_sha256(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
