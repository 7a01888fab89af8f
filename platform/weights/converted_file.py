"""Weights of ours in one file that travels: what jobs/convert.py writes.

A safetensors file whose metadata hold the configuration, the classes and where the weights came
from. Not a checkpoint folder: that is the state of a run, with a step, an optimizer and metrics,
none of which converted weights have, and a run could be resumed from it. One file can be pinned by
one hash, put behind one address and registered. Since the format has no checksum, the metadata hold
one over all tensors and the other metadata, which is compared when it is read.
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
class Converted:
    """A file of ours that has been verified."""

    path: Path
    config: RunConfig
    classes: FileClasses
    source: dict[str, str]  # name, layout and SHA-256 of the file that it was made of
    tensors: dict[str, Tensor]


def is_converted(path: Path) -> bool:
    """Whether a file was written by `write_converted`; not verified."""
    return path.suffix == ".safetensors" and path.is_file() and FORMAT_KEY in read_metadata(path)


def write_converted(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: RunConfig,
    classes: FileClasses,
    source: Mapping[str, str],
) -> None:
    """Write a file that knows its model, its classes and where it came from.

    Args:
        tensors: under our names.
        config: of the model; what else it says of training is the variant's, not the file's.
        source: for people; `file`, `sha256` and `layout`.
    """
    rows = {str(row): asdict(category) for row, category in classes.by_row.items()}
    metadata = {
        FORMAT_KEY: str(FORMAT_VERSION),
        "config": to_json(config),
        "classes": json.dumps(
            {"num_rows": classes.num_rows, "rows": rows, "origin": classes.origin}
        ),
        "source": json.dumps(dict(source)),
    }
    metadata[DIGEST_KEY] = _digest(tensors, metadata)
    write_weights(path, tensors, metadata)


def read_converted(path: Path) -> Converted:
    """Read what `write_converted` wrote.

    Raises:
        WeightsError: it was changed since it was written, or is of a newer version.
    """
    metadata = read_metadata(path)
    try:
        version = int(metadata[FORMAT_KEY])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path}: was not written by jobs/convert.py") from error
    if version > FORMAT_VERSION:
        raise WeightsError(
            f"{path}: has format {version}; this version of deta-platform reads up to "
            f"{FORMAT_VERSION}, so it needs a newer one"
        )
    tensors = read_weights(path)
    if metadata.pop(DIGEST_KEY, "") != _digest(tensors, metadata):
        raise WeightsError(
            f"{path}: has changed since it was written; convert or download it again"
        )
    config = from_json(RunConfig, metadata["config"])
    classes = json.loads(metadata["classes"])
    by_row = {int(row): Category(**category) for row, category in classes["rows"].items()}
    return Converted(
        path,
        config,
        FileClasses(classes["num_rows"], by_row, classes["origin"]),
        json.loads(metadata["source"]),
        tensors,
    )


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
