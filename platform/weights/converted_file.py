"""Read and write weights with their model configuration in one file, as jobs/convert.py does.

It is a safetensors file with configuration, classes and source in its metadata. It is not a
checkpoint folder, which is the state of a run with a step, an optimizer and metrics: converted
weights have none of these, and no run may resume from them. One file can be pinned by one hash,
published under one address and registered. The format has no checksum, so the metadata contain one
over all tensors and the other metadata, which is checked on reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from deta.platform.data.coco_dataset import Category
from deta.platform.run.config import RunConfig, from_json, to_json
from deta.platform.weights.class_mapping import FileClasses
from deta.platform.weights.weight_files import (
    WeightsError,
    read_metadata,
    read_weights,
    write_weights,
)

FORMAT_KEY, FORMAT_VERSION = "deta_platform_weights", 1
DIGEST_KEY = "content_sha256"


@dataclass(frozen=True)
class ConvertedFile:
    """A converted file whose checksum matched."""

    config: RunConfig
    classes: FileClasses
    source: dict[str, str]  # name, layout and SHA-256 of the source file
    tensors: dict[str, Tensor]


def is_converted(path: Path) -> bool:
    """Return True if `write_converted` wrote a file; its content is not verified."""
    return path.suffix == ".safetensors" and path.is_file() and FORMAT_KEY in read_metadata(path)


def write_converted(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: RunConfig,
    classes: FileClasses,
    source: Mapping[str, str],
) -> None:
    """Write weights under our names with their configuration and classes.

    Args:
        source: `file`, `sha256` and `layout`, for people.
    """
    rows = {str(row): asdict(category) for row, category in classes.by_row.items()}
    listed = {"num_rows": classes.num_rows, "rows": rows, "origin": classes.origin}
    metadata = {
        FORMAT_KEY: str(FORMAT_VERSION), "config": to_json(config),
        "classes": json.dumps(listed), "source": json.dumps(dict(source)),
    }  # fmt: skip
    metadata[DIGEST_KEY] = _digest(tensors, metadata)
    write_weights(path, tensors, metadata)


def read_converted(path: Path) -> ConvertedFile:
    """Read a file of `write_converted`.

    Raises:
        WeightsError: the file was changed since it was written, or has a newer version.
    """
    metadata = read_metadata(path)
    try:
        version = int(metadata[FORMAT_KEY])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: was not written by jobs/convert.py") from error
    if version > FORMAT_VERSION:
        raise WeightsError(
            f"{path}: has format {version}; this version of deta-platform reads up to "
            f"{FORMAT_VERSION}; update deta-platform"
        )
    tensors = read_weights(path)
    framework, digest = metadata.pop("format", ""), metadata.pop(DIGEST_KEY, "")
    if framework != "pt" or digest != _digest(tensors, metadata):
        raise WeightsError(
            f"{path}: has changed since it was written; convert or download it again"
        )
    listed = json.loads(metadata["classes"])
    by_row = {int(row): Category(**category) for row, category in listed["rows"].items()}
    classes = FileClasses(listed["num_rows"], by_row, listed["origin"])
    config, source = from_json(RunConfig, metadata["config"]), json.loads(metadata["source"])
    return ConvertedFile(config, classes, source, tensors)


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
