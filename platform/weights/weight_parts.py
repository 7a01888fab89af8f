"""Find the files of weights that are stored in several parts, as Hugging Face's libraries do.

    folder/model-00001-of-00002.safetensors
    folder/model-00002-of-00002.safetensors
    folder/model.safetensors.index.json        {"weight_map": {tensor name: file name, …}}

The folder, the index and each part mean all parts.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from deta.platform.checkpoint.format import MANIFEST
from deta.platform.system.safe_read import file_sha256, read_json
from deta.platform.system.short_list import short_list

MAX_INDEX_BYTES = 64 << 20
INDEX_SUFFIX = ".index.json"
WHOLE = ("model.safetensors", "pytorch_model.bin")
OURS = (MANIFEST, "state.json")  # of a checkpoint
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


class PartsError(ValueError):
    """Parts are missing, or do not fit their index; the message says which."""


def is_weights_folder(path: Path) -> bool:
    """Return True for a folder that holds weights as Hugging Face's libraries store them.

    A checkpoint of ours has a `model.safetensors` too, and is no such folder, complete or not.
    """
    return path.is_dir() and bool(_in_folder(path))


def weight_parts(path: Path) -> list[Path]:
    """Return the files to read for a path, in order; the path itself if it is one whole file.

    Raises:
        PartsError: a part is missing, or the index is damaged or names other files.
    """
    if path.is_dir():
        found = _in_folder(path)
        if not found:
            return [path]
        return weight_parts(found[0])
    if path.name.endswith(INDEX_SUFFIX) and path.is_file():
        return _of_index(path)
    part = _PART.fullmatch(path.name)
    if part is None:
        return [path]
    index = path.with_name(f"{part['stem']}{part['suffix']}{INDEX_SUFFIX}")
    if index.is_file():
        return _of_index(index)
    names = [
        f"{part['stem']}-{number:05d}-of-{part['count']}{part['suffix']}"
        for number in range(1, int(part["count"]) + 1)
    ]
    return _existing(path, [path.with_name(name) for name in names])


def weights_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; of several parts, that of the list of their SHA-256."""
    parts = weight_parts(path)
    if len(parts) == 1:
        return file_sha256(parts[0])
    lines = "".join(f"{file_sha256(part)}  {part.name}\n" for part in parts)
    return hashlib.sha256(lines.encode()).hexdigest()


def _in_folder(folder: Path) -> list[Path]:
    """Return the files of a folder that stand for all weights, the preferred one first."""
    if any((folder / name).exists() for name in OURS):
        return []
    indices = sorted(folder.glob(f"*{INDEX_SUFFIX}"))
    found = [*indices, *(folder / name for name in WHOLE if (folder / name).is_file())]
    return sorted(found, key=lambda path: ".safetensors" not in path.name)


def _of_index(index: Path) -> list[Path]:
    try:
        content = read_json(index, MAX_INDEX_BYTES)
        names = sorted(set(content["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PartsError(
            f"{index}: is not an index of weights, a JSON object with `weight_map` ({error!r})"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise PartsError(f"{index}: names {name!r}, which is not a file beside it")
    if not names:
        raise PartsError(f"{index}: its `weight_map` names no file")
    return _existing(index, [index.with_name(name) for name in names])


def _existing(given: Path, parts: list[Path]) -> list[Path]:
    if missing := [part.name for part in parts if not part.is_file()]:
        raise PartsError(
            f"{given}: belongs to weights in {len(parts)} parts, of which {len(missing)} "
            f"({short_list(missing)}) are not in {given.parent}; copy or download all of them"
        )
    return parts
